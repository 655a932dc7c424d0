"""Processes that load data and die or fail: one line, a code, and a run that can be continued."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ctc_timm.data import decoding
from ctc_timm.data.datasets import open_split
from ctc_timm.data.decoding import WorkerError, fetch_batches, translate_errors
from ctc_timm.data.loaders import TrainLoader, create_eval_loader
from ctc_timm.data.settings import AugmentationSettings, DataSettings, LoaderSettings
from ctc_timm.utils.errors import UserError
from runs import CONFIG, Ended, forget_processes

CPU = torch.device('cpu')
DIGITS = DataSettings(dataset='digits')
SMALL = LoaderSettings(batch_size=8, workers=2)


def create_train_loader() -> TrainLoader:
    dataset = open_split(DIGITS, 'train[:64]').dataset
    return TrainLoader(dataset, SMALL, AugmentationSettings(), CONFIG, CPU, 42)


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
    raise LookupError('the reason')


def refusing() -> None:
    raise UserError('`setting` 3: use 4')


ENDS = {
    'KILL': (killed(signal.SIGKILL), 'killed by signal: Killed; if memory or shared memory ran out'),
    'BUS': (killed(signal.SIGBUS), 'killed by signal: Bus error'),
    'SEGV': (killed(signal.SIGSEGV), 'killed by signal: Segmentation fault'),
    'exit 3': (lambda: os._exit(3), 'exited unexpectedly with exit code 3'),
    'exit 0': (lambda: os._exit(0), 'exited unexpectedly'),
    'exception': (failing, 'a data loading process failed with LookupError: the reason'),
    'refusal': (refusing, '`setting` 3: use 4'),
}


@pytest.mark.parametrize('end, message', ENDS.values(), ids=ENDS)
def test_every_end(end: Callable[[], Any], message: str) -> None:
    """Of a real process, told in a line, within the seconds that PyTorch waits for a batch."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        list(fetch_batches(DataLoader(Dying(end), batch_size=4, num_workers=2)))
    assert type(error.value) is (UserError if end is refusing else WorkerError) and time.monotonic() - started < 10
    assert message in str(error.value) and 'Traceback' not in str(error.value) and '\n' not in str(error.value)
    assert error.value.exit_code == (2 if end is refusing else 1)


def test_other_errors_pass() -> None:
    """What the program itself raises keeps its kind and traceback."""
    for error in (RuntimeError('shapes differ'), ValueError(), KeyError('loss')):
        with pytest.raises(type(error)) as caught, translate_errors():
            raise error
        assert caught.value is error


@pytest.mark.parametrize('kind', ['train', 'validation'])
@pytest.mark.parametrize('end, words', [(ENDS['KILL'][0], 'signal: Killed'), (failing, '.png: its transforms fail')])
def test_both_loaders(kind: str, end: Callable[[], Any], words: str) -> None:
    """A process that is killed, and one whose transforms fail on an image."""
    batches: Any = create_train_loader()
    if kind == 'validation':
        batches = create_eval_loader(open_split(DIGITS, 'train[:64]').dataset, SMALL, CONFIG, CPU)
    dataset = batches._indexed if kind == 'train' else batches.dataset
    dataset.transform = lambda image: end()
    with pytest.raises(UserError) as error:
        list(batches)
    assert words in str(error.value)


def test_a_death_that_the_program_is_not_waiting_for() -> None:
    """PyTorch raises it wherever the program is just then."""
    loader, reached = create_train_loader(), False
    with pytest.raises(WorkerError, match='killed by signal: Killed'), translate_errors():
        for _ in loader:
            workers: Any = loader.loader.loader._iterator._workers
            os.kill(workers[0].pid, signal.SIGKILL)
            time.sleep(10)
            reached = True
    assert not reached


def test_a_run_goes_on_after_a_worker_died(
    script: Callable[..., Ended], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch: one line, exit code 1; continued, it ends as if nothing had been."""
    words = [*tiny, *f'-j 1 --epochs 2 --temporal-start-epoch 1 --output {tmp_path} --experiment'.split()]
    assert script('train.py', *words, 'whole').code == 0
    run, decode = tmp_path / 'killed', decoding.read_image

    def read_image(file: Any, mode: str | None) -> Any:
        if get_worker_info() is not None and list(run.glob('state/epoch-*')):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(file, mode)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, 'read_image', read_image)
        forget_processes()
        ended = script('train.py', *words, 'killed')
    (line,) = [line for line in ended.err.splitlines() if 'error' in line]
    assert ended.code == 1 and 'Traceback' not in ended.err
    assert line.startswith('train.py: error: DataLoader worker (pid ') and 'signal: Killed' in line
    assert not (run / 'summary.csv').read_text().count('\n') > 2  # the header and the epoch that is done
    forget_processes()
    assert script('train.py', *words, 'killed', '--resume', 'auto').code == 0
    assert (run / 'summary.csv').read_text() == (tmp_path / 'whole' / 'summary.csv').read_text()
    one, other = (load_file(tmp_path / name / 'last.safetensors') for name in ('whole', 'killed'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
