"""Decoding of images: unreadable ones are replaced by the next and named, and workers' errors become one line.

As in timm the next image replaces an unreadable one. timm replaces only after the system's own errors; here whatever
a damaged file raises counts, a decompression bomb too.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageMode, UnidentifiedImageError
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..utils.errors import RunError, UserError, one_line
from ..utils.text import sanitize

logger = logging.getLogger(__name__)  # not Accelerate's: every process names the images that it read

T = TypeVar('T')

_LARGEST_ASPECT = 1000  # sized to 224 pixels such an image has 150 MB
_NAMED = 5  # unreadable images named in a log line
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine; no fault of the image
_DAMAGE = (OSError, SyntaxError, Image.DecompressionBombError)  # what PIL itself raises first
_FOUND, _LOGGED = 1, 2


class UnreadableError(UserError):
    """Too many images in a row can't be read."""


class WorkerError(RunError):
    """A process that loads data died or failed."""


class ReadError(OSError):
    """An image can't be read. The message says why."""


def read_image(file: IO[bytes], mode: str | None) -> Image.Image:
    """Decode an image completely, and close the file.

    As in PIL and timm, the first frame of an animation counts, a palette's transparency is dropped, and Exif does not
    turn the image. Unlike there, 16-bit gray keeps its contrast when it becomes 8-bit: its high byte is taken, where
    PIL would clip nearly everything to white.

    Args:
        file: Open file.
        mode: PIL mode to convert to; None for the file's own.

    Raises:
        ReadError: Anything that is wrong with the file.
    """
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL's, about transparency, metadata and sizes it still reads
            image: Image.Image = Image.open(file)
            short, long = sorted(image.size)
            if long > _LARGEST_ASPECT * short:
                raise ReadError(
                    f'{image.width}x{image.height} pixels, one side is over {_LARGEST_ASPECT} times the other'
                )
            image.load()
            deep = image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG')  # by version of PIL
            if deep and mode and ImageMode.getmode(mode).typestr == '|u1':
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert(mode) if mode else image
    except Exception as error:
        raise _as_read_error(error) from error


def _as_read_error(error: Exception) -> Exception:
    """Make a `ReadError` of an error, unless it is about the machine or is for the user already."""
    if isinstance(error, (ReadError, MemoryError, UserError)) or _is_death(error):
        return error
    if isinstance(error, OSError) and error.errno in _SHORTAGE:
        return RunError(f'{error.strerror} while an image was opened; try fewer `workers`')
    if isinstance(error, UnidentifiedImageError):
        return ReadError('no image that PIL knows')
    return ReadError(getattr(error, 'strerror', None) or one_line(error))


class ReplacingDataset(Dataset):
    """A map-style image dataset that replaces an unreadable image by the next, and names those it replaced.

    Which ones they were is kept in memory that loader processes share, so create it before they start.

    Args:
        dataset: timm's `ImageDataset`, or any map-style dataset of (image, target) with a `transform`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._unreadable_N = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

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
        """Read an image, or the next that can be read.

        Returns:
            Image, target, and the index of the image delivered.

        Raises:
            UnreadableError: As many in a row can't be read as timm gives up after.
            UserError: The transforms fail on the image.
        """
        tries = getattr(self.dataset, '_max_retries', 10)
        reasons = []
        for place in range(index, index + tries):
            delivered = place % len(self.dataset)
            try:
                image, target = self.decode(delivered)
            except _DAMAGE as error:
                reasons.append(one_line(error))
                self._unreadable_N[delivered].clamp_(min=_FOUND)
                continue
            return self._transformed(image, delivered), target, delivered
        raise UnreadableError(
            f'{self.name(index)}: unreadable ({reasons[0]}), and so are those that follow, {tries} consecutive images'
        )

    def decode(self, index: int) -> tuple[Any, Any]:
        """Read image and target; the image of an `ImageDataset` without its transform.

        Raises:
            ReadError: The image can't be read.
        """
        dataset = self.dataset
        if not isinstance(dataset, ImageDataset):
            return dataset[index]
        try:
            file, target, *_ = dataset.reader[index]
        except Exception as error:
            raise _as_read_error(error) from error
        return read_image(file, dataset.input_img_mode), -1 if target is None else target

    def _transformed(self, image: Any, index: int) -> Any:
        if not isinstance(self.dataset, ImageDataset) or self.dataset.transform is None:
            return image
        try:
            return self.dataset.transform(image)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if _is_death(error):
                raise
            reason = f'its transforms fail with {type(error).__name__}: {one_line(error)}'
            raise UserError(f'{self.name(index)}: {reason}') from error

    def name(self, index: int) -> str:
        """The image's file, or its number where it has none."""
        reader = getattr(self.dataset, 'reader', self.dataset)
        try:
            name = reader.filename(index) if hasattr(reader, 'filename') else reader.samples[index][0]
        except (AttributeError, AssertionError, TypeError, KeyError):  # of a reader or a sample without names
            name = None
        root = getattr(reader, 'root', None) if hasattr(reader, 'samples') else None
        return str(Path(root or '') / name) if name else f'image {index}'

    def reason(self, index: int) -> str:
        """What is wrong with an image, found by reading it once more."""
        try:
            self.decode(index)
        except _DAMAGE as error:
            return one_line(error)
        return 'only at times'

    def unreadable(self) -> list[int]:
        """Indices of the images found unreadable so far, by this process and its workers."""
        return self._unreadable_N.nonzero().flatten().tolist()

    def log_unreadable(self) -> list[str]:
        """Log a line about the unreadable images that were not logged yet.

        Returns:
            The names of all of these.
        """
        index = (self._unreadable_N == _FOUND).nonzero().flatten().tolist()
        self._unreadable_N[index] = _LOGGED
        if index:
            named = ', '.join(f'{self.name(i)} ({self.reason(i)})' for i in index[:_NAMED])
            more = f' and {len(index) - _NAMED:,} more' if len(index) > _NAMED else ''
            images = '1 image is' if len(index) == 1 else f'{len(index):,} images are'
            logger.warning('%s', sanitize(f'{images} unreadable and replaced by the next: {named}{more}'))
        return [self.name(i) for i in index]


def fetch_batches(loader: Iterable[T]) -> Iterator[T]:
    """Iterate over PyTorch's loader.

    Raises:
        WorkerError: A worker died, or raised what is no `UserError`.
        UserError: A worker's own, without its traceback.
    """
    with translate_errors():
        try:
            yield from loader
        except (OSError, EOFError) as error:
            # Fetching from a dying worker fails before PyTorch hears of the death, which it then raises out of sleep.
            if not _is_from_worker(error):
                time.sleep(2)
                raise WorkerError(f'batches could not be fetched: {one_line(error)}') from error
            raise


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn PyTorch's errors about its workers into errors of one line.

    PyTorch raises a worker's death wherever the program happens to be, so it can come out of code that loads nothing.

    Raises:
        WorkerError: A worker died, or raised what is no `UserError`.
        UserError: A worker's own, without its traceback.
    """
    try:
        yield
    except Exception as error:
        if _is_death(error):
            multiprocessing.active_children()  # joins the dead, which PyTorch would otherwise report again
            first: BaseException = error
            while (link := first.__cause__ or first.__context__) is not None and _is_death(link):
                first = link  # which knows the signal
            raise WorkerError(f'{one_line(first)}; if memory ran out, try fewer `workers`') from error
        if not _is_from_worker(error):
            raise
        last_line = str(error.args[0]).strip().splitlines()[-1]
        if isinstance(error, UserError):
            raise type(error)(last_line.partition(': ')[2]) from None
        raise WorkerError(f'a data loading process failed with {last_line}') from error


# PyTorch has no types for these two: a death is a RuntimeError, and a worker's error comes as one of the same type
# whose message holds the traceback.
def _is_death(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker (pid')


def _is_from_worker(error: BaseException) -> bool:
    return (
        bool(error.args) and re.match(r'Caught \w+ in (DataLoader worker|pin memory)', str(error.args[0])) is not None
    )
