"""Decoding of images: unreadable ones are replaced by the next and named; workers' errors become one line.

As in timm the next image replaces an unreadable one. timm does so only after an error of the system; here whatever a
damaged file raises counts, a decompression bomb too.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageMode, UnidentifiedImageError
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..utils.errors import RunError, UserError, one_line
from ..utils.text import sanitize

logger = logging.getLogger(__name__)  # not Accelerate's: every process names the images that it read

_LARGEST_ASPECT = 1000  # sized to 224 pixels such an image has 150 MB
_NAMED = 5  # unreadable images named in a log line
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the machine; no fault of the image
DAMAGE = (OSError, SyntaxError, Image.DecompressionBombError)  # `ReadError`, or PIL's own out of other datasets
_FOUND, _LOGGED = 1, 2
T = TypeVar('T')


class UnreadableError(UserError):
    """Too many images in a row can't be read."""

    of_one_rank = True


class WorkerError(RunError):
    """A process that loads data died or failed."""

    of_one_rank = True


class ReadError(OSError):
    """An image can't be read. The message says why."""


def read_image(file: IO[bytes], mode: str | None) -> Image.Image:
    """Decode an image completely, convert it to a PIL mode unless that is None, and close the file.

    As in PIL and timm, the first frame of an animation counts, a palette's transparency is dropped, and Exif does not
    turn the image. Unlike there, 16-bit gray keeps its contrast when it becomes 8-bit: its high byte is taken, where
    PIL would clip nearly everything to white.

    Raises:
        ReadError: Anything that is wrong with the file.
    """
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL's, about transparency, metadata and sizes it still reads
            image: Image.Image = Image.open(file)
            if max(image.size) > _LARGEST_ASPECT * min(image.size):
                raise ReadError(f'{image.width}x{image.height}: a side is over {_LARGEST_ASPECT} times the other')
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

    Which ones they were is kept in memory that loader processes share, so create it before they start. The dataset is
    timm's `ImageDataset`, or any map-style one of (image, target); its own transform is dropped.
    """

    def __init__(self, dataset: Any) -> None:
        if getattr(dataset, 'transform', None) is not None:
            dataset.transform = None
        self.dataset = dataset
        self.transform: Callable[[Any], Any] | None = None  # timm's loader sets it
        self._unreadable_N = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.read(index)[:2]

    def read(self, index: int) -> tuple[Any, Any, int]:
        """Read an image, or the next that can be read: image, target, and the index of the image delivered.

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
            except DAMAGE as error:
                reasons.append(one_line(error))
                self._unreadable_N[delivered].clamp_(min=_FOUND)
                continue
            try:
                return image if self.transform is None else self.transform(image), target, delivered
            except Exception as error:
                if isinstance(error, (UserError, MemoryError)) or _is_death(error):
                    raise
                reason = f'its transforms fail with {type(error).__name__}: {one_line(error)}'
                raise UserError(f'{self.name(delivered)}: {reason}') from error
        fault = f'unreadable ({reasons[0]}), and so are those that follow, {tries} consecutive images'
        raise UnreadableError(f'{self.name(index)}: {fault}')

    def decode(self, index: int) -> tuple[Any, Any]:
        """Read an image, without the transform, and its target. Raises what `DAMAGE` holds."""
        if not isinstance(self.dataset, ImageDataset):
            image, target = self.dataset[index]
            mode = getattr(self.dataset, 'input_img_mode', None)  # of torchvision's, see `open_split`
            return image.convert(mode) if mode and isinstance(image, Image.Image) else image, target
        try:
            file, target, *_ = self.dataset.reader[index]
        except Exception as error:
            raise _as_read_error(error) from error
        relabel = self.dataset.target_transform or (lambda target: target)
        return read_image(file, self.dataset.input_img_mode), relabel(target)

    def name(self, index: int) -> str:
        """The image's file, or its number where it has none."""
        reader = getattr(self.dataset, 'reader', self.dataset)
        with suppress(AttributeError, TypeError):  # of a dataset, or a sample, without a file
            named = hasattr(reader, 'filename')
            if name := reader.filename(index, absolute=True) if named else reader.samples[index][0]:
                return str(name)
        return f'image {index}'

    def log_unreadable(self) -> list[str]:
        """Log a line about the images found unreadable since the last call, by workers too; return all their names."""
        index = (self._unreadable_N == _FOUND).nonzero().flatten().tolist()
        self._unreadable_N[index] = _LOGGED
        if index:
            named = ', '.join(f'{self.name(i)} ({self._reason(i)})' for i in index[:_NAMED])
            more = f' and {len(index) - _NAMED:,} more' if len(index) > _NAMED else ''
            images = '1 image is' if len(index) == 1 else f'{len(index):,} images are'
            logger.warning('%s', sanitize(f'{images} unreadable and replaced by the next: {named}{more}'))
        return [self.name(i) for i in index]

    def _reason(self, index: int) -> str:
        try:
            self.decode(index)  # once more, as a worker's error stays with the worker
            return 'only at times'
        except DAMAGE as error:
            return one_line(error)


def fetch_batches(loader: Iterable[T]) -> Iterator[T]:
    """Iterate over PyTorch's loader, with errors as of `translate_errors`."""
    try:
        with translate_errors():
            yield from loader
    except (OSError, EOFError) as error:  # not of a worker, but of the connection to one that is dying
        with translate_errors():
            time.sleep(2)  # PyTorch raises the death itself out of it
        raise WorkerError(f'a data loading process exited unexpectedly: {one_line(error)}') from error


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn PyTorch's errors about workers into a `WorkerError` of one line, or a worker's own `UserError`.

    PyTorch raises a worker's death wherever the program happens to be, even in code that loads nothing. What a worker
    itself raised comes as an error of the same type, with the traceback as its text.
    """
    try:
        yield
    except Exception as error:
        if _is_death(error):
            multiprocessing.active_children()  # joins the dead, which PyTorch would otherwise report again
            first: BaseException = error
            while (cause := first.__cause__ or first.__context__) is not None and _is_death(cause):
                first = cause  # it knows the signal
            text = one_line(first).rstrip('. ')
            raise WorkerError(f'{text}; if memory or shared memory ran out, try fewer `workers`') from error
        text = str(error.args[0]) if error.args else ''
        if not text.startswith('Caught '):
            raise
        message = text.strip().splitlines()[-1]
        if isinstance(error, UserError):
            raise type(error)(message.partition(': ')[2]) from None
        raise WorkerError(f'a data loading process failed with {message}') from error


def _is_death(error: BaseException) -> bool:
    """Whether PyTorch says by this error that a worker died; it has no type of its own."""
    return isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker (pid')
