"""What the training tests share: flags as the scripts read them, tiny image folders, runs in this process."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from ctc_timm.arguments import Parser, parse
from ctc_timm.data.digits import DigitsReader
from ctc_timm.training.flags import add_arguments

# Two test processes share two cores: a thread each, in the processes they start too.
os.environ.setdefault('OMP_NUM_THREADS', '1')
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    '--dataset',
    'digits',
    '--train-split',
    'train[:128]',
    '--val-split',
    'validation[:70]',
    '--model',
    'test_resnet',
    '--img-size',
    '16',
    '--mean',
    '0.3',
    '--std',
    '0.4',
    '-b',
    '32',
    '-j',
    '0',
    '--num-negatives',
    '16',
    '--lr',
    '0.01',
    '--smoothing',
    '0.0',
]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its state in the process; each test gets its own, in the repository's folder."""
    monkeypatch.chdir(ROOT)
    forget_processes()


def forget_processes() -> None:
    """Let the next run see its processes and precision anew."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope='session')
def flags() -> Callable[..., argparse.Namespace]:
    """All flags of a training run, read from words or lines of words."""

    def read(*words: str) -> argparse.Namespace:
        parser = Parser()
        add_arguments(parser)
        return parse(parser, ' '.join(words).split())

    return read


@pytest.fixture(scope='session')
def tiny() -> list[str]:
    """The words of a training run that takes a second an epoch."""
    return list(TINY)


def write_folder(folder: Path, split: str, per_class: int, classes: int = 3) -> list[tuple[str, int]]:
    """Digits as class folders of 32x32 PNG files; the (path, label) pairs that were written, sorted by path."""
    reader = DigitsReader(split)
    written: list[tuple[str, int]] = []
    for pixels, label in zip(reader.images, reader.labels.tolist()):
        count = sum(known == label for _, known in written)
        if label >= classes or count >= per_class:
            continue
        file = folder / f'class{label}' / f'{count:03d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((32, 32)).convert('RGB').save(file)
        written.append((str(file), label))
    return sorted(written)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with train/ and validation/, three classes of 12 and of 5 images."""
    write_folder(tmp_path / 'images' / 'train', 'train', 12)
    write_folder(tmp_path / 'images' / 'validation', 'validation', 5)
    return tmp_path / 'images'


@dataclass
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str


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
