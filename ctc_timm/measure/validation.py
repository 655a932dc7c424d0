"""Accuracy of a model from anywhere on a data set: timm's evaluator, with accuracy by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from timm.data.loader import PrefetchLoader
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor

from ..data.datasets import check_labels, match_classes, open_split
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config, fit_channels
from ..models.backbones import architecture, check_input
from ..models.layout import use_layout
from ..models.loading import load_model, named_source
from ..runs import Run
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.text import sanitize
from ..utils.weights_files import HASH, tensors_hash
from .results import write_csv, write_json
from .settings import ValidateSettings
from .timm_options import as_timm, check_results_file, pool_at_test_time, real_labels, valid_labels

logger = get_logger(__name__)


def validate(settings: ValidateSettings) -> dict[str, Any]:
    """Measure accuracy, write results.json, results.csv and per_class.csv, log, and return what results.json holds.

    Raises:
        UserError: A model or data that can't be opened, or that do not fit each other.
    """
    data, chosen, named = settings.data, settings.validation, named_source(settings.source)
    accelerator = create_accelerator(settings.precision)
    split, columns = chosen.split or data.val_split, valid_labels(chosen.valid_labels)
    if chosen.results_file:
        check_results_file(chosen.results_file)
    options = {'num_classes': chosen.num_classes, 'in_chans': data.in_chans, **settings.built.model_kwargs}
    loaded = load_model(**named, **options)
    classes = loaded.model.num_classes if columns is None else len(columns)
    if columns is not None and int(columns.max()) >= loaded.model.num_classes:
        fault = f'output {int(columns.max())} of a model with {loaded.model.num_classes}'
        raise UserError(f'`valid_labels` {chosen.valid_labels}: {fault}; outputs are counted from 0')
    if not split:
        raise UserError("`val_split` '': names no split; name one with `split`")
    with accelerator.main_process_first():
        source = open_split(fit_channels(data, loaded.model), split)
        if loaded.run is not None and not data.class_map and columns is None:
            source = match_classes(source, Run(loaded.run).class_names(), f'the run {loaded.run}')
    check_labels(source, classes, split)
    config = data_config(data, loaded.model)
    check_input(loaded.model, config['input_size'])
    facts = {
        'model': architecture(loaded.model),
        'weights': loaded.weights,
        HASH: tensors_hash(loaded.model.state_dict()),
        'parameters': sum(p.numel() for p in loaded.model.parameters()),
        'dataset': source.name,
        'split': split,
    }
    model = loaded.model
    if chosen.test_pool:
        model, config = pool_at_test_time(model, config)
    device = accelerator.device
    model = use_layout(model.to(device), settings.built.channels_last, device)
    loader = create_eval_loader(source.dataset, settings.loader, config, device, accelerator.num_processes > 1)
    real = real_labels(chosen.real_labels, source, classes, accelerator) if chosen.real_labels else None

    def outputs_of(images: Tensor) -> Tensor:
        output = model(images) if columns is None else model(images)[:, columns]
        if real is not None:
            real.add_result(output)
        return output

    model.eval()
    metrics = evaluate(outputs_of, loader, accelerator, classes)
    if real is not None:
        metrics |= dict(zip(('top1', 'top5'), map(real.get_accuracy, real.topk)))
    accuracies = {index: top1 for index, top1 in enumerate(metrics['per_class']) if top1 is not None}
    names = source.class_names
    per_class = [{'class': i, 'name': names.get(i, str(i)), 'top1': top1} for i, top1 in accuracies.items()]
    results = {
        **facts,
        'num_images': metrics['num_images'],
        'input_size': list(config['input_size']),
        **{name: config[name] for name in ('interpolation', 'crop_pct')},
        **{name: metrics[name] for name in ('loss', 'top1', 'top5')},
        'mean_per_class': sum(row['top1'] for row in per_class) / max(len(per_class), 1),
        'per_class': per_class,
    }
    changed = {name: getattr(chosen, name) for name in ('real_labels', 'valid_labels', 'test_pool')}
    if any(changed.values()):
        results |= changed
        loaded.run = None  # whose results hold its own accuracy, which is published
    if accelerator.is_main_process:
        folder = Path(chosen.output or (loaded.run or Path('results') / loaded.name) / 'validation')
        write_json(folder / 'results.json', results)
        write_csv(folder / 'results.csv', [{k: v for k, v in results.items() if not isinstance(v, list)}])
        write_csv(folder / 'per_class.csv', per_class)
        if chosen.results_file:
            file, row = Path(chosen.results_file), as_timm(results)
            write_json(file, row) if file.suffix == '.json' else write_csv(file, [row])
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
    model: Callable[[Tensor], Tensor],
    loader: PrefetchLoader,
    accelerator: Accelerator,
    num_classes: int,
) -> dict[str, Any]:
    """Pass a split through a model in evaluation mode, or what gives its logits; see `PerClassEvaluator.compute`."""
    evaluator = PerClassEvaluator(num_classes, accelerator.device, evaluation_sample_limit(loader))
    for images, targets in progress_bar(loader, 'validate', accelerator):
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
