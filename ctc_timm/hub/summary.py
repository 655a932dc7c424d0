"""What a run's folder says about itself: its recipe, its weights, and the numbers measured on them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from timm.models import model_entrypoint

from ..data.datasets import split_config
from ..data.digits import NAME
from ..models.catalog import is_repo_id, is_word
from ..models.pretrained_cfg import read_config
from ..runs import Run
from ..utils.errors import UserError, one_line
from ..utils.weights_files import HASH, METADATA_HASH, read_weights, tensors_hash
from .privacy import Private

# Settings that say where things lie or how a run is watched, not what is trained.
_NOT_RECIPE = re.compile(
    r'config|data|data_dir|output|experiment|resume|class_map|initial_checkpoint|log_with|log_interval|workers|'
    r'pin_mem|dataset_download|checkpoint_\w+|keep_every|device|push_to_hub|\w*(token|secret|passw|credential)\w*'
)
_HUB = ('hfds', 'hfids')  # readers of data sets on the Hub
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
    hub_id: str = ''  # of the data set, where it is one on the Hub


@dataclass
class RunDetails:
    """Everything that a publication says of its run, without what must not be published."""

    path: Path
    architecture: str  # the base architecture, by timm's name
    config: dict[str, Any]  # timm's pretrained_cfg of it
    model_args: dict[str, Any]  # what it is built with besides
    weights: Path  # the file that is published
    recipe: dict[str, Any] = field(default_factory=dict)  # the settings that make the run again
    tensors_hash: str = ''  # of the weights
    epoch: int | None = None  # that they are of, from 0
    stage: str = ''  # that this epoch was in
    data: str = ''  # name of its data
    data_id: str = ''  # of its data, where they are a set on the Hub
    data_flag: str = ''  # for data that every reader has elsewhere: '--data-dir FOLDER' or '--dataset hfds/FOLDER'
    val_split: Any = None  # of its data, on which the best epoch was chosen
    source: list[Result] = field(default_factory=list)  # numbers of its own classifier
    transfer: list[Result] = field(default_factory=list)  # and of probes, on other data
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
    def chosen_on_source(self) -> bool:
        """Whether the numbers hold one of the split on which the best epoch was chosen."""
        own = (self.data or 'private data', self.val_split)
        return any((result.dataset, result.split) == own for result in self.source)

    @property
    def results(self) -> list[Result]:
        """The numbers but those of few shots."""
        return [result for result in [*self.source, *self.transfer] if result.shots is None]


def summarize(folder: str | os.PathLike, settings: Collection[str], private: Private | None = None) -> RunDetails:
    """Read a run's folder, leaving out what must not be published, and all but these `settings` of its args.yaml.

    Raises:
        UserError: No sound run, or one with links that lead out of it.
    """
    run, private = Run(folder), private or Private()
    private.folders += run.path.resolve().parents  # in one of which it was probably trained
    if not run.config_file.is_file():
        raise UserError(f'{run}: no run; name a folder with config.json in it, as training writes it')
    architecture, config, model_args = read_config(run.path)
    run.check_links()
    if not run.best_weights.is_file():
        raise UserError(f'{run}: has no best.safetensors yet; let the training finish an epoch')
    tensors, metadata = read_weights(run.best_weights)
    details = RunDetails(run.path, architecture, config, model_args, run.best_weights)
    details.tensors_hash = metadata.get(HASH) or tensors_hash(tensors)
    sealed = METADATA_HASH in metadata  # else anybody may have written any number
    if sealed and metadata.get('epoch', '').isdecimal():
        details.epoch, details.stage = int(metadata['epoch']), metadata.get('stage', '')
    args = run.args() if run.args_file.is_file() else {}
    _read_recipe(details, {key: args[key] for key in sorted(settings & args.keys())}, private)
    own = str(args.get('dataset') or args.get('data_dir') or args.get('data') or '')

    validation = _read_results(run.validation / 'results.json', details)
    rows = [{**validation, 'target': validation['dataset']}] if validation.get('dataset') else []
    if validation.get('dataset') != own and sealed:  # the accuracy that training wrote beside the weights
        metrics = {key: metadata.get(f'eval_{key}') for key in ('top1', 'top5')}
        rows.insert(0, {**metrics, 'target': own, 'split': details.val_split})
    details.source = _results(rows, private)
    for file in sorted(run.linear_probe.glob('*/results.json')):
        rows = _read_results(file, details).get('rows', [])
        details.transfer += _results([{'method': 'probe', **row} for row in rows if isinstance(row, dict)], private)
    names = run.class_names()
    if not names and validation.get('dataset') == own:  # a run of before names were kept
        listed = validation.get('per_class')
        found = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        names = {row['class']: str(row.get('name') or '') for row in found if isinstance(row.get('class'), int)}
    details.class_names = _class_names(names, config['num_classes'], private)
    details.pictures = _pictures(details, run.dynamics / 'results.json', private)
    return details


def _read_recipe(details: RunDetails, args: dict[str, Any], private: Private) -> None:
    """Take the recipe and the name of the data from a run's settings."""
    name, root = str(args.get('dataset') or ''), str(args.get('data_dir') or args.get('data') or '')
    reader, _, rest = split_config(name)[0].partition('/')
    details.data, details.data_id = _public_name(name or root, private), _hub_id(name, private)
    details.data_flag = '--data-dir FOLDER' if root else ''
    details.val_split = args.get('val_split')
    values = {k: v for k, v in args.items() if isinstance(k, str) and not _NOT_RECIPE.fullmatch(k)}
    if reader in _HUB and rest and not details.data_id:
        details.data_flag = f'--dataset {reader}/FOLDER'
        values.pop('dataset', None)
    if str(values.get('model', '')).startswith('local-dir:'):
        values['model'] = details.architecture
    shown = {k: v for k, v in values.items() if v is not None and v not in ('', {}, [])}
    if (watched := str(shown.get('monitor_target', ''))) != NAME and not _hub_id(watched, private):
        shown.pop('monitor_target', None)
    if not all(name == NAME or _hub_id(str(name), private) for name in shown.get('keep_report', ())):
        shown.pop('keep_report')
    details.recipe = private.clean(shown)
    lost = [key for key in sorted(values) if values[key] and details.recipe.get(key) != values[key]]
    details.notes += [f'`{key}` or a part of it, which tells something private' for key in lost]


def _public_name(data: str, private: Private) -> str:
    """The name of data that may be shown: a repo's id on the Hub, or the last part of where they lie."""
    name = re.split(r'[\\/]', data.rstrip('\\/'))[-1]
    name = _hub_id(data, private) or name
    return '' if name in ('', '.', '..') or private.find(name) else name


def _hub_id(data: str, private: Private) -> str:
    """The id of a data set on the Hub, as its name in a run's settings tells it; empty for all others."""
    reader, _, rest = split_config(data)[0].partition('/')
    on_hub = reader in _HUB and (is_repo_id(rest) or is_word(rest)) and not private.is_file(rest)
    return rest if on_hub and not private.find(rest) else ''


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
    results = _read_json(file) if file.is_file() else {}
    if not results or results.get(HASH) == details.tensors_hash:
        return results
    reason = f'is of other weights than {details.weights.name}' if HASH in results else 'names no weights by their hash'
    details.notes.append(f'{file.relative_to(details.path)}, which {reason}; measure again')
    return {}


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
        hub_id = _hub_id(str(row.get('target') or ''), private)
        found.append(Result(dataset, split, method, top1, low, high, top5, count, shots, hub_id))
    return found


def _percent(value: Any) -> float | None:
    try:
        return float(value) if 0 <= float(value) <= 100 else None
    except (TypeError, ValueError):
        return None


def _count(value: Any) -> int | None:
    """A positive number, as JSON or the metadata of weights hold it."""
    return int(value) if type(value) in (int, str) and re.fullmatch(r'[1-9][0-9]{0,15}', str(value)) else None


def _class_names(known: dict[int, Any], num_classes: int, private: Private) -> list[str]:
    """Names of all classes, where each has its own and none is private."""
    names = [name for name in map(known.get, range(num_classes)) if isinstance(name, str) and name]
    named = len(set(names)) == len(known) == num_classes
    return names if named and not any(map(private.find, names)) else []


def _pictures(details: RunDetails, dynamics: Path, private: Private) -> dict[str, Path]:
    """The run's pictures by title, unless what is written in them is private."""
    targets = _read_json(dynamics).get('targets') if dynamics.is_file() else None
    shown = [str(name).rstrip('/').rpartition('/')[2] for name in targets] if isinstance(targets, list) else []
    if any(map(private.find, [details.path.resolve().name, *shown])):
        details.notes.append('the pictures, whose titles show something private')
        return {}
    return {title: details.path / name for name, title in _PICTURES.items() if (details.path / name).is_file()}
