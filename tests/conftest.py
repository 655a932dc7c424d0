"""What the training tests share: flags as the scripts read them, tiny image folders, runs in this process."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from ctc_timm.cli.flags import Parser, add_settings, read_flags
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.settings import build
from runs import ROOT, TINY, Ended, forget_processes, write_folder

pytest_plugins = ['hub_fixtures']
settings.register_profile(
    'same every time',
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile('same every time')

# Two test processes share two cores: a thread each, in the processes they start too.
os.environ.setdefault('OMP_NUM_THREADS', '1')
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its state in the process; each test gets its own, in the repository's folder."""
    monkeypatch.chdir(ROOT)
    forget_processes()


@pytest.fixture(scope='session')
def flags() -> Callable[..., Any]:
    """A command's settings, read from words or lines of words as its flags."""

    def read(*words: str, cls: type = TrainSettings) -> Any:
        parser = Parser()
        add_settings(parser, cls)
        return build(cls, read_flags(parser, cls, ' '.join(words).split()))

    return read


@pytest.fixture(scope='session')
def tiny() -> list[str]:
    """The words of a training run that takes a second an epoch."""
    return list(TINY)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with train/ and validation/, three classes of 12 and of 5 images."""
    write_folder(tmp_path / 'images' / 'train', 'train', 12)
    write_folder(tmp_path / 'images' / 'validation', 'validation', 5)
    return tmp_path / 'images'


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run train.py or validate.py as the interpreter would, in this process."""

    def run(name: str, *words: str) -> Ended:
        monkeypatch.setattr(sys, 'argv', [name, *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / name), run_name='__main__')
        captured = capfd.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run
