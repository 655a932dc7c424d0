"""Optimizer steps: forward and backward passes, the update, and what happens where a number is not finite.

A step of several batches is one step for everything: weights, banks, moving average. One whose loss or gradient is
not finite is discarded: weights, optimizer, banks and batch norm statistics stay as they were.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.utils import adaptive_clip_grad, distribute_bn, unwrap_model
from torch import Tensor, nn

from ..utils.tasks import Batch, TrainerTask
from .settings import CommandSettings


class Step(NamedTuple):
    """The outcome of an optimizer step."""

    bad: bool  # whether it was discarded, as its loss or gradient was not finite
    losses: dict[str, Tensor]  # sum over its batches, by name; of this rank
    stop: bool  # whether any rank was asked to stop, as far as this one knows


class Steps:
    """Takes optimizer steps with a prepared task and optimizer; settings and mixup are those of `Trainer`.

    With `max_bad_steps`, steps with numbers that are not finite are discarded, which waits once a step for the device.
    """

    def __init__(
        self, accelerator: Accelerator, task: TrainerTask, optimizer: Any, settings: CommandSettings, mixup: Any
    ) -> None:
        self.accelerator, self.task, self.optimizer = accelerator, task, optimizer
        self.settings, self.mixup = settings.optimizer, mixup
        checks = settings.run.max_bad_steps > 0
        self._statistics = _Statistics(unwrap_model(task.get_trainable_module())) if checks else None
        self._losses: dict[str, Tensor] = {}
        self._second_order = getattr(optimizer.optimizer, 'is_second_order', False)  # Accelerate's wrapper hides it

    def forward_backward(self, batch: Batch, epoch: int, accumulation_steps: int, last: bool) -> None:
        """Add the gradients of a batch of the loader, which is one of `accumulation_steps` of a step."""
        if self.mixup is not None:
            batch = self.mixup(batch, epoch)
        if not self._losses and self._statistics is not None:
            self._statistics.record()
        accelerator = self.accelerator
        with contextlib.nullcontext() if last else accelerator.no_sync(self.task.get_trainable_module()):
            with accelerator.autocast():
                result = self.task.run_batch(batch)
            accelerator.backward(result['loss'] / accumulation_steps, create_graph=self._second_order)
        for name, value in result.items():
            if value.ndim == 0:
                self._losses[name] = self._losses.get(name, 0) + value.detach()

    def update(self, number: int, stop: bool, ask: bool) -> Step:
        """Take the optimizer's step, numbered from 1, with the gradients that are there.

        `stop`: this process was asked to stop; `ask`: exchange that with other ranks even where nothing is checked.
        """
        losses, self._losses = self._losses, {}
        bad, stop = self._agree(losses['loss'], stop, ask)
        taken = not bad
        if taken:
            self._clip_gradients()
            self.optimizer.step()
            taken = not self.accelerator.optimizer_step_was_skipped  # by float16's scaler, until its scale fits
        self.optimizer.zero_grad()
        if taken:
            self.task.step_taken(number)
        else:
            self.task.step_discarded()
            if self._statistics is not None:
                self._statistics.restore()
        return Step(bad, losses, stop)

    def _clip_gradients(self) -> None:
        limit, mode, task = self.settings.clip_grad, self.settings.clip_mode, self.task
        if limit is not None and mode == 'norm':
            self.accelerator.clip_grad_norm_(task.get_clip_parameters(), limit)
        elif limit is not None and mode == 'value':
            self.accelerator.clip_grad_value_(task.get_clip_parameters(), limit)
        elif limit is not None:
            self.accelerator.unscale_gradients()
            adaptive_clip_grad(task.get_clip_parameters(exclude_head=True), limit, norm_type=2.0)

    def _agree(self, loss: Tensor, stop: bool, ask: bool) -> tuple[bool, bool]:
        """Whether the step is bad on any rank, and whether any was asked to stop; a step's one wait for the device."""
        alone, checked = self.accelerator.num_processes == 1, self._statistics is not None
        if not checked and (alone or not ask):
            return False, stop and alone  # one of several ranks must not stop before the others
        bad = ~loss.isfinite() if checked else torch.zeros_like(loss, dtype=torch.bool)
        if checked and self.accelerator.scaler is None:
            module: Any = self.task.get_trainable_module()
            norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
            bad = bad | ~norm.isfinite()
        if alone:
            return bool(bad), stop
        flags = torch.stack([bad.float(), torch.full_like(loss, stop, dtype=torch.float32)])
        any_bad, any_stop = (self.accelerator.reduce(flags, 'sum') > 0).tolist()
        return any_bad, any_stop


class _Statistics:
    """The running statistics of a module's norms, to be restored after a discarded step."""

    def __init__(self, module: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for part in module.modules():
            if getattr(part, 'running_mean', None) is not None:
                for buffer in part.buffers(recurse=False):
                    by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [(live, [torch.empty_like(buffer) for buffer in live]) for live in by_dtype.values()]

    def record(self) -> None:
        for live, recorded in self._pairs:
            torch._foreach_copy_(recorded, live)

    def restore(self) -> None:
        for live, recorded in self._pairs:
            torch._foreach_copy_(live, recorded)


def share_statistics(task: TrainerTask, accelerator: Accelerator, how: str) -> None:
    """Give all ranks the mean running statistics ('reduce') or the first one's ('broadcast'), or leave them ('')."""
    if accelerator.num_processes == 1 or not how:
        return
    models = [unwrap_model(task.get_eval_model(ema=ema)) for ema in (False, True)[: 1 + task.has_ema()]]
    trained = {name for name, norm in models[0].named_modules() if norm.training}  # a mean would round frozen ones
    for model in models:
        for name, norm in model.named_modules():
            statistics = getattr(norm, 'running_mean', None)
            if name in trained and statistics is not None and statistics.device.type == accelerator.device.type:
                distribute_bn(norm, accelerator.num_processes, how == 'reduce')
