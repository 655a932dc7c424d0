"""Processes that load data and die or fail: one line, a code, and a run that can be continued."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CONFIG, Ended, forget_processes
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ctc_timm.data import decoding as reading
from ctc_timm.data import workers
from ctc_timm.data.datasets import open_split
from ctc_timm.data.loaders import create_eval_loader
from ctc_timm.data.training_loader import TrainLoader
from ctc_timm.data.workers import WorkerError
from ctc_timm.utils.errors import UserError

Flags = Callable[..., argparse.Namespace]
CPU = torch.device('cpu')
WORDS = '--dataset digits --train-split train[:64] -b 8 -j 2'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch gives each process five seconds to end after an error, and processes use them up."""
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)
    yield
    gc.collect()


class Dying(Dataset):
    """Numbers; at one of them its process ends in a way of its own."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end = end

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        if index == 37:
            self.end()
        return index


def killed(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def failing() -> None:
    raise LookupError('first line\nsecond line: with more')


def refusing() -> None:
    raise UserError('--flag 3: use 4')


@pytest.mark.parametrize(
    'end, kind, message',
    [
        (killed(signal.SIGKILL), WorkerError, "was killed by the signal 'Killed'; the usual reason is that the memory"),
        (killed(signal.SIGBUS), WorkerError, "was killed by the signal 'Bus error'; the usual reason is that the sha"),
        (killed(signal.SIGSEGV), WorkerError, "was killed by the signal 'Segmentation fault'"),
        (lambda: os._exit(3), WorkerError, 'ended unexpectedly with exit code 3'),
        (lambda: os._exit(0), WorkerError, 'ended unexpectedly'),
        (failing, WorkerError, 'a data loading process failed with LookupError: first line second line: with more'),
        (refusing, UserError, '--flag 3: use 4'),
    ],
    ids=['KILL', 'BUS', 'SEGV', 'exit 3', 'exit 0', 'exception', 'refusal'],
)
def test_every_end(end: Callable[[], Any], kind: type[UserError], message: str) -> None:
    """Of a real process, told in a line, within the seconds that PyTorch waits for a batch."""
    started = time.monotonic()
    with pytest.raises(UserError) as error, workers.translate_errors():
        list(DataLoader(Dying(end), batch_size=4, num_workers=2))
    assert type(error.value) is kind and time.monotonic() - started < 10
    assert message in str(error.value) and 'Traceback' not in str(error.value) and '\n' not in str(error.value)
    assert error.value.exit_code == (1 if kind is WorkerError else 2)


def test_other_errors_pass() -> None:
    """What the program itself raises keeps its kind and traceback."""
    for error in (RuntimeError('shapes differ'), ValueError(), KeyError('loss')):
        with pytest.raises(type(error)) as caught, workers.translate_errors():
            raise error
        assert caught.value is error


@pytest.mark.parametrize('loader', ['train', 'validation'])
def test_loaders_tell(flags: Flags, loader: str) -> None:
    """A process of either loader that is killed, and one whose transforms fail on an image."""
    args = flags(WORDS)
    for end, words in ((killed(signal.SIGKILL), "signal 'Killed'"), (failing, 'LookupError: first line second line')):
        dataset = open_split(args, 'train[:64]').dataset
        if loader == 'train':
            batches: Any = TrainLoader(dataset, args, CONFIG, CPU)
        else:
            batches = create_eval_loader(dataset, args, CONFIG, CPU)
        dataset.transform = lambda image, end=end: end()
        with pytest.raises(UserError) as error:
            list(batches)
        assert words in str(error.value)
        assert end is not failing or '.png: its transforms fail with LookupError' in str(error.value)


def test_a_death_that_the_program_is_not_waiting_for(flags: Flags) -> None:
    """PyTorch raises it wherever the program is just then."""
    loader = TrainLoader(open_split(flags(WORDS), 'train[:64]').dataset, flags(WORDS), CONFIG, CPU)
    reached = False
    with pytest.raises(WorkerError, match="was killed by the signal 'Killed'"), workers.translate_errors():
        for _ in loader:
            os.kill(loader._loader.loader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(10)
            reached = True
    assert not reached


def test_a_run_goes_on_after_a_worker_died(
    script: Callable[..., Ended], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch: one line, exit code 1; continued, it ends as if nothing had been."""
    words = [*tiny, '-j', '1', '--epochs', '2', '--temporal-start-epoch', '1', '--output', str(tmp_path)]
    assert script('train.py', *words, '--experiment', 'whole').code == 0
    forget_processes()
    run, decode = tmp_path / 'killed', reading.read_image

    def read_image(file: Any, mode: str | None) -> Any:
        if get_worker_info() is not None and list(run.glob('state/epoch-*')):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(file, mode)

    with monkeypatch.context() as patched:
        patched.setattr(reading, 'read_image', read_image)
        ended = script('train.py', *words, '--experiment', 'killed')
    (line,) = [line for line in ended.err.splitlines() if 'error' in line]
    assert ended.code == 1 and 'Traceback' not in ended.err
    assert line.startswith('train.py: error: a data loading process (pid ') and "signal 'Killed'" in line
    assert not (run / 'summary.csv').read_text().count('\n') > 2  # the header and the epoch that is done
    forget_processes()
    ended = script('train.py', *words, '--experiment', 'killed', '--resume', 'auto')
    assert ended.code == 0, ended.err
    assert (run / 'summary.csv').read_text() == (tmp_path / 'whole' / 'summary.csv').read_text()
    one, other = (load_file(tmp_path / name / 'last.safetensors') for name in ('whole', 'killed'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
