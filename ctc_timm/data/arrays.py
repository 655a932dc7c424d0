"""The usual augmentation of small images on decoded arrays: a padded random crop and a horizontal flip.

Where a transform is no more than that, torchvision's way through PIL images costs several times what the
work is. The random draws here are torchvision's own, call for call, so the images are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms


class CropAndFlip:
    """A random crop out of a black border, then a horizontal flip.

    Args:
        size: Height and width of the crop.
        padding: Width of the border; None to take the image as it is.
        flip: Probability of the flip; 0 draws nothing.
    """

    def __init__(self, size: tuple[int, int], padding: int | None, flip: float) -> None:
        self.size = size
        self.padding = padding
        self.flip = flip

    def fits(self, height: int, width: int) -> bool:
        """Whether images of this size come out right: a crop of another size would be padded further."""
        border = 2 * (self.padding or 0)
        needs_no_crop = self.padding is not None or (height, width) == self.size
        return needs_no_crop and height + border >= self.size[0] and width + border >= self.size[1]

    def __call__(self, image_HWC: np.ndarray) -> Tensor:
        """uint8 [H, W, C] to uint8 [C, height, width]."""
        if self.padding is not None:
            border = self.padding
            height, width = self.size
            rows, columns = image_HWC.shape[0] + 2 * border, image_HWC.shape[1] + 2 * border
            padded = np.zeros((rows, columns, image_HWC.shape[2]), dtype=np.uint8)
            padded[border : rows - border, border : columns - border] = image_HWC
            top = left = 0
            if (rows, columns) != (height, width):
                top = int(torch.randint(0, rows - height + 1, size=(1,)))
                left = int(torch.randint(0, columns - width + 1, size=(1,)))
            image_HWC = padded[top : top + height, left : left + width]
        if self.flip > 0 and torch.rand(1) < self.flip:
            image_HWC = image_HWC[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))


def on_arrays(transform: Any, size: tuple[int, int]) -> CropAndFlip | None:
    """The same transform on arrays, or None where it does more than crop and flip.

    Args:
        transform: A composition of torchvision's and timm's transforms that ends in a uint8 tensor.
        size: Height and width that it gives.
    """
    if not isinstance(transform, transforms.Compose):
        return None
    *steps, last = transform.transforms
    if type(last).__name__ not in ('MaybePILToTensor', 'PILToTensor', 'ToNumpy'):
        return None
    padding, flip = None, 0.0
    for place, step in enumerate(steps):
        if isinstance(step, transforms.RandomCrop) and place == 0:
            if tuple(step.size) != tuple(size) or not isinstance(step.padding, int):
                return None
            if step.fill != 0 or step.padding_mode != 'constant':
                return None
            padding = step.padding
        elif isinstance(step, transforms.RandomHorizontalFlip) and place == len(steps) - 1:
            flip = step.p
        else:
            return None
    return CropAndFlip(size, padding, flip)
