"""The task to train: CTC's two stages, or plain classification, by flags."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from ..cli.arguments import below_one, momentum, non_negative_float, positive_float, probability, whole_number
from ..contrast.negatives import MODES, POSITIVES
from ..contrast.task import PAST_FEATURES, CTCTask
from ..data import mixup as mixing
from ..utils.errors import UserError
from .freezing import PartlyFrozenTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of CTC."""
    group = parser.add_argument_group('Contrastive temporal coding')
    group.add_argument('--mode', choices=('ctc', 'vanilla'), default='ctc', help='ctc, or plain supervised training')
    group.add_argument(
        '--instance-weight', type=non_negative_float, default=0.5, metavar='W', help="instance term's weight (alpha)"
    )
    group.add_argument(
        '--temporal-weight', type=non_negative_float, default=1.0, metavar='W', help="temporal term's weight (beta)"
    )
    group.add_argument(
        '--instance-temperature', type=positive_float, default=0.1, metavar='T', help='of the instance term'
    )
    group.add_argument(
        '--temporal-temperature', type=positive_float, default=0.1, metavar='T', help='of the temporal term'
    )
    group.add_argument(
        '--instance-momentum', type=momentum, default=0.9, metavar='M', help="of the instance stage's bank"
    )
    group.add_argument(
        '--temporal-momentum', type=momentum, default=0.9, metavar='M', help="of the temporal stage's banks"
    )
    group.add_argument(
        '--num-negatives', type=whole_number(1, 10**7), default=16384, metavar='K', help='negatives an image'
    )
    group.add_argument(
        '--negatives', choices=MODES, default='sampled', help='K rows of each image, a draw for the batch, or all rows'
    )
    group.add_argument(
        '--positives', choices=POSITIVES, default='exact', help='the image itself, or a random one of its class'
    )
    group.add_argument(
        '--past-features',
        choices=PAST_FEATURES,
        default='model',
        help='pass each batch through the information bank, as published, or use its stored rows',
    )
    group.add_argument('--embed-dim', type=whole_number(1, 65536), default=128, metavar='E', help='embedding size')
    group.add_argument('--train-projector', action='store_true', help="train the instance stage's projector too")
    group.add_argument(
        '--bank-dtype', choices=('float32', 'bfloat16'), default='float32', help="precision of the banks' rows"
    )
    group.add_argument(
        '--split-banks', action='store_true', help='each process holds its share of the banks, not a copy of them'
    )


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's flags of the task's own loss."""
    group = parser.add_argument_group("Task's loss")
    group.add_argument('--smoothing', type=below_one, default=0.1, metavar='F', help='label smoothing')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    group.add_argument('--bce-sum', action='store_true', help='sum it over classes')
    group.add_argument('--bce-target-thresh', type=probability, metavar='F', help='binarize mixed targets above this')


def refused_stream(args: argparse.Namespace) -> UserError:
    """What to tell who asks for CTC on a streaming set."""
    return UserError(
        f'--dataset {args.dataset}: a streaming data set gives its images no stable index, which --mode ctc '
        f'needs; use a map-style reader such as hfds/NAME or --data-dir FOLDER, or --mode vanilla'
    )


def create_task(
    args: argparse.Namespace,
    model: nn.Module,
    labels_N: Tensor | None,
    device: torch.device,
    rank: int = 0,
    frozen: Collection[str] = (),
) -> TrainingTask:
    """The task that the flags describe.

    Args:
        args: The flags above and the Mixup flags.
        model: With a head.
        labels_N: Class of each training image, [N]; None for streaming sets.
        device: Where to train.
        rank: This process.
        frozen: Names of modules that stay in evaluation mode; for plain training.

    Raises:
        UserError: CTC on a streaming set, a set of one class, a temperature too low.
    """
    criterion: dict[str, Any] = dict(
        loss_type='bce' if args.bce_loss else None,
        smoothing=args.smoothing,
        soft_targets=mixing.is_active(args),
        bce_target_thresh=args.bce_target_thresh if args.bce_loss else None,
        bce_sum=args.bce_sum,
    )
    if args.mode == 'vanilla':
        return PartlyFrozenTask(model, frozen, criterion_kwargs=criterion, device=device, verbose=False)
    if labels_N is None:
        raise refused_stream(args)
    try:
        return CTCTask(
            model,
            labels_N,
            criterion_kwargs=criterion,
            embed_dim=args.embed_dim,
            num_negatives=args.num_negatives,
            negatives=args.negatives,
            positives=args.positives,
            past_features=args.past_features,
            instance_weight=args.instance_weight,
            temporal_weight=args.temporal_weight,
            instance_temperature=args.instance_temperature,
            temporal_temperature=args.temporal_temperature,
            instance_momentum=args.instance_momentum,
            temporal_momentum=args.temporal_momentum,
            train_projector=args.train_projector,
            bank_dtype=getattr(torch, args.bank_dtype),
            split_banks=args.split_banks,
            seed=args.seed,
            rank=rank,
            device=device,
            verbose=False,
        )
    except ValueError as error:
        # Of what the losses refuse, the flags let pass only a temporal temperature too low.
        low = str(error).startswith('temperature')
        flag = f'--temporal-temperature {args.temporal_temperature}' if low else '--mode ctc'
        raise UserError(f'{flag}: {error}') from None
