"""Images with targets, from files to batches: lists of images and of targets, as torchvision's detectors take them.

Images go onto a square canvas. For training: a horizontal flip, a random scale, and a crop or a border (scale jitter,
Ghiasi et al. 2021, Simple Copy-Paste). For evaluation: as large as fits, at the upper left.

C: channels. S: side of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Mask

from ..data.decoding import read_image, translate_errors
from ..data.indexed import random_state_kept, seed_transforms
from ..data.loaders import EpochLoader
from ..data.settings import LoaderSettings
from ..utils.errors import UserError, one_line
from .settings import CanvasSettings

IGNORE = 255  # class of the pixels of a semantic mask that don't count
Batch = tuple[list[Tensor], list[dict[str, Any]]]
Transform = Callable[[Any, Any], tuple[Any, Any]]


def open_image(path: Path, mode: str) -> PIL.Image.Image:
    """Read an image as one of a PIL mode, or raise a `UserError` that names it."""
    try:
        return read_image(path.open('rb'), mode)
    except OSError as error:
        raise UserError(f'{path}: not an image that can be read: {one_line(error)}') from None


def train_transform(canvas: CanvasSettings, mean: Sequence[float], *, boxes: bool) -> v2.Compose:
    """Make the training transform of (image, target), to a float image in 0 to 1, [C, S, S].

    The border has the color `mean`, of 1, so that it is zero when normalized. A target has either boxes, with labels
    and maybe a mask each, which are cut to the canvas and dropped below a pixel, or a semantic mask, whose border is
    `IGNORE`.
    """
    (low, high), size = canvas.scale, (canvas.img_size, canvas.img_size)
    if low > high:
        raise UserError(f'`scale` {low:g} {high:g}: the first must not be above the second')
    fill: dict[Any, Any] = {Image: [round(255 * value) for value in mean], Mask: 0 if boxes else IGNORE}
    steps: list[Any] = [v2.ToImage(), v2.RandomHorizontalFlip(canvas.hflip), v2.ScaleJitter(size, canvas.scale)]
    steps += [v2.RandomCrop(size, pad_if_needed=True, fill=fill), *([v2.SanitizeBoundingBoxes()] if boxes else [])]
    # Subclasses of tensors would slow every operation down.
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


class FitCanvas:
    """The evaluation transform of (image, target); it adds `fitted` to the target, the image's (H, W) on the canvas."""

    def __init__(self, img_size: int, mean: Sequence[float]) -> None:
        self.img_size, self.mean = img_size, mean

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        sides = functional.get_size(image)
        high, wide = (max(1, round(side * (self.img_size / max(sides)))) for side in sides)
        pixels = functional.resize(functional.to_image(image), [high, wide], antialias=True)
        canvas = torch.tensor(self.mean)[:, None, None].repeat(1, self.img_size, self.img_size)
        canvas[:, :high, :wide] = functional.to_dtype(pixels, torch.float32, scale=True)
        return canvas, {**target, 'fitted': (high, wide)}


class Transformed(Dataset):
    """A dataset through a transform; with a seed its draws are a function of that and (epoch, index), an item's key."""

    def __init__(self, dataset: Any, transform: Transform, seed: int | None = None) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if self.seed is None:
            return self.transform(*self.dataset[key])
        with random_state_kept():
            seed_transforms(self.seed, *key)
            return self.transform(*self.dataset[key[1]])


def collate(items: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Make items a batch."""
    return [image for image, _ in items], [target for _, target in items]


class TrainLoader(EpochLoader):
    """Training batches on the device, see `utils.tasks.Loader`."""

    skipped = None  # an unreadable image ends the run

    def __init__(
        self, dataset: Any, transform: Transform, settings: LoaderSettings, seed: int, accelerator: Accelerator
    ) -> None:
        images = Transformed(dataset, transform, seed)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        super().__init__(images, settings, seed, rank, world_size, collate)
        self.device = accelerator.device

    def __iter__(self) -> Iterator[Batch]:
        with translate_errors():
            for batch in self.loader:
                yield send_to_device(batch, self.device)

    def image_names(self, batch: Batch) -> list[str]:
        """Name the images of a batch."""
        return [str(target['name']) for target in batch[1]]
