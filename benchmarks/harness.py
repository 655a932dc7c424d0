"""What the benchmarks share: paired timing, peak memory, tables, and several processes at a time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ctc_timm.cli import flags
from ctc_timm.cli.flags import Parser, add_settings
from ctc_timm.utils.errors import RunError, Stopped
from ctc_timm.utils.settings import check_values
from ctc_timm.utils.yaml_files import read_recipe

Table = dict[str, dict[str, float | None]]
Steps = Mapping[str, Callable[[], Any]]
Clock = Callable[[], float]


def read_flags(doc: str | None, *positional: str, settings: type | None = None, **defaults: Any) -> Any:
    """Read a script's command line.

    Args:
        doc: Its docstring.
        *positional: Names of arguments without a flag.
        settings: Settings of a command, whose flags are read too and given as `values`, over those of a recipe.
        **defaults: Flags by name, of the type of their default; a list takes several values.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in positional:
        parser.add_argument(name)
    for name, default in defaults.items():
        options: dict[str, Any] = {'action': 'store_true'}
        if not isinstance(default, bool):
            kind = type(default[0] if isinstance(default, list) else default)
            options = {'type': kind, 'nargs': '+' if isinstance(default, list) else None, 'help': f'default: {default}'}
        parser.add_argument(f'--{name.replace("_", "-")}', default=default, **options)
    if settings is None:
        return parser.parse_args()
    add_settings(parser, settings)
    values = flags.read_flags(parser, settings)
    own = {name: values.pop(name) for name in defaults}
    recipe = check_values(settings, read_recipe(values.pop('config'))) if 'config' in values else {}
    return argparse.Namespace(**own, values={**recipe, **values})


def timing_table(
    steps: Steps, rounds: int, title: str, warmup: int = 1, clock: Clock = time.perf_counter, memory: bool = False
) -> Table:
    """Time steps, one of each kind a round, so that other work on the machine slows them alike.

    Returns:
        A row a step: its median time, the median and quartiles of its ratio to the first step within a round, and with
        `memory` its `peak_memory`.
    """
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
    table: Table = {}
    first = seconds[next(iter(steps))]
    for name, times in seconds.items():
        ratios = [time / other for time, other in zip(times, first)]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive') if rounds > 1 else ratios * 3
        table[name] = {'ms': 1e3 * statistics.median(times), 'over the first': middle, 'from': low, 'to': high}
        if memory:
            table[name]['extra MiB'] = peak_memory(steps[name])
    return table


def peak_memory(step: Callable[[], Any]) -> float:
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
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes), default=0) / 2**20


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    return '\n'.join(f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *body))


def show(tables: dict[str, Table], before: dict[str, Table] | None = None) -> None:
    """Print tables, rows by columns; beside a number that was there before stands its ratio to that."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [['', *columns]]
        for name, row in rows.items():
            old = (before or {}).get(title, {}).get(name, {})
            lines.append([name, *(_cell(row.get(column), old.get(column)) for column in columns)])
        print(f'\n{title}\n\n{markdown(lines)}')


def finish(tables: dict[str, Table], args: argparse.Namespace) -> None:
    """Print tables, and write or compare them as the flags `output` and `compare` say."""
    show(tables, json.loads(Path(args.compare).read_text())['tables'] if args.compare else None)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        Path(args.output).write_text(json.dumps({'settings': settings, 'tables': tables}, indent=2) + '\n')


def _cell(value: float | None, old: float | None) -> str:
    if value is None:
        return ''
    text = f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
    return f'{text} ({value / old:.2f} of {old:.3g})' if old else text


class Task(NamedTuple):
    """One run.

    Attributes:
        name: For messages.
        steps: Arguments of Python processes, one after the other. Each continues where it was when started again.
        done: The file that the last step writes.
        log: Output of the processes; beside it stands the cost of the first step, see `cpu_seconds`.
    """

    name: str
    steps: tuple[Sequence[str], ...]
    done: Path
    log: Path


def work(tasks: Sequence[Task], jobs: int) -> Iterator[Task]:
    """Do the tasks that are not done yet, `jobs` at a time, with a progress bar; yield each task when it is done.

    Raises:
        RunError: A process failed. The others are stopped, and continue with the next call.
        Stopped: SIGTERM, likewise.
    """
    stopping, running = threading.Event(), set[subprocess.Popen]()

    def run(task: Task) -> Task:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        cost = task.log.with_suffix('.seconds')
        for number, step in enumerate(task.steps if not task.done.is_file() else ()):
            if stopping.is_set():
                break
            first_time = number == 0 and not cost.exists()
            cost.touch()
            threads = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
            with task.log.open('a') as log:
                process = subprocess.Popen([sys.executable, *step], stdout=log, stderr=log, env=os.environ | threads)
            running.add(process)
            if stopping.is_set():  # since it was asked
                process.terminate()
            _, status, usage = os.wait4(process.pid, 0)
            running.remove(process)
            process.returncode = os.waitstatus_to_exitcode(status)
            if status:
                raise RunError(f'{task.name} ended with {process.returncode}; see {task.log}')
            if first_time:
                cost.write_text(f'{usage.ru_utime + usage.ru_stime:.1f}')
        return task

    def stop(*_: Any) -> None:
        raise Stopped('stopped by SIGTERM; the same command continues')

    handler, pool = signal.signal(signal.SIGTERM, stop), ThreadPool(jobs)
    try:
        yield from tqdm(pool.imap_unordered(run, tasks), 'runs', len(tasks), dynamic_ncols=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
        stopping.set()
        for process in list(running):
            process.terminate()  # training saves its state first
        pool.close()
        pool.join()


def cpu_seconds(log: Path) -> float | None:
    """CPU seconds of a task's first step, if one process did it all."""
    cost = log.with_suffix('.seconds')
    text = cost.read_text() if cost.is_file() else ''
    return float(text) if text else None
