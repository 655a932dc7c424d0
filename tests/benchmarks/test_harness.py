"""Several processes at a time, some of which fail, wait or are killed; paired timing and tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import harness
import pytest
import torch
from runs import ROOT

from ctc_timm.utils.errors import RunError

# Appends its word to its file; then fails, or waits for SIGTERM, if that is its word.
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
DRIVER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / 'benchmarks')!r})
import harness
folder = Path(sys.argv[1])
step = [str(folder / 'step.py'), str(folder / 'a'), 'wait']
list(harness.work([harness.Task('a', (step,), folder / 'a.done', folder / 'logs' / 'a.log')], 1))
"""


def task(folder: Path, name: str, *words: str) -> harness.Task:
    script = folder / 'step.py'
    script.write_text(STEP)
    steps = tuple([str(script), str(folder / name), word] for word in words)
    return harness.Task(name, steps, folder / f'{name}.done', folder / 'logs' / f'{name}.log')


def test_steps_follow_each_other_and_done_tasks_are_left_alone(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name, 'one', 'two') for name in 'abc']
    tasks[1].done.touch()
    assert [done.name for done in harness.work(tasks, 2)][0] == 'b'
    assert (tmp_path / 'a').read_text() == (tmp_path / 'c').read_text() == 'one two '
    assert not (tmp_path / 'b').exists()
    assert len((tmp_path / 'logs' / 'a.seconds').read_text().split()) == 1  # of the first step


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    waits, fails = task(tmp_path, 'a', 'wait'), task(tmp_path, 'b', 'one', 'fail')
    start = time.monotonic()
    with pytest.raises(RunError, match=rf'^b ended with 3; see {fails.log}$'):
        list(harness.work([waits, fails], 2))
    assert (tmp_path / 'a').read_text() == 'wait stopped ' and time.monotonic() - start < 40
    assert harness.cpu_seconds(waits.log) is not None


def test_the_cost_of_a_killed_call_is_not_known(tmp_path: Path) -> None:
    again = task(tmp_path, 'a', 'one')
    driver = subprocess.Popen([sys.executable, '-c', DRIVER, str(tmp_path)], start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / 'a').exists() and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert (tmp_path / 'a').read_text() == 'wait '
    list(harness.work([again], 1))
    assert harness.cpu_seconds(again.log) is None
    (tmp_path / 'logs' / 'b.seconds').write_text('90.5\n')  # of a call that could note it
    list(harness.work([task(tmp_path, 'b', 'one')], 1))
    assert 90.5 <= harness.cpu_seconds(tmp_path / 'logs' / 'b.log') < 120
    assert harness.cpu_seconds(tmp_path / 'logs' / 'c.log') is None


def test_timing_is_paired_and_memory_is_the_peak() -> None:
    order: list[str] = []
    seconds = harness.paired_seconds({name: lambda name=name: order.append(name) for name in 'ab'}, 3, 'title')
    assert order == list('ab' * 4) and [len(times) for times in seconds.values()] == [3, 3]
    assert harness.median_ratio([1.0, 9.0, 4.0], [2.0, 3.0, 2.0]) == 2.0
    # two tensors of 2 MiB at a time, three in all
    assert harness.peak_memory(lambda: torch.ones(2**19).add(1).add(1)) == pytest.approx(4, rel=0.01)


def test_tables_are_printed_kept_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tables = {'time': {'fast': {'ms': 1234.5}, 'slow': {'ms': 0.5, 'MiB': 2.0}}}
    args = Namespace(output=str(tmp_path / 'a.json'), compare='')
    harness.finish(tables, args)
    assert json.loads((tmp_path / 'a.json').read_text())['tables'] == tables
    head = '\ntime\n\n|  | ms | MiB |\n| --- | --- | --- |\n'
    assert capsys.readouterr().out == f'{head}| fast | 1,234 |  |\n| slow | 0.5 | 2 |\n'
    harness.finish({'time': {'slow': {'ms': 1.0}}}, Namespace(output='', compare=args.output))
    assert '| slow | 1 (2.00 of 0.5) |' in capsys.readouterr().out
