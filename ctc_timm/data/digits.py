"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8x8 pixels, as a timm image dataset.

It needs no download, so it is what the scripts and the tests run on when nothing else is named.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from ..utils.errors import UserError

NAME = 'digits'
NUM_CLASSES = 10
_EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'test')
_SLICE = re.compile(r'(?P<name>\w+)(\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?')


@lru_cache
def _load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels of the training and of the validation split, a fixed, stratified 80:20."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train_x, eval_x, train_y, eval_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return train_x, train_y, eval_x, eval_y


class DigitsReader(Reader):
    """timm reader over the digits, images as PNG bytes.

    Args:
        split: 'train', or 'validation' (also 'val', 'test'), with an optional slice as in 'train[:500]' or
            'train[50%:]'.

    Raises:
        UserError: A split that does not exist or is empty.
    """

    def __init__(self, split: str = 'train') -> None:
        super().__init__()
        match = _SLICE.fullmatch(split)
        name = match['name'] if match else None
        if match is None or name not in ('train', *_EVAL_SPLITS):
            raise UserError(
                f"split {split!r} of the digits does not exist; use 'train' or 'validation', "
                f"or a slice of one as in 'train[:500]'"
            )
        train_x, train_y, eval_x, eval_y = _load()
        images, labels = (train_x, train_y) if name == 'train' else (eval_x, eval_y)
        part = slice(_position(match['start'], len(labels)), _position(match['stop'], len(labels)))
        self.images, self.labels = images[part], labels[part]
        if not len(self.labels):
            raise UserError(f'split {split!r} of the digits is empty')
        self.class_to_idx = {str(digit): digit for digit in range(NUM_CLASSES)}

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, format='PNG', compress_level=0)
        file.seek(0)
        return file, int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)

    def iter_targets(self) -> Iterator[int]:
        """The labels in order, without the images."""
        return iter(self.labels.tolist())

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index:04d}.png'


def _position(text: str | None, length: int) -> int | None:
    if not text:
        return None
    return round(length * int(text[:-1]) / 100) if text.endswith('%') else int(text)


def create_digits(split: str, input_img_mode: str = 'RGB') -> ImageDataset:
    """The digits as timm's `ImageDataset`.

    Args:
        split: See `DigitsReader`.
        input_img_mode: PIL mode the images are converted to.
    """
    return ImageDataset(root=None, reader=DigitsReader(split), input_img_mode=input_img_mode)
