"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8x8 pixels, as a timm image dataset.

It needs no download, so the commands use it when no data are named.
"""

from __future__ import annotations

import io
import re
from functools import lru_cache

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader

from ..utils.errors import UserError

NAME = 'digits'
NUM_CLASSES = 10
_SLICE = re.compile(r'(train|validation|val|valid|eval|test)(?:\[(\d*%?):(\d*%?)\])?')


@lru_cache
def _load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels of the training and of the validation split, a fixed, stratified 80:20."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    split = {'test_size': 0.2, 'stratify': digits.target, 'random_state': 0}
    train_x, val_x, train_y, val_y = train_test_split(images, digits.target, **split)
    return train_x, train_y, val_x, val_y


class DigitsReader(Reader):
    """timm reader over the digits, images as PNG bytes.

    A split is 'train', or 'validation' or a synonym, with an optional slice as in 'train[:500]' or 'train[50%:]'.
    Another one, or an empty slice, is a `UserError`.
    """

    def __init__(self, split: str = 'train') -> None:
        super().__init__()
        match = _SLICE.fullmatch(split)
        if match is None:
            known = "'train' or 'validation', or a slice of one as in 'train[:500]'"
            raise UserError(f'`dataset` digits: split {split!r} does not exist; use {known}')
        name, start, stop = match.groups()
        images, labels = _load()[:2] if name == 'train' else _load()[2:]
        part = slice(_position(start, len(labels)), _position(stop, len(labels)))
        self.images, self.labels = images[part], labels[part]
        if not len(self.labels):
            raise UserError(f'`dataset` digits: split {split!r} is empty')
        self.targets = self.labels.tolist()
        self.class_to_idx = {str(digit): digit for digit in range(NUM_CLASSES)}

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, format='PNG', compress_level=0)
        file.seek(0)
        return file, self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index:04d}.png'


def _position(text: str | None, length: int) -> int | None:
    if not text:
        return None
    return round(length * int(text[:-1]) / 100) if text.endswith('%') else int(text)
