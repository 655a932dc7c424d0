"""Mixup and CutMix that also say how much of each image is left, so that the instance term can mix too."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from ..cli.arguments import non_negative_float, non_negative_int, probability
from ..utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's Mixup flags."""
    group = parser.add_argument_group('Mixup and CutMix')
    group.add_argument('--mixup', type=non_negative_float, default=0.0, metavar='ALPHA', help='mixup if above 0')
    group.add_argument('--cutmix', type=non_negative_float, default=0.0, metavar='ALPHA', help='cutmix if above 0')
    group.add_argument(
        '--cutmix-minmax',
        type=probability,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='box size range, overrides alpha and turns cutmix on',
    )
    group.add_argument('--mixup-prob', type=probability, default=1.0, metavar='P', help='of mixing at all')
    group.add_argument(
        '--mixup-switch-prob', type=probability, default=0.5, metavar='P', help='of cutmix when both are on'
    )
    group.add_argument('--mixup-mode', choices=('batch', 'pair', 'elem'), default='batch', help='how lambda varies')
    group.add_argument(
        '--mixup-off-epoch', type=non_negative_int, default=0, metavar='N', help='stop mixing at this epoch, 0: never'
    )


def is_active(args: argparse.Namespace) -> bool:
    """Whether any of the flags turns mixing on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


class InstanceMixup:
    """timm's `Mixup` on a batch, with the lambda of each image.

    timm mixes labels inside and keeps lambda to itself. Given the images' places in the batch as labels, what
    it returns is the mixing matrix, and its diagonal is lambda.

    Args:
        num_classes: C.
        smoothing: Label smoothing of the mixed targets.
        mixup: Beta distribution's alpha for mixup.
        cutmix: Likewise for cutmix.
        cutmix_minmax: Box size range.
        prob: Of mixing a batch or image.
        switch_prob: Of cutmix when both are on.
        mode: 'batch', 'pair' or 'elem'.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.0,
        mixup: float = 1.0,
        cutmix: float = 0.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = 'batch',
    ) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=0.0,
        )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            images: [B, 3, H, W], B even.
            targets: Classes, [B].

        Returns:
            Mixed images, soft targets [B, C], and lambda [B], the share of image b itself in mixed image b.
        """
        B = len(images)
        self.mixup.num_classes = B
        try:
            images, mixing_BB = self.mixup(images, torch.arange(B, device=images.device))
        except ValueError:
            if self.mixup.cutmix_minmax is None:
                raise
            low, high = self.mixup.cutmix_minmax
            size = 'x'.join(map(str, images.shape[-2:]))
            raise UserError(
                f'--cutmix-minmax {low:g} {high:g}: no box is between these shares of {size} images'
            ) from None
        one_hot_BC = F.one_hot(targets, self.num_classes).to(mixing_BB.dtype)
        smooth_BC = one_hot_BC * (1 - self.smoothing) + self.smoothing / self.num_classes
        return images, mixing_BB @ smooth_BC, mixing_BB.diagonal()


def create_mixup(args: argparse.Namespace, num_classes: int) -> InstanceMixup | None:
    """The mixing that the flags ask for, or None."""
    if not is_active(args):
        return None
    if args.cutmix_minmax is not None and not args.cutmix_minmax[0] < args.cutmix_minmax[1]:
        smaller, larger = args.cutmix_minmax
        raise UserError(f'--cutmix-minmax {smaller:g} {larger:g}: the first must be smaller than the second')
    return InstanceMixup(
        num_classes,
        smoothing=args.smoothing,
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )
