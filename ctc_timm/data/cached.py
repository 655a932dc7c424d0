"""Decoded images kept in memory: after one pass over the files an epoch costs its augmentation alone.

Pixels lie one image after the other in one shared tensor, so that loader processes see the same copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageMode
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..utils.errors import UserError
from .arrays import CropAndFlip, on_arrays
from .indexed import IndexedDataset

_SHARE = 0.8  # of the memory that is free
_SAMPLE = 64  # images that the size is estimated from


class CachedDataset(Dataset):
    """A map-style dataset of decoded images, [height, width, channels] each, of any sizes.

    Args:
        pixels: All images' values one after the other, uint8.
        shapes_N3: Height, width and channels of each image.
        targets_N: Class of each image.
        delivered_N: Which image it is: where one can't be read, timm's readers give the next.
        mode: PIL mode of the images.
        unread: File and reason of each image that can't be read.

    Attributes:
        with_index: Whether a sample names the image delivered, as its third part.
        reasons: Why an image can't be read.
    """

    def __init__(
        self,
        pixels: Tensor,
        shapes_N3: Tensor,
        targets_N: Tensor,
        delivered_N: Tensor,
        mode: str,
        unread: dict[int, tuple[str, str]],
    ) -> None:
        self._transform: Callable[[Any], Any] | None = None
        self.with_index = False
        self._pixels = pixels  # the tensor, which loader processes share
        self._values = pixels.numpy()
        self._shapes = shapes_N3
        self._sizes = {tuple(shape) for shape in shapes_N3.unique(dim=0).tolist()}
        self._ends = shapes_N3.prod(dim=1).cumsum(0)
        self._targets = targets_N
        self._delivered = delivered_N
        self._mode = mode
        self._names = {index: name for index, (name, _) in unread.items()}
        self.reasons = {index: reason for index, (_, reason) in unread.items()}

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """Of a PIL image, or the same on arrays."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self._transform = transform

    def on_arrays(self, size: tuple[int, int]) -> None:
        """Let the transform run on arrays where it can do so without a difference.

        Args:
            size: Height and width that it gives.
        """
        faster = on_arrays(self._transform, size)
        if faster is not None and all(faster.fits(height, width) for height, width, _ in self._sizes):
            self._transform = faster

    def __len__(self) -> int:
        return len(self._targets)

    def filename(self, index: int) -> str | None:
        """Of an image that can't be read."""
        return self._names.get(index)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != '_values'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _values=state['_pixels'].numpy())

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        height, width, channels = self._shapes[index].tolist()
        end = int(self._ends[index])
        array = self._values[end - height * width * channels : end].reshape(height, width, channels)
        if isinstance(self.transform, CropAndFlip):
            image: Any = self.transform(array)
        else:
            image = Image.frombuffer(self._mode, (width, height), array, 'raw', self._mode, 0, 1)
            image = image if self.transform is None else self.transform(image)
        sample = (image, int(self._targets[index]))
        return (*sample, int(self._delivered[index])) if self.with_index else sample


def cache_images(dataset: Any, quiet: bool = False) -> CachedDataset:
    """Decode every image of a dataset once.

    Args:
        dataset: timm's `ImageDataset`, or any map-style dataset of (PIL image, target) with a `transform`.
        quiet: Show no progress bar.

    Returns:
        The same samples from memory, without a transform.

    Raises:
        UserError: More than most of the free memory would be needed, or images that can't be read.
    """
    indexed = IndexedDataset(dataset)
    indexed.transform = _Decoded
    count = len(indexed)
    spread = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)
    needed = count * float(np.mean([indexed[int(i)][0].nbytes for i in spread]))
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        raise UserError(
            f'--cache-dataset: the {count:,} decoded images would take about {needed / 2**30:.1f} GiB and '
            f'{free / 2**30:.1f} GiB are free; leave the flag out'
        )
    arrays, rows = [], []
    bar = tqdm(range(count), 'decode', leave=False, disable=quiet, mininterval=0.2 if sys.stderr.isatty() else 60)
    for i in bar:
        array, row_3 = indexed[i]
        arrays.append(array)
        rows.append(row_3)
    modes = {array.mode for array in arrays}
    if len(modes) != 1:
        raise UserError(
            f'--cache-dataset: images of the modes {", ".join(sorted(modes))}; name one by --input-img-mode'
        )
    shapes = torch.tensor([array.shape for array in arrays])
    pixels = torch.empty(int(shapes.prod(dim=1).sum()), dtype=torch.uint8).share_memory_()
    np.concatenate([array.values for array in arrays], out=pixels.numpy())
    targets_N, delivered_N, _ = torch.stack(rows).unbind(dim=1)
    unread = {i: (indexed.name(i), indexed.reason(i)) for i in indexed.unread()}
    return CachedDataset(pixels, shapes, targets_N.clone(), delivered_N.clone(), modes.pop(), unread)


class _Decoded:
    """A PIL image's values, flat, with its shape and mode."""

    def __init__(self, image: Image.Image) -> None:
        if ImageMode.getmode(image.mode).typestr != '|u1':
            raise UserError(f'--cache-dataset: images of mode {image.mode}, but only 8-bit ones are kept; leave it out')
        array = np.array(image, dtype=np.uint8)
        self.shape = (*array.shape, 1)[:3]
        self.values = array.reshape(-1)
        self.nbytes = array.nbytes
        self.mode = image.mode
