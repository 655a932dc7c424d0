"""Several runs at a time, each of them processes one after the other, each with a log of its own."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctc_timm.utils.errors import RunError, Stopped

UNKNOWN = 'nan\n'


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: In messages.
        steps: Python scripts with their arguments, one after the other. Each goes on where it was when it is called
            again.
        done: The file that the last step writes.
        log: What the processes say.
        seconds: Gets the processor seconds of each process of the first step, if given.
    """

    name: str
    steps: tuple[list[str], ...]
    done: Path
    log: Path
    seconds: Path | None = None


@dataclass
class _Job:
    """A process at work on a step of a task."""

    task: Task
    step: int
    process: subprocess.Popen

    def ended(self, options: int = 0) -> bool:
        """Whether it has ended; what it cost is noted."""
        pid, status, usage = os.wait4(self.process.pid, options)
        if not pid:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.task.seconds and self.step == 0:
            known = self.task.seconds.read_text().removesuffix(UNKNOWN)
            self.task.seconds.write_text(f'{known}{usage.ru_utime + usage.ru_stime:.1f}\n')
        return True


def processor_seconds(file: Path) -> float | None:
    """What the processes of a task's first step cost together; none if one of them was lost sight of."""
    total = sum(map(float, file.read_text().split())) if file.is_file() else math.nan
    return None if math.isnan(total) else total


def work(tasks: Iterable[Task], jobs: int) -> Iterator[Task]:
    """Do all tasks, some at a time, those that are done already left alone.

    Args:
        tasks: In the order in which they are begun.
        jobs: How many at a time.

    Yields:
        Each task when it is done.

    Raises:
        RunError: A process failed; the others are stopped, and go on with the next call.
    """
    tasks = list(tasks)
    waiting, running = deque(task for task in tasks if not task.done.is_file()), list[_Job]()
    yield from (task for task in tasks if task.done.is_file())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.popleft(), 0))
            time.sleep(1)
            for job in [job for job in running if job.ended(os.WNOHANG)]:
                running.remove(job)
                if job.process.returncode:
                    raise RunError(f'{job.task.name} ended with {job.process.returncode}; see {job.task.log}')
                if job.step + 1 < len(job.task.steps):
                    running.append(_start(job.task, job.step + 1))
                else:
                    yield job.task
    finally:
        for job in running:
            job.process.terminate()  # training keeps its state first
        for job in running:
            job.ended()


def _start(task: Task, step: int) -> _Job:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    if task.seconds and step == 0:
        with task.seconds.open('a') as stream:
            stream.write(UNKNOWN)  # it stays if this script is killed and cannot note what the process cost
    alone = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
    with task.log.open('a') as stream:
        process = subprocess.Popen(
            [sys.executable, *task.steps[step]], stdout=stream, stderr=stream, env={**os.environ, **alone}
        )
    return _Job(task, step, process)


def stop_by_sigterm() -> None:
    """Let SIGTERM end the processes at work as well."""
    signal.signal(signal.SIGTERM, _stopped)


def _stopped(*_: Any) -> None:
    raise Stopped('stopped by SIGTERM; the same command goes on')
