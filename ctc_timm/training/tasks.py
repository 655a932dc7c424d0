"""The task that the settings describe: CTC's two stages, or supervised training."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..contrast.task import CTCTask
from ..data.mixup import InstanceMixup
from ..utils.tasks import TrainerTask
from .settings import TrainSettings


class SupervisedTask(TrainerTask, ClassificationTask):
    """Classification without CTC, of the whole model or of part of it."""


@dataclasses.dataclass
class PrepareBatch:
    """Makes the batch that a classification task takes, (images, targets, index, lam), from one of the loader."""

    mixup: InstanceMixup | None
    off_epoch: int  # from which nothing is mixed; 0 for never. The criterion still takes soft targets then.

    def __call__(self, batch: tuple[Any, ...], epoch: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mix images [B, C, H, W] and classes [B] into soft targets [B, K]; lam [B] is None where nothing is mixed."""
        images, targets, index = batch
        lam = None
        if self.mixup is not None and (not self.off_epoch or epoch < self.off_epoch):
            images, targets, lam = self.mixup(images, targets)
        elif self.mixup is not None:
            classes, smoothing = self.mixup.num_classes, self.mixup.smoothing
            targets = nn.functional.one_hot(targets, classes).to(images.dtype) * (1 - smoothing) + smoothing / classes
        return images, targets, index, lam


def create_task(
    settings: TrainSettings, model: Any, labels_N: Tensor | None, accelerator: Accelerator, frozen: Collection[str]
) -> TrainerTask:
    """Create the task that the settings describe; those of CTC are, beside `mode`, arguments of `CTCTask`.

    `frozen` names modules that stay in evaluation mode, so that their batch norms keep their statistics.
    `labels_N`, the class of each training image, is None for streams, which need mode 'vanilla'.

    Raises:
        UserError: What CTC refuses, such as a temperature too low.
    """
    loss = settings.loss
    criterion = {
        'loss_type': 'bce' if loss.bce_loss else None,
        'smoothing': loss.smoothing,
        'soft_targets': settings.mixup.active,
        'bce_target_thresh': loss.bce_target_thresh if loss.bce_loss else None,
        'bce_sum': loss.bce_sum,
    }
    common: dict[str, Any] = {'criterion_kwargs': criterion, 'device': accelerator.device, 'verbose': False}
    if settings.ctc.mode == 'vanilla':
        task: TrainerTask = SupervisedTask(model, **common)
        task.frozen = tuple(frozen)
        return task
    assert labels_N is not None
    options = {**dataclasses.asdict(settings.ctc), 'bank_dtype': getattr(torch, settings.ctc.bank_dtype)}
    if options.pop('mode') == 'distill':
        options |= {'temporal_term': 'cosine', 'num_negatives': 1, 'embed_dim': 1}
    task = CTCTask(model, labels_N, **options, seed=settings.run.seed, rank=accelerator.process_index, **common)
    task.frozen = tuple(frozen)
    return task
