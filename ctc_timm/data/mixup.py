"""Mixup and CutMix that also give the share of each image that is left, so that the instance term can mix too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from ..utils.errors import UserError
from .settings import MixupSettings


class InstanceMixup:
    """timm's `Mixup` on a batch, with the lambda of each image.

    timm keeps lambda to itself. With the images' places in the batch as labels, what it returns is the mixing matrix,
    whose diagonal is lambda. `smoothing` is that of the mixed targets, `options` are for timm's class.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.0, **options: Any) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mixup = Mixup(**options, label_smoothing=0.0)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix images [B, 3, H, W], B even, in place, and targets [B] to soft targets [B, C].

        Lambda, [B], is the share of image b itself in mixed image b.

        Raises:
            UserError: No box of these images has a size within `cutmix_minmax`.
        """
        low, high = self.mixup.cutmix_minmax or (0, 1)
        if any(int(side * low) >= int(side * high) for side in images.shape[-2:]):
            size = 'x'.join(map(str, images.shape[-2:]))
            raise UserError(f'`cutmix_minmax` {low:g} {high:g}: no box is between these shares of {size} images')
        self.mixup.num_classes = len(images)
        images, mixing_BB = self.mixup(images, torch.arange(len(images), device=images.device))
        one_hot_BC = F.one_hot(targets, self.num_classes).to(mixing_BB.dtype)
        smooth_BC = one_hot_BC * (1 - self.smoothing) + self.smoothing / self.num_classes
        return images, mixing_BB @ smooth_BC, mixing_BB.diagonal()


def create_mixup(mixup: MixupSettings, num_classes: int, smoothing: float) -> InstanceMixup | None:
    """Create the mixing that the settings ask for, or None; raise a `UserError` if `cutmix_minmax` is no range."""
    if not mixup.active:
        return None
    low, high = mixup.cutmix_minmax or (0, 1)
    if not low < high:
        raise UserError(f'`cutmix_minmax` {low:g} {high:g}: the first must be smaller than the second')
    return InstanceMixup(
        num_classes,
        smoothing,
        mixup_alpha=mixup.mixup,
        cutmix_alpha=mixup.cutmix,
        cutmix_minmax=mixup.cutmix_minmax,
        prob=mixup.mixup_prob,
        switch_prob=mixup.mixup_switch_prob,
        mode=mixup.mixup_mode,
    )
