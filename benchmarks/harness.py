"""What the benchmarks share: paired timing, peak memory, tables, and several processes at a time."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctc_timm.utils.errors import RunError, Stopped, UserError

Step = Callable[[], Any]
Tables = dict[str, dict[str, dict[str, float]]]
UNKNOWN = 'nan\n'


def benchmark_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that the timings of steps and losses share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=64, help='B')
    parser.add_argument('--instances', type=int, default=50_000, help='N')
    parser.add_argument('--num-negatives', type=int, default=16_384, help='K')
    parser.add_argument('--rounds', type=int, default=rounds)
    parser.add_argument('--threads', type=int, default=0, help='CPU threads, 0 for all')
    parser.add_argument('--output', default='', metavar='FILE.json', help='write the numbers')
    parser.add_argument('--compare', default='', metavar='FILE.json', help='an earlier output to compare with')
    return parser


def paired_seconds(
    steps: Mapping[str, Step], rounds: int, title: str, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every step, one of each kind a round, so that a busy machine slows them alike."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in tqdm(range(warmup + rounds), title, leave=False, disable=None):
        for name, step in steps.items():
            start = clock()
            step()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def peak_memory(step: Step) -> float:
    """MiB that torch allocates at the peak of a step, beyond what is there before.

    Read off CUDA's own counter where CUDA is in use, else off the profiler's record of allocations.
    """
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler announces itself otherwise
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak / 2**20


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    return '\n'.join(f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *body))


def show(tables: Tables, before: Tables | None = None) -> None:
    """Print tables, rows by columns; beside a number that was there before stands its ratio to that."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [['', *columns]]
        for name, row in rows.items():
            old = (before or {}).get(title, {}).get(name, {})
            lines.append([name, *(_cell(row.get(column), old.get(column)) for column in columns)])
        print(f'\n{title}\n\n{markdown(lines)}')


def finish(tables: Tables, args: argparse.Namespace) -> None:
    """Print tables, and write or compare them as `benchmark_parser`'s flags say."""
    show(tables, json.loads(Path(args.compare).read_text())['tables'] if args.compare else None)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        Path(args.output).write_text(json.dumps({'settings': settings, 'tables': tables}, indent=2) + '\n')


def _cell(value: float | None, old: float | None) -> str:
    if value is None:
        return ''
    text = f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
    return f'{text} ({value / old:.2f} of {old:.3g})' if old else text


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: For messages.
        steps: Arguments of Python processes, one after the other. Each continues where it was when started again.
        done: The file that the last step writes.
        log: Output of the processes; beside it `cpu_seconds` of the first step is kept.
    """

    name: str
    steps: tuple[Sequence[str], ...]
    done: Path
    log: Path

    def start(self, step: int) -> subprocess.Popen:
        """Start the process of a step."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if step == 0:
            with _cost_file(self.log).open('a') as stream:
                stream.write(UNKNOWN)  # stays if this process is killed and cannot note the cost
        threads = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
        with self.log.open('a') as stream:
            command = [sys.executable, *self.steps[step]]
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | threads)


def work(tasks: Iterable[Task], jobs: int) -> Iterator[Task]:
    """Do the tasks that are not done yet, `jobs` at a time, with a progress bar; yield each task when it is done.

    Raises:
        RunError: A process failed. The others are stopped, and continue with the next call.
        Stopped: SIGTERM, likewise.
    """
    tasks = list(tasks)
    done = [task for task in tasks if task.done.is_file()]
    waiting = deque((task, 0) for task in tasks if task not in done)
    running: dict[int, tuple[Task, int, subprocess.Popen]] = {}

    def end(pid: int, status: int, usage: Any) -> tuple[Task, int, int]:
        """Note the exit code of a process, and the cost of a first step."""
        task, step, process = running.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if step == 0:
            file = _cost_file(task.log)
            file.write_text(f'{file.read_text().removesuffix(UNKNOWN)}{usage.ru_utime + usage.ru_stime:.1f}\n')
        return task, step, process.returncode

    handler = signal.signal(signal.SIGTERM, _stop)
    bar = tqdm(total=len(tasks), initial=len(done), desc='runs', dynamic_ncols=True)
    try:
        yield from done
        while waiting or running:
            while waiting and len(running) < jobs:
                task, step = waiting.popleft()
                process = task.start(step)
                running[process.pid] = task, step, process
            task, step, code = end(*os.wait3(0))
            if code:
                raise RunError(f'{task.name} ended with {code}; see {task.log}')
            if step + 1 < len(task.steps):
                waiting.appendleft((task, step + 1))
            else:
                bar.update()
                yield task
    finally:
        for _, _, process in running.values():
            process.terminate()  # training saves its state first
        for pid in list(running):
            end(*os.wait4(pid, 0))
        bar.close()
        signal.signal(signal.SIGTERM, handler)


def _stop(*_: Any) -> None:
    raise Stopped('stopped by SIGTERM; the same command continues')


def cpu_seconds(log: Path) -> float | None:
    """CPU seconds of all processes of a task's first step; None if one was killed together with its parent."""
    file = _cost_file(log)
    total = sum(map(float, file.read_text().split())) if file.is_file() else math.nan
    return None if math.isnan(total) else total


def _cost_file(log: Path) -> Path:
    return log.with_suffix('.seconds')


def main_of(main: Callable[[], None]) -> None:
    """Run a script, with a user's error as one line."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
