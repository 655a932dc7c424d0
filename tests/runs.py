"""What tests of runs share by name; fixtures are in conftest.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from ctc_timm.data.digits import DigitsReader

ROOT = Path(__file__).resolve().parents[1]
_TINY = """
--dataset digits --train-split train[:128] --val-split validation[:70] --model test_resnet --img-size 16 --mean 0.3
--std 0.4 -b 32 -j 0 --num-negatives 16 --lr 0.01 --smoothing 0.0
"""
TINY = _TINY.split()  # a training run of a second an epoch
# What a model says about its images, for loaders without one.
CONFIG = {
    'input_size': (3, 16, 16),
    'mean': (0.3,) * 3,
    'std': (0.4,) * 3,
    'interpolation': 'bilinear',
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


def forget_processes() -> None:
    """Let the next run see its processes and precision anew."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


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


@dataclass
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str
