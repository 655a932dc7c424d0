"""Several runs at a time, as the benchmarks make them: real processes, some of which fail or are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from runs import ROOT

from ctc_timm.utils.errors import RunError

# Appends its word to its file; then fails, or waits until it is told to stop, if that is its word.
STEP = """
import signal, sys, time
file, word = sys.argv[1:]
def stop(*_):
    open(file, 'a').write('stopped ')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(file, 'a').write(word + ' ')
if word == 'wait':
    time.sleep(60)
sys.exit(3 if word == 'fail' else 0)
"""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import jobs

    return jobs


def task(jobs: ModuleType, folder: Path, name: str, *words: str):
    script = folder / 'step.py'
    script.write_text(STEP)
    steps = tuple([str(script), str(folder / name), word] for word in words)
    return jobs.Task(name, steps, folder / f'{name}.done', folder / 'logs' / name, folder / f'{name}.seconds')


def test_steps_follow_each_other_and_what_is_done_is_left_alone(jobs: ModuleType, tmp_path: Path) -> None:
    tasks = [task(jobs, tmp_path, name, 'one', 'two') for name in 'abc']
    tasks[1].done.touch()
    assert [done.name for done in jobs.work(tasks, 2)][0] == 'b'
    assert (tmp_path / 'a').read_text() == (tmp_path / 'c').read_text() == 'one two '
    assert not (tmp_path / 'b').exists()
    assert len((tmp_path / 'a.seconds').read_text().split()) == 1  # of the first step


def test_a_failure_stops_the_others(jobs: ModuleType, tmp_path: Path) -> None:
    waits, fails = task(jobs, tmp_path, 'a', 'wait'), task(jobs, tmp_path, 'b', 'one', 'fail')
    begun = time.monotonic()
    with pytest.raises(RunError, match=rf'^b ended with 3; see {fails.log}$'):
        list(jobs.work([waits, fails], 2))
    assert (tmp_path / 'a').read_text() == 'wait stopped ' and time.monotonic() - begun < 40


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jobs
folder = Path(sys.argv[2])
step = [str(folder / 'step.py'), str(folder / 'a'), 'wait']
list(jobs.work([jobs.Task('a', (step,), folder / 'a.done', folder / 'log', folder / 'a.seconds')], 1))
"""


def test_what_a_killed_call_cost_is_not_known(jobs: ModuleType, tmp_path: Path) -> None:
    again = task(jobs, tmp_path, 'a', 'one')
    driver = subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(ROOT / 'benchmarks'), str(tmp_path)], start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / 'a').exists() and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert (tmp_path / 'a').read_text() == 'wait '
    list(jobs.work([again], 1))
    assert jobs.processor_seconds(tmp_path / 'a.seconds') is None
    (tmp_path / 'b.seconds').write_text('90.5\n')  # of a call that could note it
    list(jobs.work([task(jobs, tmp_path, 'b', 'one')], 1))
    assert 90.5 <= jobs.processor_seconds(tmp_path / 'b.seconds') < 120
    assert jobs.processor_seconds(tmp_path / 'c.seconds') is None
