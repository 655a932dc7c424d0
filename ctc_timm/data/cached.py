"""Decoded images kept in memory: after one pass over the files an epoch costs its augmentation alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageMode
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

from ..utils.errors import UserError, one_line
from .datasets import DatasetSplit
from .decoding import DAMAGE, ReadError, ReplacingDataset

_SHARE = 0.8  # of the memory that is free
_SAMPLE = 64  # images that the size is estimated from


class CachedDataset(Dataset):
    """A map-style dataset of decoded images of any sizes, one after the other in one tensor that processes share.

    Args:
        source: The dataset that was decoded; it knows the images' names.
        arrays: uint8 [height, width, channels], or None for an image that can't be read. The list is emptied.
        targets, mode, reasons: Classes, PIL mode, and by index why an image can't be read.
    """

    def __init__(
        self, source: Any, arrays: list[np.ndarray | None], targets: list[int], mode: str, reasons: dict[int, str]
    ) -> None:
        self.reader = getattr(source, 'reader', source)
        self._max_retries = getattr(source, '_max_retries', 10)
        self._shapes_N3 = np.array([(0, 0, 0) if array is None else array.shape for array in arrays])
        self._ends_N = self._shapes_N3.prod(axis=1).cumsum()
        self._pixels = torch.empty(int(self._ends_N[-1]), dtype=torch.uint8).share_memory_()
        for end in self._ends_N[::-1]:
            if (array := arrays.pop()) is not None:  # freed at once
                self._pixels.numpy()[end - array.size : end] = array.reshape(-1)
        self._targets, self._mode, self._reasons = np.array(targets), mode, reasons
        self._as_arrays = False

    def faster_transform(self, transform: transforms.Compose) -> Callable[[Any], Any]:
        """Deliver arrays where the transform is a padded crop with or without a flip, and return its faster like."""
        steps = transform.transforms
        kinds = [type(step) for step in steps]
        crop, flip, last = transforms.RandomCrop, transforms.RandomHorizontalFlip, MaybePILToTensor
        sizes_N2 = self._shapes_N3[self._shapes_N3[:, 2] > 0, :2]
        if kinds not in ([crop, flip, last], [crop, last]) or (sizes_N2 + 2 * steps[0].padding < steps[0].size).any():
            return transform  # of smaller images torchvision pads more
        self._as_arrays = True
        return partial(_crop_and_flip, steps[0].size, steps[0].padding, steps[1].p if len(steps) == 3 else 0)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self._reasons:
            raise ReadError(self._reasons[index])
        height, width, channels = self._shapes_N3[index].tolist()
        end = int(self._ends_N[index])
        image: Any = self._pixels.numpy()[end - height * width * channels : end].reshape(height, width, channels)
        if not self._as_arrays:
            image = Image.frombuffer(self._mode, (width, height), image, 'raw', self._mode, 0, 1)
        return image, int(self._targets[index])


def _crop_and_flip(size: tuple[int, int], padding: int, flip_probability: float, image_HWC: np.ndarray) -> Tensor:
    """Crop and flip as torchvision does, draw for draw: uint8 [H, W, C] to uint8 [C, height, width]."""
    rows, columns = (side + 2 * padding for side in image_HWC.shape[:2])
    padded = np.zeros((rows, columns, image_HWC.shape[2]), dtype=np.uint8)
    padded[padding : rows - padding, padding : columns - padding] = image_HWC
    top = left = 0
    if (rows, columns) != size:
        top = int(torch.randint(0, rows - size[0] + 1, size=(1,)))
        left = int(torch.randint(0, columns - size[1] + 1, size=(1,)))
    cropped = padded[top : top + size[0], left : left + size[1]]
    if flip_probability > 0 and torch.rand(1) < flip_probability:
        cropped = cropped[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(cropped.transpose(2, 0, 1)))


def cache_split(source: DatasetSplit, quiet: bool = False) -> DatasetSplit:
    """Decode every image of a split once: the same split from memory, without a transform.

    Raises:
        UserError: A stream, images that are not 8-bit and of one mode, or not enough memory.
    """
    if source.labels_N is None:
        raise UserError(f'`cache_dataset`: {source.name} is a stream, of which nothing is kept; leave it out')
    dataset = ReplacingDataset(source.dataset)
    count = len(dataset)
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()
    needed = count * float(np.mean([np.asarray(dataset.read(i)[0]).nbytes for i in sample])) / 2**30
    free = psutil.virtual_memory().available / 2**30
    if needed > _SHARE * free:
        memory = f'the {count:,} decoded images would take about {needed:.1f} GiB and {free:.1f} GiB are free'
        raise UserError(f'`cache_dataset`: {memory}; leave it out')
    arrays: list[np.ndarray | None] = []
    mode, reasons, targets = '', {}, source.labels_N.tolist()
    for i in tqdm(range(count), 'decode', leave=False, disable=quiet, mininterval=0.2 if sys.stderr.isatty() else 60):
        try:
            image, targets[i] = dataset.decode(i)
        except DAMAGE as error:
            arrays.append(None)
            reasons[i] = one_line(error)
            continue
        if ImageMode.getmode(image.mode).typestr != '|u1' or image.mode != (mode or image.mode):
            raise UserError(f'`cache_dataset`: only 8-bit images of one mode are kept, not {image.mode}; leave it out')
        mode = image.mode
        arrays.append(np.atleast_3d(np.array(image, dtype=np.uint8)))
    return replace(source, dataset=CachedDataset(source.dataset, arrays, targets, mode, reasons))
