"""Random erasing as a pure function of (seed, epoch, index).

timm erases on the device, a batch ahead, with numbers from the program's random state: what an image loses would
depend on the batches before it and on all else that draws. Here each image has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .indexed import random_state_kept, seed_transforms

_STREAM = 1  # apart from the draws of the image's other transforms


def erase(erasing: RandomErasing, images_BCHW: Tensor, keys: Iterable[tuple[int, int]], seed: int) -> None:
    """Apply timm's random erasing, in place; the random states are afterwards as they were.

    Args:
        erasing: Its fill is drawn on its `device`.
        images_BCHW: Normalized.
        keys: Epoch and index of each image.
        seed: Of the run.
    """
    device = torch.device(erasing.device)
    with random_state_kept(device):
        for image_CHW, (epoch, index) in zip(images_BCHW, keys):
            seed_transforms(seed, epoch, index, _STREAM, device=device)
            erasing(image_CHW)
