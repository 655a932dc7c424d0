"""Images and boxes onto a square canvas, by torchvision's transforms v2.

For training: a horizontal flip, a random scale, and a crop or a border to the canvas (scale jitter, Ghiasi et al. 2021,
Simple Copy-Paste). For measuring: as large as fits the canvas, at its upper left.

S: side of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Mask


def train_transform(img_size: int, hflip: float, scale: Sequence[float], mean: Sequence[float]) -> v2.Compose:
    """The training transform of (image, target).

    Args:
        img_size: S.
        hflip: Probability of a flip.
        scale: Range of the image's size over that which fits the canvas.
        mean: Of the channels, of 1; the border's color, so that it is zero when normalized.

    Returns:
        To a float image in 0 to 1, [3, S, S], with boxes cut to it; those of less than a pixel go, and their labels.
    """
    size = (img_size, img_size)
    fill: dict[Any, Any] = {Image: [round(255 * value) for value in mean], Mask: 0}
    steps: list[Any] = [v2.ToImage(), v2.RandomHorizontalFlip(hflip)]
    steps.append(v2.ScaleJitter(size, (scale[0], scale[1])))
    steps.append(v2.RandomCrop(size, pad_if_needed=True, fill=fill))
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)])


class FitCanvas:
    """The measuring transform of (image, target).

    The target gets `scale`, the canvas image's size over the image's own, (across, down), and `fitted`, the size of
    the image on the canvas, (H, W).

    Args:
        img_size: S.
        mean: Of the channels, of 1; the border's color.
    """

    def __init__(self, img_size: int, mean: Sequence[float]) -> None:
        self.img_size = img_size
        self.mean = mean

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        height, width = functional.get_size(image)
        ratio = self.img_size / max(height, width)
        fitted = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        pixels = functional.resize(functional.to_image(image), list(fitted), antialias=True)
        pixels = functional.to_dtype(pixels, torch.float32, scale=True)
        canvas = torch.tensor(self.mean)[:, None, None].repeat(1, self.img_size, self.img_size)
        canvas[:, : fitted[0], : fitted[1]] = pixels
        return canvas, {**target, 'scale': (fitted[1] / width, fitted[0] / height), 'fitted': fitted}


def collate(items: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Items as torchvision's detectors take them: a list of images and one of targets, of plain tensors."""
    images = [image.as_subclass(Tensor) for image, _ in items]
    targets = [
        {key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()}
        for _, target in items
    ]
    return images, targets
