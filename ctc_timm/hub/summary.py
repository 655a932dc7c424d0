"""What a run's folder says about itself: its recipe, its weights, and the numbers measured on them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from timm.models import model_entrypoint

from ..data.datasets import split_config
from ..models.catalog import is_repo_id
from ..models.pretrained_cfg import read_config
from ..runs import Run, check_hash, weights_metadata
from ..utils.errors import UserError, one_line
from .privacy import Private

# Settings that say where things lie or how a run is watched, not what is trained.
_NOT_RECIPE = re.compile(
    r'config|data|data_dir|output|experiment|resume|class_map|initial_checkpoint|log_with|log_interval|workers|'
    r'pin_mem|dataset_download|checkpoint_\w+|keep_every|device|push_to_hub|\w*(token|secret|passw|credential)\w*'
)
_PICTURES = {
    'dynamics/tradeoff.png': 'Source accuracy against transfer accuracy over the training',
    'dynamics/path.png': 'Path of the training in the plane of source and transfer accuracy',
    'dynamics/information.png': 'Information the features keep about image and label over the training',
    'dynamics/compression.png': 'How much the features are compressed over the training',
    'plots/training.png': 'Loss, accuracy and learning rate over the training',
}


@dataclass(frozen=True)
class Result:
    """One measured accuracy with its 95% interval, in percent."""

    dataset: str
    split: str
    method: str  # probe that reads frozen features, such as 'ridge'; empty for the model's own classifier
    top1: float
    low: float | None
    high: float | None
    top5: float | None
    num_images: int | None
    shots: int | None = None  # training images of each class; None for all


@dataclass
class RunDetails:
    """Everything that a publication says of its run, without what must not be published."""

    path: Path
    architecture: str  # the base architecture, by timm's name
    config: dict[str, Any]  # timm's pretrained_cfg of it
    model_args: dict[str, Any]  # what it is built with besides
    weights: Path  # the file that is published
    recipe: dict[str, Any] = field(default_factory=dict)  # the settings that make the run again
    data: str = ''  # name of its data
    data_flag: str = ''  # for data that every reader has elsewhere: '--data-dir FOLDER' or '--dataset hfds/FOLDER'
    val_split: Any = None  # of its data, on which the best epoch was chosen
    source: list[Result] = field(default_factory=list)  # numbers on the data it was trained for
    transfer: list[Result] = field(default_factory=list)  # and on other data
    class_names: list[str] = field(default_factory=list)  # in the order of the classes, or empty
    pictures: dict[str, Path] = field(default_factory=dict)  # files by their titles
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    @property
    def stock(self) -> bool:
        """Whether the architecture is timm's own, so that its weights load without this package."""
        return model_entrypoint(self.architecture).__module__.startswith('timm.')

    @property
    def is_ctc(self) -> bool:
        """Whether it was trained by CTC."""
        return self.recipe.get('mode', 'ctc') == 'ctc'

    @property
    def results(self) -> list[Result]:
        """The numbers but those of few shots."""
        return [result for result in [*self.source, *self.transfer] if result.shots is None]


def summarize(folder: str | os.PathLike, private: Private | None = None) -> RunDetails:
    """Read a run's folder, or raise a UserError for no sound one, leaving out what must not be published."""
    run, private = Run(folder), private or Private()
    if not run.config_file.is_file():
        raise UserError(f'{run}: no run; name a folder with config.json in it, as training writes it')
    architecture, config, model_args = read_config(run.path)
    if not run.best_weights.is_file():
        raise UserError(f'{run}: has no best.safetensors yet; let the training finish an epoch')
    check_hash(run.best_weights)
    details = RunDetails(run.path, architecture, config, model_args, run.best_weights)
    args = run.args() if run.args_file.is_file() else {}
    _read_recipe(details, args, private)

    validation = _read_results(run.validation / 'results.json', details)
    row = {**validation, 'target': validation.get('dataset')}
    if not validation:  # the accuracy that training wrote beside the weights
        metadata = weights_metadata(run.best_weights)
        row = {key: metadata.get(f'eval_{key}') for key in ('top1', 'top5', 'num_images')}
        row |= {'target': args.get('dataset') or args.get('data_dir') or args.get('data'), 'split': details.val_split}
    details.source = _results([row], private)
    for file in sorted(run.linear_probe.glob('*/results.json')):
        rows = _read_results(file, details).get('rows', [])
        details.transfer += _results([{'method': 'probe', **row} for row in rows if isinstance(row, dict)], private)
    details.class_names = _class_names(validation.get('per_class'), config['num_classes'], private)
    details.pictures = _pictures(details, run.dynamics / 'results.json', private)
    return details


def _read_recipe(details: RunDetails, args: dict[str, Any], private: Private) -> None:
    """Take the recipe and the name of the data from a run's settings."""
    name, root = str(args.get('dataset') or ''), str(args.get('data_dir') or args.get('data') or '')
    reader, _, rest = split_config(name)[0].partition('/')
    details.data = _public_name(name or root, private)
    details.data_flag = '--data-dir FOLDER' if root else ''
    details.val_split = args.get('val_split')
    values = {k: v for k, v in args.items() if isinstance(k, str) and not _NOT_RECIPE.fullmatch(k)}
    if reader in ('hfds', 'hfids') and rest and details.data != rest:
        details.data_flag = f'--dataset {reader}/FOLDER'
        values.pop('dataset', None)
    if str(values.get('model', '')).startswith('local-dir:'):
        values['model'] = details.architecture
    details.recipe = private.clean({k: v for k, v in values.items() if v is not None and v not in ('', {}, [])})
    lost = [key for key in sorted(values) if values[key] and details.recipe.get(key) != values[key]]
    details.notes += [f'`{key}` or a part of it, which tells something private' for key in lost]


def _public_name(data: str, private: Private) -> str:
    """The name of data that may be shown: a repo's id on the Hub, or the last part of where they lie."""
    reader, _, rest = split_config(data)[0].partition('/')
    name = re.split(r'[\\/]', data.rstrip('\\/'))[-1]
    if reader in ('hfds', 'hfids') and is_repo_id(rest) and not Path(rest).exists():
        name = rest
    return '' if name in ('', '.', '..') or private.find(name) else name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: {one_line(error)}') from None
    if not isinstance(content, dict):
        raise UserError(f'{file}: must be a mapping')
    return content


def _read_results(file: Path, details: RunDetails) -> dict[str, Any]:
    """Read a measurement, if it is one of the weights that are published."""
    results, weights = _read_json(file) if file.is_file() else {}, details.weights
    measured, reason = Path(str(results.get('weights', ''))), ''
    if measured.name not in (weights.name, details.path.name) or measured.parent.name == 'weights':
        reason = f'is of other weights than {weights.name}'
    elif file.stat().st_mtime + 2 < weights.stat().st_mtime:
        reason = f'is older than {weights.name}; measure again'
    details.notes += [f'{file.relative_to(details.path)}, which {reason}'] if results and reason else []
    return {} if reason else results


def _results(rows: list[dict[str, Any]], private: Private) -> list[Result]:
    """Those of the rows that hold an accuracy, with texts and numbers that can be shown."""
    found = []
    for row in rows:
        top1, low, high, top5 = (_percent(row.get(key)) for key in ('top1', 'top1_low', 'top1_high', 'top5'))
        if top1 is None:
            continue
        count, shots = _count(row.get('num_test')) or _count(row.get('num_images')), _count(row.get('shots'))
        if count and (low is None or high is None):
            interval = binomtest(round(top1 / 100 * count), count).proportion_ci(method='wilson')
            low, high = 100 * interval.low, 100 * interval.high
        dataset = _public_name(str(row.get('target') or ''), private) or 'private data'
        split, method = str(row.get('split') or ''), str(row.get('method', ''))
        split = '' if private.find(split) else split
        method = method if re.fullmatch(r'[\w -]{0,40}', method) and not private.find(method) else 'probe'
        found.append(Result(dataset, split, method, top1, low, high, top5, count, shots))
    return found


def _percent(value: Any) -> float | None:
    try:
        return float(value) if 0 <= float(value) <= 100 else None
    except (TypeError, ValueError):
        return None


def _count(value: Any) -> int | None:
    """A positive number, as JSON or the metadata of weights hold it."""
    return int(value) if type(value) in (int, str) and re.fullmatch(r'[1-9][0-9]{0,15}', str(value)) else None


def _class_names(rows: Any, num_classes: int, private: Private) -> list[str]:
    """Names of all classes, where each has its own and none is private."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    known = {row['class']: row.get('name') for row in rows if isinstance(row.get('class'), int)}
    names = [name for name in map(known.get, range(num_classes)) if isinstance(name, str) and name]
    named = len(set(names)) == len(rows) == num_classes and names != list(map(str, range(num_classes)))
    return names if named and not any(map(private.find, names)) else []


def _pictures(details: RunDetails, dynamics: Path, private: Private) -> dict[str, Path]:
    """The run's pictures by title, unless what is written in them is private."""
    targets = _read_json(dynamics).get('targets') if dynamics.is_file() else None
    shown = [str(name).rstrip('/').rpartition('/')[2] for name in targets] if isinstance(targets, list) else []
    if any(map(private.find, [details.path.resolve().name, *shown])):
        details.notes.append('the pictures, whose titles show something private')
        return {}
    return {title: details.path / name for name, title in _PICTURES.items() if (details.path / name).is_file()}
