"""Accuracy of a model on a split: timm's evaluator, with accuracy by class."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from timm.data.loader import PrefetchLoader
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import nn

from ..utils.progress import progress_bar


class PerClassEvaluator(ClassificationEvaluator):
    """Counts each class's images and hits beside what timm's evaluator counts.

    Args:
        num_classes: C.
        device: Where the counts are kept.
        max_samples: This process's images that are not padding.
    """

    def __init__(self, num_classes: int, device: torch.device, max_samples: int | None = None) -> None:
        self.num_classes = num_classes
        super().__init__(device, max_samples=max_samples)

    def reset(self) -> None:
        """Start anew."""
        super().reset()
        self.per_class_2C = torch.zeros(2, self.num_classes, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits [B, C] and classes [B]."""
        before = self.num_samples
        super().update(output, target)
        count = self.num_samples - before
        output, target = output[:count], target[:count]
        hit = output.argmax(dim=1) == target
        self.per_class_2C[0] += torch.bincount(target, minlength=self.num_classes)
        self.per_class_2C[1] += torch.bincount(target[hit], minlength=self.num_classes)

    def compute(self, distributed: bool = False) -> Any:
        """Return 'loss', 'top1', 'top5', 'per_class' [C] in percent, None for a class without images, 'num_images'."""
        metrics: Any = super().compute(distributed=distributed)
        totals = self.per_class_2C.clone()
        if distributed:
            torch.distributed.all_reduce(totals)
        images, hits = totals.tolist()
        metrics['per_class'] = [100 * hit / count if count else None for count, hit in zip(images, hits)]
        metrics['num_images'] = sum(images)
        return metrics


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: PrefetchLoader,
    accelerator: Accelerator,
    num_classes: int,
    channels_last: bool = False,
    description: str = 'validate',
) -> dict[str, Any]:
    """Pass a split through a model, left in evaluation mode.

    Args:
        model: Gives logits.
        loader: Of `create_eval_loader`.
        accelerator: Precision and processes.
        num_classes: C.
        channels_last: Memory layout of the images.
        description: For the progress bar.

    Returns:
        See `PerClassEvaluator.compute`; over all processes, each image counted once.
    """
    model.eval()
    evaluator = PerClassEvaluator(num_classes, accelerator.device, evaluation_sample_limit(loader))
    for images, targets in progress_bar(loader, description, accelerator):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        evaluator.update(output, targets)
    return evaluator.compute(distributed=accelerator.num_processes > 1)
