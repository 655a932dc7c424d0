"""What a run's folder says about itself: its recipe, its weights, and the numbers measured on them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import is_model, model_entrypoint
from timm.models._hub import load_model_config_from_path

from ..models.catalog import base_of, is_repo_id
from ..models.pretrained_cfg import check_model_args, known_facts
from ..runs import check_hash
from ..utils.errors import UserError, one_line
from ..utils.yaml_files import read_mapping
from .privacy import Private

# Flags that say where things lie or how a run is watched, not what is trained.
_NOT_RECIPE = re.compile(
    r'config|data|data_dir|output|experiment|resume|class_map|initial_checkpoint|log_with|log_interval|workers|'
    r'pin_mem|dataset_download|checkpoint_\w+|keep_every|device|push_to_hub|\w*(token|secret|passw|credential)\w*'
)
_PICTURES = {
    'tradeoff': 'Source accuracy against transfer accuracy over the training',
    'path': 'Path of the training in the plane of source and transfer accuracy',
    'information': 'Information the features keep about image and label over the training',
    'compression': 'How much the features are compressed over the training',
}


@dataclass(frozen=True)
class Result:
    """One measured number with its interval.

    Attributes:
        dataset: Name of the data, as the run knows it.
        split: Of the data, where it is known.
        method: Empty for the model itself, else how frozen features were read, such as 'ridge'.
        top1: Accuracy in percent.
        low: Lower end of its 95% interval, or None.
        high: Upper end, or None.
        top5: Accuracy in percent, or None.
        num_images: Images it was measured on, or None.
        shots: Training images a class, or None for all.
    """

    dataset: str
    split: str
    method: str
    top1: float
    low: float | None
    high: float | None
    top5: float | None
    num_images: int | None
    shots: int | None = None


@dataclass
class RunDetails:
    """A run that can be published.

    Attributes:
        path: Its folder.
        architecture: The base architecture, by timm's name.
        weights: The weights file that is published.
        facts: That file's metadata.
        args: The arguments it was trained with.
        source: Numbers on the data it was trained for.
        transfer: Numbers on other data.
        class_names: In the order of the classes, or empty.
        pictures: Title and file of each picture.
        notes: What was left out, and why.
    """

    path: Path
    architecture: str
    weights: Path
    facts: dict[str, str]
    args: dict[str, Any]
    source: list[Result]
    transfer: list[Result]
    class_names: list[str]
    pictures: dict[str, Path]
    notes: list[str]

    @property
    def stock(self) -> bool:
        """Whether the architecture is timm's own, so that its weights load without this package."""
        return model_entrypoint(self.architecture).__module__.startswith('timm.')


def read_run(folder: str | Path, private: Private) -> RunDetails:
    """Read a run's folder, leaving out what must not be published.

    Args:
        folder: runs/NAME.
        private: What that is.

    Raises:
        UserError: No run, no sound weights, or an architecture timm does not know.
    """
    path = Path(folder)
    if not (path / 'config.json').is_file():
        raise UserError(f'{folder}: no run; name a folder that train.py has written, with config.json in it')
    config = _read_json(path / 'config.json')
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise UserError(f'{path / "config.json"}: names no architecture')
    architecture = base_of(config['architecture'])
    if not is_model(architecture):
        raise UserError(f'{path / "config.json"}: {config["architecture"]!r} is unknown to timm')
    try:
        config_facts, _, model_args = load_model_config_from_path(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path / "config.json"}: none of timm: {one_line(error)}') from None
    known_facts(config_facts, str(path / 'config.json'))
    check_model_args(model_args, str(path / 'config.json'))
    weights = next((path / name for name in ('best.safetensors', 'last.safetensors') if (path / name).is_file()), None)
    if weights is None:
        raise UserError(f'{folder}: has no best.safetensors yet; let train.py finish an epoch')
    try:
        with safe_open(weights, framework='pt') as file:
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f'{weights}: not sound weights: {one_line(error)}') from None
    check_hash(weights)
    notes: list[str] = []
    validation = _results_of(path / 'validation' / 'results.json', weights, notes)
    probes = [_results_of(file, weights, notes) for file in sorted(path.glob('linear_probe/*/results.json'))]
    args = read_mapping(path / 'args.yaml') if (path / 'args.yaml').is_file() else {}
    run = RunDetails(
        path=path,
        architecture=architecture,
        weights=weights,
        facts=facts,
        args=args,
        source=_source(validation, facts, args, private),
        transfer=[result for probe in probes for result in _probed(probe, private)],
        class_names=_class_names(validation, config.get('num_classes'), private),
        pictures={},
        notes=notes,
    )
    titles = [path.resolve().name, *_targets(path / 'dynamics' / 'results.json')]
    if any(private.found_in(title) for title in titles):
        notes.append('the pictures, whose titles show something private')
    else:
        run.pictures = _pictures(path)
    return run


def recipe(run: RunDetails, private: Private) -> dict[str, Any]:
    """The flags that make the run again, for `train.py -c`, without what must not be published."""
    flags = {k: v for k, v in run.args.items() if isinstance(k, str) and not _NOT_RECIPE.fullmatch(k)}
    if data_set(run, private)[1].startswith('--dataset'):
        flags.pop('dataset', None)
    if str(flags.get('model', '')).startswith('local-dir:'):
        flags['model'] = run.architecture
    kept = private.clean({k: v for k, v in flags.items() if v is not None and v not in ('', {}, [])})
    lost = [key for key in sorted(flags) if flags[key] and kept.get(key) != flags[key]]
    run.notes.extend(f'the flag {key} or a part of it, which tells something private' for key in lost)
    return kept


def data_set(run: RunDetails, private: Private) -> tuple[str, str]:
    """What the run was trained on.

    Returns:
        A name that may be shown, empty if there is none, and the flag for data that every reader has elsewhere:
        '--data-dir FOLDER', '--dataset hfds/FOLDER', or empty for public data.
    """
    name = str(run.args.get('dataset') or '')
    root = str(run.args.get('data_dir') or run.args.get('data') or '')
    reader, slash, rest = name.partition('/')
    shown = public_name(name or root, private)
    if slash and reader in ('hfds', 'hfids') and shown != rest:
        return shown, f'--dataset {reader}/FOLDER'
    return shown, '--data-dir FOLDER' if root else ''


def public_name(data: str, private: Private) -> str:
    """The name of data that may be shown: a repo's id on the Hub, or the last part of where they lie."""
    reader, slash, rest = data.partition('/')
    if slash and reader in ('hfds', 'hfids') and is_repo_id(rest) and not Path(rest).exists():
        return rest if not private.found_in(rest) else ''
    name = re.split(r'[\\/]', data.rstrip('\\/'))[-1]
    return '' if name in ('', '.', '..') or private.found_in(name) else name


def wilson(percent: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson's score interval).

    Args:
        percent: Accuracy.
        count: Images it was measured on.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper end, in percent.
    """
    p = percent / 100
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: {one_line(error)}') from None


def _results_of(file: Path, weights: Path, notes: list[str]) -> dict[str, Any]:
    """A measurement, if it is one of these weights."""
    if not file.is_file():
        return {}
    results = _read_json(file)
    if not isinstance(results, dict):
        raise UserError(f'{file}: must be a mapping')
    measured = Path(str(results.get('weights', '')))
    name = str(file.relative_to(weights.parent))
    if measured.name not in (weights.name, weights.parent.name) or measured.parent.name == 'weights':
        notes.append(f'{name}, which is of other weights than {weights.name}')
        return {}
    if file.stat().st_mtime + 2 < weights.stat().st_mtime:
        notes.append(f'{name}, which is older than {weights.name}; measure again')
        return {}
    return results


def _source(validation: dict[str, Any], facts: dict[str, str], args: dict[str, Any], private: Private) -> list[Result]:
    """The measured accuracy, or else the one that training noted beside the weights."""
    if validation:
        made = _result({**validation, 'target': validation.get('dataset')}, '', private)
        return [made] if made else []
    row = {'target': args.get('dataset') or args.get('data_dir') or args.get('data')}
    row |= {'top1': facts.get('eval_top1'), 'top5': facts.get('eval_top5')}
    count = facts.get('eval_num_images', '')
    row |= {'num_images': int(count) if count.isdecimal() else None, 'split': args.get('val_split')}
    made = _result(row, '', private)
    return [made] if made else []


def _probed(probe: dict[str, Any], private: Private) -> list[Result]:
    rows = probe.get('rows', [])
    made = [_result(row, str(row.get('method', 'probe')), private) for row in rows if isinstance(row, dict)]
    return [result for result in made if result is not None]


def _result(row: dict[str, Any], method: str, private: Private) -> Result | None:
    """A number that can be shown, or None."""
    top1, low, high, top5 = (_percent(row.get(key)) for key in ('top1', 'top1_low', 'top1_high', 'top5'))
    if top1 is None:
        return None
    counts = [row.get(key) for key in ('num_test', 'num_images')]
    count = next((value for value in counts if isinstance(value, int) and value > 0), None)
    if (low is None or high is None) and count:
        low, high = wilson(top1, count)
    shots = row.get('shots')
    split = str(row.get('split') or '')
    return Result(
        dataset=public_name(str(row.get('target') or ''), private) or 'private data',
        split=split if not private.found_in(split) else '',
        method=method if re.fullmatch(r'[\w -]{0,40}', method) and not private.found_in(method) else 'probe',
        top1=top1,
        low=low,
        high=high,
        top5=top5,
        num_images=count,
        shots=shots if isinstance(shots, int) and not isinstance(shots, bool) and shots > 0 else None,
    )


def _percent(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number <= 100 else None


def _class_names(validation: dict[str, Any], num_classes: Any, private: Private) -> list[str]:
    """Names of all classes, where each has one of its own and none is private."""
    rows = validation.get('per_class')
    if not isinstance(rows, list) or not isinstance(num_classes, int) or len(rows) != num_classes:
        return []
    numbered = [row for row in rows if isinstance(row, dict) and isinstance(row.get('class'), int)]
    names = {row['class']: row.get('name') for row in numbered}
    ordered = [names.get(index) for index in range(num_classes)]
    texts = [name for name in ordered if isinstance(name, str) and name and not private.found_in(name)]
    if len(set(texts)) < num_classes or texts == [str(index) for index in range(num_classes)]:
        return []
    return texts


def _targets(file: Path) -> list[str]:
    """What the pictures of the dynamics are titled with."""
    results = _read_json(file) if file.is_file() else {}
    targets = results.get('targets') if isinstance(results, dict) else None
    return [str(name).rstrip('/').rpartition('/')[2] for name in targets] if isinstance(targets, list) else []


def _pictures(path: Path) -> dict[str, Path]:
    files = {title: path / 'dynamics' / f'{name}.png' for name, title in _PICTURES.items()}
    files['Loss, accuracy and learning rate over the training'] = path / 'plots' / 'training.png'
    return {title: file for title, file in files.items() if file.is_file()}
