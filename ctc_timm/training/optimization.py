"""timm's optimizer, and its learning rate and weight decay over the two stages.

Each stage runs a schedule of timm's own over its length; the temporal stage's is scaled, and has no warm-up after
another stage.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import optimizer_kwargs
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from torch.optim import Optimizer

from ..utils.errors import UserError, nearest, one_line
from .settings import OptimizerSettings, ScheduleSettings, StageSettings


def resolve_lr(optimizer: OptimizerSettings, batch_size: int, world_size: int) -> float:
    """`lr`, or `lr_base` scaled by the images in a step over all processes, as timm does."""
    if optimizer.lr is not None:
        return optimizer.lr
    adaptive = any(word in optimizer.opt.lower() for word in ('ada', 'lamb'))
    scale = optimizer.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = batch_size * world_size * optimizer.grad_accum_steps / optimizer.lr_base_size
    return optimizer.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_optimizer(optimizer: OptimizerSettings, module: Any) -> Optimizer:
    """Create timm's optimizer over all parameters that need a gradient; `lr` is set, see `resolve_lr`.

    Raises:
        UserError: An unknown optimizer, or settings that it refuses.
    """
    known = [str(name) for name in list_optimizers()]
    if optimizer.opt.lower().removeprefix('lookahead_') not in known:
        raise UserError(f'`opt` {optimizer.opt}: unknown to timm{nearest(optimizer.opt, known)}')
    values = SimpleNamespace(**dataclasses.asdict(optimizer), opt_args=optimizer.opt_kwargs or None)
    options: dict[str, Any] = optimizer_kwargs(values)
    try:
        return create_optimizer_v2(module, **options, filter_bias_and_bn=optimizer.filter_bias_and_bn)
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError, ImportError) as error:
        what = f'`opt` {optimizer.opt} with `opt_betas` {optimizer.opt_betas} and `opt_kwargs` {optimizer.opt_kwargs}'
        raise UserError(f'{what}: {one_line(error)}') from None


class CosineOpenLRScheduler(CosineLRScheduler):
    """The paper's cosine: epochs counted from 1 of a period one longer than the run.

    timm's cosine starts at its top and, were it to run one epoch more, would end at its bottom; this one
    touches neither. Its warm-up reaches the full rate within the warm-up's own epochs.
    """

    def _get_lr(self, t: int) -> list[float]:
        if t + 1 == self.warmup_t:
            return list(self.base_values)
        return super()._get_lr(t + 1)


class TwoStageSchedule:
    """Sets each parameter group's learning rate and weight decay; the values it was made with are the base.

    Args:
        stages: Where the temporal stage starts and how its schedule differs; None for one schedule over the whole run.
        updates_per_epoch: Optimizer steps in an epoch.
        metric: Name of the metric that a plateau is one of; larger is better, but of 'loss'.

    Attributes:
        num_epochs: Length of the run.
        temporal_start: Epoch, from 0, at which the temporal stage starts; equal to `num_epochs` if it never does.

    Raises:
        UserError: The temporal stage would start outside the run, or the schedule refuses its settings.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: ScheduleSettings,
        stages: StageSettings | None,
        updates_per_epoch: int,
        seed: int = 42,
        metric: str = 'top1',
    ) -> None:
        if settings.sched == 'plateau' and settings.sched_on_updates:
            raise UserError('`sched` plateau: changes the rate after an epoch; use `sched_on_updates=False`')
        self.metric = metric
        self.optimizer, self.settings, self.updates_per_epoch = optimizer, settings, updates_per_epoch
        self.two_stages, self.on_updates = stages is not None, settings.sched_on_updates
        self._lr_scale = stages.temporal_lr_scale if stages and not stages.temporal_from_start else 1.0
        self._decay_scale = stages.instance_weight_decay_scale if stages else 1.0
        self._base = [(g['lr'] * g.get('lr_scale', 1.0), g['weight_decay']) for g in optimizer.param_groups]
        start = settings.epochs if stages is None else temporal_start(stages, settings.epochs)
        rest = settings.epochs - start
        self._first, self.temporal_start = self._create(start, seed, **{'cooldown_epochs': 0} if rest else {})
        # From the first step on, as with pretrained weights, the temporal stage is the one that warms up.
        self._second, length = self._create(rest, seed, **{'warmup_epochs': 0} if start else {})
        self.num_epochs = self.temporal_start + length

    def _create(self, epochs: int, seed: int, **changes: Any) -> tuple[Scheduler | None, int]:
        """A schedule, and how many epochs it takes with warm-up prefix, cycles and cool-down."""
        if not epochs:
            return None, 0
        options = scheduler_kwargs(
            SimpleNamespace(**dataclasses.asdict(self.settings), seed=seed, eval_metric=self.metric)
        )
        options |= {'num_epochs': epochs, **changes}
        try:
            if options['sched'] != 'cosine_open':
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore', FutureWarning)  # of a plateau that can't resume; see `_replay`
                    return create_scheduler_v2(self.optimizer, **options, updates_per_epoch=self.updates_per_epoch)
            per_epoch = 1 if options['step_on_epochs'] else self.updates_per_epoch
            scheduler = CosineOpenLRScheduler(
                self.optimizer,
                t_initial=epochs * per_epoch + 1,
                lr_min=options['min_lr'],
                warmup_t=options['warmup_epochs'] * per_epoch,
                warmup_lr_init=options['warmup_lr'],
                t_in_epochs=options['step_on_epochs'],
            )
        except (AssertionError, ValueError, OverflowError) as error:
            raise UserError(f'`sched` {options["sched"]}: {error or "refuses its settings"}') from None
        return scheduler, epochs + options['cooldown_epochs']

    def stage(self, epoch: int) -> str:
        """'instance' or 'temporal'."""
        return 'temporal' if epoch >= self.temporal_start else 'instance'

    def step(self, epoch: int, update: int = 0, metrics: Sequence[float | None] = ()) -> None:
        """Set the groups for an update of an epoch, both counted from 0; the update counts with `sched_on_updates`.

        `metrics` has the metric of each epoch before, None of one that was not evaluated; the plateau follows those of
        its own stage.

        Raises:
            UserError: The learning rate overflows.
        """
        temporal = epoch >= self.temporal_start
        scheduler = self._second if temporal else self._first
        local_epoch = epoch - self.temporal_start if temporal else epoch
        try:
            if isinstance(scheduler, PlateauLRScheduler):
                _replay(scheduler, metrics[epoch - local_epoch : epoch])
            elif scheduler is not None and self.on_updates:
                scheduler.step_update(local_epoch * self.updates_per_epoch + update)
            elif scheduler is not None:
                scheduler.step(local_epoch)
        except OverflowError:
            what = f'`sched` {self.settings.sched} with `decay_rate` {self.settings.decay_rate:g}'
            raise UserError(f'{what}: the learning rate overflows at epoch {epoch}') from None
        for group, (lr, decay) in zip(self.optimizer.param_groups, self._base):
            if scheduler is None:
                group['lr'] = lr
            if temporal:
                group['lr'] *= self._lr_scale
            group['weight_decay'] = decay if temporal else decay * self._decay_scale


def _replay(scheduler: PlateauLRScheduler, metrics: Sequence[float | None]) -> None:
    """Step timm's plateau schedule through a stage's metrics from its start, so that it needs no state of its own."""
    scheduler.restore_lr = None
    scheduler.lr_scheduler._reset()
    scheduler.update_groups(scheduler.warmup_lr_init if scheduler.warmup_t else scheduler.base_values)
    for epoch, metric in enumerate(metrics, 1):
        scheduler.step(epoch, metric)


def temporal_start(stages: StageSettings, epochs: int) -> int:
    """The epoch at which the temporal stage starts, before any warm-up prefix; `epochs` if it never does.

    Raises:
        UserError: It lies outside the run, or is given with `temporal_from_start`.
    """
    if stages.temporal_from_start:
        if stages.temporal_start_epoch:
            fault = f'`temporal_start_epoch` {stages.temporal_start_epoch}: is 0 with `temporal_from_start`'
            raise UserError(f'{fault}; leave one of them out')
        return 0
    start = epochs * 2 // 3 if stages.temporal_start_epoch is None else stages.temporal_start_epoch
    if start > epochs:
        raise UserError(f'`temporal_start_epoch` {start} lies outside the run of `epochs` {epochs}; use 0 to {epochs}')
    return start
