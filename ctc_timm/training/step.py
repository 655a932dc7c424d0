"""Optimizer steps: batches through the task, gradients, and what is done about a step that gives no number.

A step of several batches is one step for everything: weights, banks, moving average. One whose loss or gradient
isn't finite is left out altogether: weights, optimizer, banks and batch norm statistics stay as they were.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..cli.arguments import non_negative_int, positive_int
from ..contrast.task import CTCTask
from ..data import mixup as mixing
from . import optimization


def add_arguments(group: Any) -> None:
    """Declare the flags of an optimizer step, and of those that give no number."""
    group.add_argument(
        '--grad-accum-steps', type=positive_int, default=1, metavar='N', help='batches in an optimizer step'
    )
    group.add_argument(
        '--max-bad-steps',
        type=non_negative_int,
        default=10,
        metavar='N',
        help='stop after so many steps in a row whose loss or gradient is not finite, which are left out; 0: no check',
    )


class Step(NamedTuple):
    """What came of an optimizer step.

    Attributes:
        bad: Whether it was left out, as its loss or gradient was not finite.
        losses: Sum over its batches, by name; of this process.
        stop: Whether any process was told to stop, as far as was asked.
    """

    bad: bool
    losses: dict[str, Tensor]
    stop: bool


class Steps:
    """Takes a run's steps.

    Args:
        args: Flags.
        accelerator: Of the run.
        task: With its trained module prepared.
        optimizer: Prepared.
        mixup: Mixes batches, if anything does.
        num_classes: C.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        task: TrainingTask,
        optimizer: Any,
        mixup: mixing.InstanceMixup | None,
        num_classes: int,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.task = task
        self.optimizer = optimizer
        self.mixup = mixup
        self.num_classes = num_classes
        self.checked = args.max_bad_steps > 0
        self._sums: dict[str, Tensor] = {}
        self._statistics = _Statistics(unwrap_model(task.get_trainable_module())) if self.checked else None
        if isinstance(task, CTCTask):
            task.defer_updates()

    def batch(self, images: Tensor, targets: Tensor, index: Tensor | None, epoch: int, parts: int, last: bool) -> None:
        """Forward and backward of one batch.

        Args:
            images: [B, 3, H, W].
            targets: Classes, [B].
            index: Position of each image in the training set, [B]; None for streams.
            epoch: Mixing ends after some.
            parts: Batches in this step.
            last: Whether it is the last of them.
        """
        images, targets, lam = self._mix(images, targets, epoch)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        task = self.task
        given = (images, targets, index, lam) if isinstance(task, CTCTask) else (images, targets)
        self.take(given, parts, last)

    def take(self, given: tuple[Any, ...], parts: int, last: bool) -> None:
        """Forward and backward of what the task takes.

        Args:
            given: The task's arguments. Of what it returns, 'loss' is minimized, and every number is a loss to count.
            parts: Batches in this step.
            last: Whether it is the last of them.
        """
        if not self._sums and self._statistics is not None:
            self._statistics.note()
        waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.task.get_trainable_module())
        with waiting:
            with self.accelerator.autocast():
                result = self.task(*given)
            self.accelerator.backward(result['loss'] / parts)
        for key, value in result.items():
            if value.ndim == 0:
                self._sums[key] = self._sums.get(key, 0) + value.detach()

    def update(self, number: int, told_to_stop: bool, ask: bool) -> Step:
        """The optimizer's step with the gradients that are there.

        Args:
            number: Of the step, from 1.
            told_to_stop: Whether this process was.
            ask: Whether the others are asked even where nothing is checked.
        """
        losses, self._sums = self._sums, {}
        alone = self.accelerator.num_processes == 1  # or the others would wait for this one for ever
        bad, stop = (
            self._agree(losses['loss'], told_to_stop) if self.checked or ask else (False, told_to_stop and alone)
        )
        taken = not bad
        if taken:
            optimization.clip_gradients(self.accelerator, self.task, self.args)
            self.optimizer.step()
            taken = not self.accelerator.optimizer_step_was_skipped  # by float16's scaler, until its scale fits
        self.optimizer.zero_grad()
        if isinstance(self.task, CTCTask):
            (self.task.apply_updates if taken else self.task.discard_updates)()
        if taken:
            self.task.update_ema(step=number)
        elif self._statistics is not None:
            self._statistics.put_back()
        return Step(bad, losses, stop)

    def _agree(self, loss: Tensor, told_to_stop: bool) -> tuple[bool, bool]:
        """Whether the step is bad in any process, and whether any was told to stop; a step's one look at the device."""
        bad = ~loss.isfinite() if self.checked else torch.zeros_like(loss, dtype=torch.bool)
        if self.checked and self.accelerator.scaler is None:
            bad = bad | ~self._gradient_norm().isfinite()
        if self.accelerator.num_processes == 1:
            return bool(bad), told_to_stop
        flags = torch.stack([bad.float(), torch.full_like(loss, told_to_stop, dtype=torch.float32)])
        counts = self.accelerator.reduce(flags, 'sum').tolist()
        return counts[0] > 0, counts[1] > 0

    def _gradient_norm(self) -> Tensor:
        module = self.task.get_trainable_module()
        assert module is not None
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _mix(self, images: Tensor, targets: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.mixup is not None and (not self.args.mixup_off_epoch or epoch < self.args.mixup_off_epoch):
            return self.mixup(images, targets)
        if self.mixup is not None:  # mixing has ended, but the criterion still takes soft targets
            smoothing = self.args.smoothing
            one_hot = nn.functional.one_hot(targets, self.num_classes).to(images.dtype)
            targets = one_hot * (1 - smoothing) + smoothing / self.num_classes
        return images, targets, None


class _Statistics:
    """The running statistics of a module's norms, to be put back after a step that is left out."""

    def __init__(self, module: nn.Module) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for part in module.modules():
            if getattr(part, 'running_mean', None) is not None:
                for buffer in part.buffers(recurse=False):
                    kinds.setdefault(buffer.dtype, []).append(buffer)
        self._live = list(kinds.values())
        self._noted = [[torch.empty_like(buffer) for buffer in buffers] for buffers in self._live]

    def note(self) -> None:
        for noted, live in zip(self._noted, self._live):
            torch._foreach_copy_(noted, live)

    def put_back(self) -> None:
        for noted, live in zip(self._noted, self._live):
            torch._foreach_copy_(live, noted)
