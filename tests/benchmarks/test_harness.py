"""Several processes at a time, some of which fail, wait or are killed; paired timing and tables."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import harness
from ctc_timm.utils.errors import RunError, Stopped

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


def task(folder: Path, name: str, *words: str) -> harness.Task:
    script = folder / 'step.py'
    script.write_text(STEP)
    steps = tuple([str(script), str(folder / name), word] for word in words)
    return harness.Task(name, steps, folder / f'{name}.done', folder / 'logs' / f'{name}.log')


def test_steps_follow_each_other_and_done_tasks_are_left_alone(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name, 'one', 'two') for name in 'abc']
    tasks[1].done.touch()
    assert {done.name for done in harness.work(tasks, 2)} == set('abc')
    assert (tmp_path / 'a').read_text() == (tmp_path / 'c').read_text() == 'one two '
    assert not (tmp_path / 'b').exists()
    seconds = [harness.cpu_seconds(task.log) for task in tasks]  # of the first step
    assert seconds[1] is None and 0 <= seconds[0] < 30


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    tasks = [task(tmp_path, 'a', 'wait'), task(tmp_path, 'b', 'one', 'fail'), task(tmp_path, 'c', 'wait')]
    start = time.monotonic()
    with pytest.raises(RunError, match=rf'^b ended with 3; see {tasks[1].log}$'):
        list(harness.work(tasks, 2))
    assert (tmp_path / 'a').read_text() == 'wait stopped ' and time.monotonic() - start < 40
    assert not (tmp_path / 'c').exists() or (tmp_path / 'c').read_text() == 'wait stopped '
    list(harness.work([task(tmp_path, 'a', 'one')], 1))  # continues what was stopped
    assert (tmp_path / 'a').read_text() == 'wait stopped one ' and harness.cpu_seconds(tasks[0].log) is None


def test_sigterm_stops_all(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name, 'wait') for name in 'ab']

    def send() -> None:
        while not ((tmp_path / 'a').exists() and (tmp_path / 'b').exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Stopped):
        list(harness.work(tasks, 2))
    assert (tmp_path / 'a').read_text() == (tmp_path / 'b').read_text() == 'wait stopped '


def test_timing_is_paired_and_memory_is_the_peak() -> None:
    order: list[str] = []
    seconds = iter([0, 1, 1, 3, 3, 4, 4, 8, 8, 10, 10, 12])  # a: 1, 1, 2; b: 2, 4, 2
    steps = {name: lambda name=name: order.append(name) for name in 'ab'}
    table = harness.timing_table(steps, 3, 'title', warmup=0, clock=lambda: next(seconds))
    assert order == list('ababab')
    assert table['a'] == {'ms': 1000, 'over the first': 1, 'from': 1, 'to': 1}
    assert table['b'] == {'ms': 2000, 'over the first': 2, 'from': 1.5, 'to': 3}
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
