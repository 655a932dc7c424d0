"""Learning rate and weight decay over the two stages.

Each stage runs a schedule of timm's own over its length; the temporal stage's is scaled and has no warm-up.
"""

from __future__ import annotations

import argparse
from typing import Any

from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from torch.optim import Optimizer

from ..cli.arguments import (
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    probability,
    whole_number,
)
from ..utils.errors import UserError

SCHEDULES = ('cosine', 'cosine_open', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's schedule flags."""
    group = parser.add_argument_group('Schedule')
    group.add_argument('--epochs', type=whole_number(1, 10**6), default=300, metavar='N', help='length of the run')
    group.add_argument(
        '--sched',
        choices=SCHEDULES,
        default='cosine',
        help="timm's schedules; cosine_open is the paper's, see CosineOpenLRScheduler",
    )
    group.add_argument(
        '--sched-on-updates',
        action=argparse.BooleanOptionalAction,
        default=False,
        help='step the schedule each update, not each epoch',
    )
    group.add_argument('--warmup-epochs', type=non_negative_int, default=0, metavar='N', help='of the first stage')
    group.add_argument(
        '--warmup-lr', type=non_negative_float, default=1e-5, metavar='LR', help='at the start of the warm-up'
    )
    group.add_argument('--warmup-prefix', action='store_true', help='the warm-up comes on top of the epochs')
    group.add_argument('--min-lr', type=non_negative_float, default=0.0, metavar='LR', help='lower bound')
    group.add_argument(
        '--cooldown-epochs', type=non_negative_int, default=0, metavar='N', help='epochs at the lower bound, on top'
    )
    group.add_argument(
        '--decay-epochs', type=positive_float, metavar='N', help='interval (step) or length (wsd, rsqrt) of decay'
    )
    group.add_argument(
        '--decay-milestones', type=positive_int, nargs='+', default=[90, 180, 270], metavar='N', help='for multistep'
    )
    group.add_argument(
        '--decay-rate', '--dr', type=number(1e-6, 10), default=0.1, metavar='RATE', help='of step, multistep and poly'
    )
    group.add_argument(
        '--lr-noise', type=probability, nargs='+', metavar='PCT', help='noise on and off, fractions of the run'
    )
    group.add_argument('--lr-noise-pct', type=number(0.01, 1), default=0.67, metavar='PCT', help='limit of the noise')
    group.add_argument(
        '--lr-noise-std', type=number(0, 10), default=1.0, metavar='STD', help='standard deviation of the noise'
    )
    group.add_argument(
        '--lr-cycle-mul', type=number(0.1, 10), default=1.0, metavar='MULT', help='cycle length multiplier'
    )
    group.add_argument('--lr-cycle-decay', type=probability, default=0.5, metavar='MULT', help='decay per cycle')
    group.add_argument('--lr-cycle-limit', type=whole_number(1, 1000), default=1, metavar='N', help='number of cycles')
    group.add_argument('--lr-k-decay', type=number(0.01, 100), default=1.0, metavar='K', help='for cosine and poly')


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the temporal stage starts, and how the two stages' schedules differ."""
    group = parser.add_argument_group('Two stages')
    group.add_argument(
        '--temporal-start-epoch',
        type=non_negative_int,
        metavar='N',
        help='epoch, counted from 0, at which the temporal stage starts; two thirds of the run when not given, and '
        'never when as large as --epochs',
    )
    group.add_argument(
        '--temporal-lr-scale',
        type=positive_float,
        default=0.1,
        metavar='X',
        help="temporal stage's learning rate over the instance stage's",
    )
    group.add_argument(
        '--instance-weight-decay-scale',
        type=non_negative_float,
        default=1.0,
        metavar='X',
        help="instance stage's weight decay over --weight-decay",
    )


class CosineOpenLRScheduler(CosineLRScheduler):
    """The paper's cosine: epochs counted from 1 of a period one longer than the run.

    timm's cosine starts at its top and, were it to run one epoch more, would end at its bottom; this one
    touches neither. Its warm-up reaches the full rate within the warm-up's own epochs.
    """

    def _get_lr(self, t: int) -> list[float]:
        if t + 1 == self.warmup_t:
            return list(self.base_values)
        return super()._get_lr(t + 1)


def _create(
    optimizer: Optimizer, options: dict[str, Any], epochs: int, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """A schedule over so many epochs, and how many it takes with warm-up prefix, cycles and cool-down."""
    options = {**options, 'num_epochs': epochs}
    if options['sched'] != 'cosine_open':
        return create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    per_epoch = 1 if options['step_on_epochs'] else updates_per_epoch
    scheduler = CosineOpenLRScheduler(
        optimizer,
        t_initial=epochs * per_epoch + 1,
        lr_min=options['min_lr'],
        warmup_t=options['warmup_epochs'] * per_epoch,
        warmup_lr_init=options['warmup_lr'],
        t_in_epochs=options['step_on_epochs'],
    )
    return scheduler, epochs + options['cooldown_epochs']


class TwoStageSchedule:
    """Sets each parameter group's learning rate and weight decay.

    Args:
        optimizer: Whose groups are set; the values it was made with are the base.
        args: The flags above.
        updates_per_epoch: Optimizer steps in an epoch.
        two_stages: False for plain training: one schedule over the whole run.

    Attributes:
        num_epochs: Length of the run.
        temporal_start: Epoch, from 0, at which the temporal stage starts; equal to `num_epochs` if it never does.

    Raises:
        UserError: The temporal stage would start outside the run, or the schedule refuses its settings.
    """

    def __init__(
        self, optimizer: Optimizer, args: argparse.Namespace, updates_per_epoch: int, two_stages: bool = True
    ) -> None:
        options = scheduler_kwargs(args)
        self.optimizer = optimizer
        self.updates_per_epoch = updates_per_epoch
        self.on_updates = args.sched_on_updates
        self._what = f'--sched {args.sched} with --decay-rate {args.decay_rate:g}'
        self.temporal_lr_scale = args.temporal_lr_scale
        self.weight_decay_scale = args.instance_weight_decay_scale
        self._weight_decays = [group['weight_decay'] for group in optimizer.param_groups]
        self._lrs = [group['lr'] * group.get('lr_scale', 1.0) for group in optimizer.param_groups]
        self.first: Scheduler | None = None
        self.second: Scheduler | None = None
        try:
            if not two_stages:
                self.first, self.num_epochs = _create(optimizer, options, args.epochs, updates_per_epoch)
                self.temporal_start = self.num_epochs
                self.weight_decay_scale = 1.0
                return
            start = temporal_start(args)
            if start == args.epochs:
                self.first, self.num_epochs = _create(optimizer, options, start, updates_per_epoch)
                self.temporal_start = self.num_epochs
                return
            self.temporal_start = 0
            if start:
                self.first, self.temporal_start = _create(
                    optimizer, {**options, 'cooldown_epochs': 0}, start, updates_per_epoch
                )
            self.second, length = _create(
                optimizer, {**options, 'warmup_epochs': 0}, args.epochs - start, updates_per_epoch
            )
            self.num_epochs = self.temporal_start + length
        except (AssertionError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'--sched {args.sched}: {error or "the schedule refuses its settings"}') from None

    def stage(self, epoch: int) -> str:
        """'instance' or 'temporal'."""
        return 'temporal' if epoch >= self.temporal_start else 'instance'

    def step(self, epoch: int, update: int = 0) -> None:
        """Set the groups for an update of an epoch, both counted from 0.

        With schedules that step on epochs only the epoch counts.
        """
        temporal = self.stage(epoch) == 'temporal'
        scheduler = self.second if temporal else self.first
        local_epoch = epoch - self.temporal_start if temporal else epoch
        if scheduler is not None:
            try:
                if self.on_updates:
                    scheduler.step_update(local_epoch * self.updates_per_epoch + update)
                else:
                    scheduler.step(local_epoch)
            except OverflowError:
                raise UserError(f'{self._what}: the learning rate grows beyond all numbers at epoch {epoch}') from None
        for group, decay, lr in zip(self.optimizer.param_groups, self._weight_decays, self._lrs):
            if scheduler is None:
                group['lr'] = lr
            if temporal:
                group['lr'] *= self.temporal_lr_scale
            group['weight_decay'] = decay if temporal else decay * self.weight_decay_scale


def temporal_start(args: argparse.Namespace) -> int:
    """The epoch at which the temporal stage starts, before any warm-up prefix; that after the last if it never does.

    Raises:
        UserError: It lies outside the run.
    """
    if args.temporal_start_epoch is None:
        return args.epochs * 2 // 3
    if args.temporal_start_epoch > args.epochs:
        raise UserError(
            f'--temporal-start-epoch {args.temporal_start_epoch} lies outside the run of --epochs {args.epochs}; '
            f'use 0 to {args.epochs}'
        )
    return args.temporal_start_epoch
