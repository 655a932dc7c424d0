"""Options of timm's validation script: some of a model's classes, ImageNet-ReaL, pooling at test time, its own rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import RealLabelsImagenet
from timm.layers import apply_test_time_pool
from torch import Tensor

from ..data.datasets import DatasetSplit
from ..models.backbones import architecture
from ..utils.errors import UserError, one_line
from ..utils.settings import shorten


def valid_labels(file: str) -> Tensor | None:
    """The outputs that a file says count, [C]: the classes of a data set that has some of a model's."""
    if not file:
        return None
    try:
        columns = [int(word) for word in Path(file).read_text(encoding='utf-8').split()]
    except (OSError, ValueError) as error:
        raise UserError(f'`valid_labels` {file}: {one_line(error)}; it must hold a class number a line') from None
    if not columns or min(columns) < 0 or len(set(columns)) < len(columns):
        raise UserError(f'`valid_labels` {file}: must hold a class number from 0 a line, each once')
    return torch.tensor(columns)


def real_labels(file: str, source: DatasetSplit, classes: int, accelerator: Accelerator) -> RealLabelsImagenet:
    """timm's scores by the labels of ImageNet-ReaL (arXiv 2006.07159), of which an image has none or several."""
    where = f'`real_labels` {file}'
    if accelerator.num_processes > 1:
        raise UserError(f'{where}: is for one process')
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{where}: is no JSON that can be read: {one_line(error)}') from None
    if not isinstance(content, list):
        raise UserError(f'{where}: must hold a list of classes for each image, got a {type(content).__name__}')
    for number, labels in enumerate(content, 1):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
            fault = f'image {number} must have a list of classes from 0 to {classes - 1}'
            raise UserError(f'{where}: {fault}, got {shorten(labels)}')
    try:
        names = source.dataset.filenames(basename=True)
        real = RealLabelsImagenet(names, real_json=file, topk=(1, min(5, classes)))
    except AssertionError:
        raise UserError(f'{where}: is not for the {len(names):,} images of {source.name}') from None
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UserError(f'{where}: {source.name} has no file names: {one_line(error)}') from None
    if unknown := [name for name in names if name not in real.real_labels]:
        raise UserError(f'{where}: has no image {unknown[0]}, as ILSVRC2012_val_00000001.JPEG')
    if not any(content):
        raise UserError(f'{where}: has no label of any image')
    return real


def check_results_file(file: str) -> None:
    """Refuse a file that can't be written, before its numbers are measured."""
    path = Path(file).absolute()
    if path.suffix not in ('.csv', '.json'):
        raise UserError(f'`results_file` {file}: must end in .csv or .json')
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        fault = 'is a folder' if path.is_dir() else f'{folder} is no folder that can be written to'
        raise UserError(f'`results_file` {file}: {fault}')


def pool_at_test_time(model: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Classify each place of images that are larger than the model's own, and pool the answers, as timm does."""
    name = architecture(model)
    try:
        pooling, pooled = apply_test_time_pool(model, config)
        if pooled:
            pooling.eval()(torch.zeros(1, *config['input_size']))
    except Exception as error:  # of any architecture
        raise UserError(f'`test_pool`: {name} does not fit it: {one_line(error)}') from None
    return pooling, {**config, 'crop_pct': 1.0} if pooled else config


def as_timm(results: dict[str, Any]) -> dict[str, Any]:
    """A row under the names that timm's validation script writes."""
    scores: dict[str, float] = {}
    for name in ('top1', 'top5'):
        scores |= {name: round(results[name], 4), f'{name}_err': round(100 - results[name], 4)}
    size = {'param_count': round(results['parameters'] / 1e6, 2), 'img_size': results['input_size'][-1]}
    return {'model': results['model'], **scores, **size, **{k: results[k] for k in ('crop_pct', 'interpolation')}}
