"""`validate.py`: accuracy of a model from anywhere on a data set, to results.json and CSV."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from ..cli.arguments import KeyValues, Parser, positive_int
from ..cli.model_flags import add_source_arguments
from ..data.datasets import DatasetSplit, check_labels, open_split
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config
from ..models.backbones import check_input
from ..models.loading import LoadedModel, load_model, named_source
from ..utils.distributed import add_precision_arguments, create_accelerator
from ..utils.text import sanitize
from .evaluation import evaluate


def add_arguments(parser: Parser) -> None:
    """Declare the flags of a validation, by timm's names."""
    group = add_source_arguments(parser)
    group.add_argument('--num-classes', type=positive_int, metavar='N', help="outputs; the weights' own when not given")
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more for the model'
    )
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    add_precision_arguments(group)
    group = parser.add_argument_group('Validation')
    group.add_argument('--split', default='', metavar='NAME', help='same as --val-split')
    group.add_argument(
        '--output',
        default='',
        metavar='DIR',
        help="where the results go; the run's validation/ or results/NAME when not given",
    )


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write.

    Returns:
        What results.json holds.

    Raises:
        UserError: A model or data that can't be had, or that do not fit each other.
    """
    source, architecture, flag = named_source(args)
    accelerator = create_accelerator(args)
    split = args.split or args.val_split
    with accelerator.main_process_first():
        opened = open_split(args, split)
    options = {'num_classes': args.num_classes, 'in_chans': args.in_chans, **args.model_kwargs}
    loaded = load_model(source, architecture, flag, **options)
    num_classes: int = loaded.model.num_classes
    check_labels(opened, num_classes, split)
    config = data_config(args, loaded.model)
    check_input(loaded.model, config['input_size'])
    model = loaded.model.to(accelerator.device)
    loader = create_eval_loader(opened.dataset, args, config, accelerator.device, accelerator.num_processes > 1)
    metrics = evaluate(model, loader, accelerator, num_classes, args.channels_last)
    results = _results(loaded, model, opened, split, config, metrics)
    if accelerator.is_main_process:
        folder = Path(args.output) if args.output else (loaded.run or Path('results') / loaded.name) / 'validation'
        _write(folder, results)
        print(_table(results, folder))
    accelerator.wait_for_everyone()
    return results


def _results(
    loaded: LoadedModel,
    model: Any,
    opened: DatasetSplit,
    split: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    per_class = [
        {'class': index, 'name': opened.class_names.get(index, str(index)), 'top1': accuracy}
        for index, accuracy in enumerate(metrics['per_class'])
        if accuracy is not None
    ]
    return {
        'model': model.pretrained_cfg.get('architecture', type(model).__name__),
        'weights': loaded.weights,
        'parameters': sum(p.numel() for p in model.parameters()),
        'dataset': opened.name,
        'split': split,
        'num_images': metrics['num_images'],
        'input_size': list(config['input_size']),
        'interpolation': config['interpolation'],
        'crop_pct': config['crop_pct'],
        'loss': metrics['loss'],
        'top1': metrics['top1'],
        'top5': metrics['top5'],
        'mean_per_class': sum(row['top1'] for row in per_class) / max(len(per_class), 1),
        'per_class': per_class,
    }


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(results, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    flat = {k: v for k, v in results.items() if not isinstance(v, list)}
    for name, rows in (('results.csv', [flat]), ('per_class.csv', results['per_class'])):
        with (folder / name).open('w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _table(results: dict[str, Any], folder: Path) -> str:
    worst = sorted(results['per_class'], key=lambda row: row['top1'])[:3]
    hardest = ', '.join(f'{sanitize(row["name"])} {row["top1"]:.1f} %' for row in worst)
    return (
        f'{results["model"]} ({results["weights"]}) on {results["num_images"]:,} images of {results["dataset"]}, '
        f'split {results["split"]}\n'
        f'  top-1           {results["top1"]:7.3f} %\n'
        f'  top-5           {results["top5"]:7.3f} %\n'
        f'  mean per class  {results["mean_per_class"]:7.3f} %\n'
        f'  loss            {results["loss"]:7.4f}\n'
        f'  hardest         {hardest}\n'
        f'  written to {folder / "results.json"}, results.csv, per_class.csv'
    )
