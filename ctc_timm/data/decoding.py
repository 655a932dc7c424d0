"""Images as they are read: what timm's dataset does, and an account of those that can't be read.

As in timm the next image stands in for one that can't be read. timm lets pass no more than the system's own errors;
here whatever a damaged file raises counts, a decompression bomb too. Which ones they were is kept in memory that
loader processes share, so that the program can name each file once, whoever read it.
"""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageMode, UnidentifiedImageError
from timm.data import ImageDataset
from torch.utils.data import Dataset
from tqdm import tqdm

from ..utils.errors import RunError, UserError, one_line
from ..utils.text import sanitize
from .workers import is_death

_LONGEST = 1000  # times the shorter side; sized to 224 pixels such an image has 150 MB
_NAMED = 5
_FOUND, _TOLD = 1, 2
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine; no fault of the image
_DAMAGE = (OSError, SyntaxError, Image.DecompressionBombError)  # what PIL raises first of all


class UnreadableError(UserError):
    """Too many images in a row can't be read."""


class ReadError(OSError):
    """An image that can't be read, and why."""


def read_image(file: IO[bytes], mode: str | None) -> Image.Image:
    """Decode an image whole.

    As PIL and so timm do: the first frame of an animation, the palette's colors without their transparency, no
    turning by Exif. Other than there, 16-bit gray keeps its contrast when it becomes 8-bit, by its high byte; PIL
    would make all but its darkest values white.

    Args:
        file: Closed afterwards.
        mode: PIL mode to convert to; None for the file's own.

    Raises:
        ReadError: Anything that is wrong with the file.
    """
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL's, about transparency, metadata and sizes it still reads
            image: Image.Image = Image.open(file)
            short, long = sorted(image.size)
            if long > _LONGEST * short:
                raise ReadError(f'{image.width}x{image.height} pixels, one side is over {_LONGEST} times the other')
            image.load()
            if mode and ImageMode.getmode(mode).typestr == '|u1':
                image = _in_eight_bits(image)
            return image.convert(mode) if mode else image
    except Exception as error:
        raise _unreadable(error) from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray by its high byte, as PIL itself reads 16-bit colors."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):  # by version of PIL
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image


def _unreadable(error: Exception) -> Exception:
    """The error as one about the file, unless it is one about the machine or already told."""
    if isinstance(error, (ReadError, MemoryError, UserError)) or is_death(error):
        return error
    if isinstance(error, OSError) and error.errno in _SHORTAGE:
        return RunError(f'{error.strerror} while an image was opened; try fewer --workers')
    if isinstance(error, UnidentifiedImageError):
        return ReadError('no image that PIL knows')
    return ReadError(getattr(error, 'strerror', None) or one_line(error))


class NamingDataset(Dataset):
    """A map-style image dataset that goes on after an unreadable image, and can say which those were.

    Create it before the loader processes are.

    Args:
        dataset: timm's `ImageDataset`, or any map-style dataset of (image, target) with a `transform`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._unread_N = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    @property
    def transform(self) -> Any:
        """The image transform; timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.read(index)[:2]

    def read(self, index: int) -> tuple[Any, Any, int]:
        """The image, or the next that can be read.

        Returns:
            Image, target, and which image it is.

        Raises:
            UnreadableError: As many in a row as timm gives up after.
            UserError: The transforms fail on the image.
        """
        tries = getattr(self.dataset, '_max_retries', 10)
        reasons = []
        for place in range(index, index + tries):
            delivered = place % len(self.dataset)
            try:
                image, target, *rest = self._decoded(delivered)
            except _DAMAGE as error:
                reasons.append(one_line(error))
                self._note(delivered)
                continue
            return self._transformed(image, delivered), target, rest[0] if rest else delivered
        raise UnreadableError(
            f'{self.name(index)}: unreadable ({reasons[0]}), and so are those that follow, {tries} consecutive images'
        )

    def _decoded(self, index: int) -> tuple[Any, ...]:
        """Image and target, and which image it is where the dataset itself knows."""
        dataset = self.dataset
        if not isinstance(dataset, ImageDataset):
            return dataset[index]
        try:
            file, target, *_ = dataset.reader[index]
        except Exception as error:
            raise _unreadable(error) from error
        image = read_image(file, dataset.input_img_mode)
        if target is not None and dataset.target_transform is not None:
            target = dataset.target_transform(target)
        return image, -1 if target is None else target

    def _transformed(self, image: Any, index: int) -> Any:
        if not isinstance(self.dataset, ImageDataset) or self.dataset.transform is None:
            return image
        try:
            return self.dataset.transform(image)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if is_death(error):
                raise
            what = f'its transforms fail with {type(error).__name__}: {one_line(error)}'
            raise UserError(f'{self.name(index)}: {what}') from error

    def _note(self, index: int) -> None:
        if not self._unread_N[index]:
            self._unread_N[index] = _FOUND

    def name(self, index: int) -> str:
        """An image's file, or its number where it has none."""
        reader = getattr(self.dataset, 'reader', self.dataset)
        try:
            name = reader.filename(index) if hasattr(reader, 'filename') else reader.samples[index][0]
        except (AttributeError, AssertionError, TypeError, KeyError):  # of a reader or a sample without names
            name = None
        root = getattr(reader, 'root', None) if hasattr(reader, 'samples') else None
        return str(Path(root or '') / name) if name else f'image {index}'

    def reason(self, index: int) -> str:
        """What is wrong with an image, found by reading it once more."""
        known = getattr(self.dataset, 'reasons', {}).get(index)  # of decoded images
        if known is not None:
            return known
        try:
            self._decoded(index)
        except _DAMAGE as error:
            return one_line(error)
        return 'only at times'

    def unread(self) -> list[int]:
        """The images found unreadable so far, by this process and its workers."""
        return self._unread_N.nonzero().flatten().tolist()

    def tell_unread(self) -> list[str]:
        """Print a line about the unreadable images that were not told of yet.

        Returns:
            The names of all of them.
        """
        index = (self._unread_N == _FOUND).nonzero().flatten().tolist()
        self._unread_N[index] = _TOLD
        if index:
            named = ', '.join(f'{self.name(i)} ({self.reason(i)})' for i in index[:_NAMED])
            more = f' and {len(index) - _NAMED:,} more' if len(index) > _NAMED else ''
            images = '1 image' if len(index) == 1 else f'{len(index):,} images'
            line = f"{images} can't be read, the next one stands in: {named}{more}"
            tqdm.write(sanitize(line), file=sys.stderr)
        return [self.name(i) for i in index]
