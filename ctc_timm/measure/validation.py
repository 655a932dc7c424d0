"""Accuracy of a model from anywhere on a data set: timm's evaluator, with accuracy by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from timm.data.loader import PrefetchLoader
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from ..data.datasets import check_labels, open_split
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config, fit_channels
from ..models.backbones import architecture, check_input
from ..models.loading import load_model, named_source
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.text import sanitize
from .results import write_csv, write_json
from .settings import ValidateSettings

logger = get_logger(__name__)


def validate(settings: ValidateSettings) -> dict[str, Any]:
    """Measure accuracy, write results.json, results.csv and per_class.csv, log, and return what results.json holds.

    Raises:
        UserError: A model or data that can't be opened, or that do not fit each other.
    """
    data, chosen, named = settings.data, settings.validation, named_source(settings.source)
    accelerator = create_accelerator(settings.precision)
    split = chosen.split or data.val_split
    options = {'num_classes': chosen.num_classes, 'in_chans': data.in_chans, **settings.built.model_kwargs}
    loaded = load_model(**named, **options)
    if not split:
        raise UserError("`val_split` '': names no split; name one with `split`")
    with accelerator.main_process_first():
        source = open_split(fit_channels(data, loaded.model), split)
    check_labels(source, loaded.model.num_classes, split)
    config = data_config(data, loaded.model)
    check_input(loaded.model, config['input_size'])
    model, device = loaded.model.to(accelerator.device), accelerator.device
    loader = create_eval_loader(source.dataset, settings.loader, config, device, accelerator.num_processes > 1)
    metrics = evaluate(model, loader, accelerator, model.num_classes, settings.built.channels_last)
    accuracies = {index: top1 for index, top1 in enumerate(metrics['per_class']) if top1 is not None}
    names = source.class_names
    per_class = [{'class': i, 'name': names.get(i, str(i)), 'top1': top1} for i, top1 in accuracies.items()]
    results = {
        'model': architecture(model),
        'weights': loaded.weights,
        'parameters': sum(p.numel() for p in model.parameters()),
        'dataset': source.name,
        'split': split,
        'num_images': metrics['num_images'],
        'input_size': list(config['input_size']),
        **{name: config[name] for name in ('interpolation', 'crop_pct')},
        **{name: metrics[name] for name in ('loss', 'top1', 'top5')},
        'mean_per_class': sum(row['top1'] for row in per_class) / max(len(per_class), 1),
        'per_class': per_class,
    }
    if accelerator.is_main_process:
        folder = Path(chosen.output or (loaded.run or Path('results') / loaded.name) / 'validation')
        write_json(folder / 'results.json', results)
        write_csv(folder / 'results.csv', [{k: v for k, v in results.items() if not isinstance(v, list)}])
        write_csv(folder / 'per_class.csv', per_class)
        logger.info(f'{table_of(results)}\n  written to {folder / "results.json"}, results.csv, per_class.csv')
    accelerator.wait_for_everyone()
    return results


def table_of(results: dict[str, Any]) -> str:
    """Format what results.json holds for a terminal."""
    worst = sorted(results['per_class'], key=lambda row: row['top1'])[:3]
    hardest = ', '.join(f'{sanitize(row["name"])} {row["top1"]:.1f} %' for row in worst)
    lines = [
        '{model} ({weights}) on {num_images:,} images of {dataset}, split {split}',
        'top-1           {top1:7.3f} %',
        'top-5           {top5:7.3f} %',
        'mean per class  {mean_per_class:7.3f} %',
        'loss            {loss:7.4f}',
    ]
    return '\n  '.join([*(line.format(**results) for line in lines), f'hardest         {hardest}'])


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: PrefetchLoader, accelerator: Accelerator, num_classes: int, channels_last: bool = False
) -> dict[str, Any]:
    """Pass a split through a model, which is left in evaluation mode; see `PerClassEvaluator.compute`."""
    model.eval()
    evaluator = PerClassEvaluator(num_classes, accelerator.device, evaluation_sample_limit(loader))
    for images, targets in progress_bar(loader, 'validate', accelerator):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        evaluator.update(output, targets)
    return evaluator.compute(distributed=accelerator.num_processes > 1)


class PerClassEvaluator(ClassificationEvaluator):
    """timm's evaluator, which also counts the images and hits of each of C classes."""

    def __init__(self, num_classes: int, device: torch.device, max_samples: int | None = None) -> None:
        self.num_classes = num_classes
        super().__init__(device, max_samples=max_samples)

    def reset(self) -> None:
        super().reset()
        self.per_class_2C = torch.zeros(2, self.num_classes, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch: logits [B, C] and classes [B]; without the padding beyond `max_samples`."""
        before = self.num_samples
        super().update(output, target)
        output, target = output[: self.num_samples - before], target[: self.num_samples - before]
        for row, classes in enumerate((target, target[output.argmax(dim=1) == target])):
            self.per_class_2C[row] += torch.bincount(classes, minlength=self.num_classes)

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
