"""Decoded images kept in memory: after one pass over the files an epoch costs its augmentation alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageMode
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

from ..utils.errors import UserError
from .datasets import DatasetSplit
from .decoding import ReadError, ReplacingDataset

_SHARE = 0.8  # of the memory that is free
_SAMPLE = 64  # images that the size is estimated from
# Drawn alike for tensors and for PIL images, with the same pixels, and several times faster for tensors.
_SAME_ON_TENSORS = (
    transforms.RandomCrop,
    transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip,
    MaybePILToTensor,
)


class CachedDataset(Dataset):
    """A map-style dataset of decoded images of any sizes, one after the other in one tensor that processes share.

    Args:
        source: The dataset that was decoded; it knows the images' names.
        arrays: Each image, uint8 [height, width, channels]; emptied. None for one that can't be read.
        targets: Class of each image.
        mode: PIL mode of the images.
        reasons: Why an image can't be read, by index.
    """

    def __init__(
        self, source: Any, arrays: list[np.ndarray | None], targets: list[int], mode: str, reasons: dict[int, str]
    ) -> None:
        self.transform: Callable[[Any], Any] | None = None
        self.reader = getattr(source, 'reader', source)
        self._max_retries = getattr(source, '_max_retries', 10)
        self._shapes = [(0, 0, 0) if array is None else array.shape for array in arrays]
        self._ends = np.cumsum([math.prod(shape) for shape in self._shapes]).tolist()
        self._pixels = torch.empty(self._ends[-1], dtype=torch.uint8).share_memory_()
        for end in reversed(self._ends):  # frees the images on the way
            if (array := arrays.pop()) is not None:
                self._pixels.numpy()[end - array.size : end] = array.reshape(-1)
        self._targets, self._mode, self._reasons = targets, mode, reasons
        self._on_tensors = False

    def use_tensors_if_possible(self) -> None:
        """Transform tensors in place of PIL images where the result is the same to the bit."""
        steps = getattr(self.transform, 'transforms', [self.transform])
        self._on_tensors = all(isinstance(step, _SAME_ON_TENSORS) for step in steps)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self._reasons:
            raise ReadError(self._reasons[index])
        height, width, channels = self._shapes[index]
        end = self._ends[index]
        image: Any = self._pixels[end - height * width * channels : end].view(height, width, channels)
        if self._on_tensors:
            image = image.permute(2, 0, 1)
        else:
            image = Image.frombuffer(self._mode, (width, height), image.numpy(), 'raw', self._mode, 0, 1)
        return image if self.transform is None else self.transform(image), self._targets[index]


def cache_split(source: DatasetSplit, quiet: bool = False) -> DatasetSplit:
    """Decode every image of a split once.

    Args:
        source: Its dataset is timm's `ImageDataset`, or any map-style dataset of (PIL image, target).
        quiet: Show no progress bar.

    Returns:
        The same split from memory, without a transform.

    Raises:
        UserError: A stream, images that are not 8-bit or are of several modes, or not enough memory.
    """
    if source.labels_N is None:
        raise UserError(f'`cache_dataset`: {source.name} is a stream, of which nothing is kept; leave it out')
    dataset = ReplacingDataset(source.dataset)
    dataset.transform = None
    count = len(dataset)
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()
    needed = count * float(np.mean([np.asarray(dataset.read(i)[0]).nbytes for i in sample]))
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        raise UserError(
            f'`cache_dataset`: the {count:,} decoded images would take about {needed / 2**30:.1f} GiB and '
            f'{free / 2**30:.1f} GiB are free; leave it out'
        )
    arrays: list[np.ndarray | None] = []
    targets, modes, reasons = source.labels_N.tolist(), set(), {}
    for i in tqdm(range(count), 'decode', leave=False, disable=quiet, mininterval=0.2 if sys.stderr.isatty() else 60):
        try:
            image, targets[i] = dataset.decode(i)
        except ReadError as error:
            arrays.append(None)
            reasons[i] = str(error)
            continue
        if ImageMode.getmode(image.mode).typestr != '|u1':
            raise UserError(
                f'`cache_dataset`: only 8-bit images are kept, not those of mode {image.mode}; leave it out'
            )
        modes.add(image.mode)
        arrays.append(np.atleast_3d(np.array(image, dtype=np.uint8)))
    if len(modes) > 1:
        raise UserError(f'`cache_dataset`: images of modes {", ".join(sorted(modes))}; name one by `input_img_mode`')
    return replace(source, dataset=CachedDataset(source.dataset, arrays, targets, modes.pop(), reasons))
