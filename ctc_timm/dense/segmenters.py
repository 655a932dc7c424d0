"""Semantic segmentation on a pyramid: an FPN head, or torchvision's head of DeepLabV3.

B: batch. S: side of the images. K: classes. D: channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from .pyramid import Pyramid


class SemanticFPN(nn.Module):
    """The semantic head of Kirillov et al. 2019, Panoptic Feature Pyramid Networks, section 3.1 and figure 3.

    Every level goes through as many blocks (3x3 convolution, group norm, ReLU, twice as large) as bring it to the size
    of the finest; their sum is classified.

    Args:
        in_channels: Of the levels.
        num_levels: How many there are, each half as large as the one before.
        num_classes: K.
        channels: D of the blocks.
    """

    def __init__(self, in_channels: int, num_levels: int, num_classes: int, channels: int = 128) -> None:
        super().__init__()
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels >= 4 * g or g == 1)

        def block(first: int) -> nn.Module:
            convolution = nn.Conv2d(first, channels, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.GroupNorm(groups, channels), nn.ReLU())

        self.branches = nn.ModuleList(
            nn.ModuleList(block(channels if i else in_channels) for i in range(max(1, level)))
            for level in range(num_levels)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Scores at the size of the finest level.

        Args:
            levels: [B, in_channels, H, W] each, the finest first.

        Returns:
            [B, K, H, W] of the finest.
        """
        total, branches = torch.zeros((), device=levels[0].device), cast(Iterable[Iterable[nn.Module]], self.branches)
        for level, branch in enumerate(branches):
            x = levels[level]
            for step, block in enumerate(branch):
                x = block(x)
                if level:
                    x = interpolate(x, size=levels[level - step - 1].shape[-2:], mode='bilinear', align_corners=False)
            total = total + x
        return self.classifier(total)


class Segmenter(nn.Module):
    """A backbone with a segmentation head.

    Args:
        head: 'fpn', or 'deeplabv3', which stands on the backbone's last map and drops the rest of the pyramid.
        pyramid: Of the backbone.
        num_classes: K.
        mean: Of the channels, of 1.
        std: Of the channels.
        head_channels: D of the FPN head.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        head: str,
        pyramid: Pyramid,
        num_classes: int,
        mean: list[float],
        std: list[float],
        head_channels: int = 128,
    ) -> None:
        super().__init__()
        self.backbone = pyramid
        self.head: nn.Module
        if head == 'fpn':
            self.head = SemanticFPN(pyramid.out_channels, len(pyramid.channels), num_classes, head_channels)
        else:
            self.head = DeepLabHead(pyramid.channels[-1], num_classes)
            del pyramid.fpn, pyramid.resample
        self.on_levels = head == 'fpn'
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: list[Tensor]) -> Tensor:
        """Scores of each class for each pixel.

        Args:
            images: B of [channels, S, S], 0 to 1.

        Returns:
            [B, K, S, S].
        """
        pixels = (torch.stack(images) - self.mean) / self.std
        if self.on_levels:
            scores = self.head(list(self.backbone(pixels).values()))
        else:
            scores = self.head(self.backbone.maps(pixels)[-1])
        return interpolate(scores, size=pixels.shape[-2:], mode='bilinear', align_corners=False)
