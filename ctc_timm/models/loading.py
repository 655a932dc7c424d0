"""A model from wherever its weights are: a run's folder, a weights file, a timm name, the Hub, a local folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import get_arch_name

from ..runs import check_hash
from ..utils.errors import UserError, nearest, one_line
from ..utils.text import file_name
from ..utils.yaml_files import read_mapping
from .pretrained_cfg import check_model_args, known_facts
from .settings import SourceSettings

DATA_FLAGS = (
    'dataset',
    'data_dir',
    'data',
    'val_split',
    'class_map',
    'input_key',
    'target_key',
    'input_img_mode',
    'workers',
)


_COMMAND = re.compile(r'pipe:|[\'"`$;\\\n]')  # webdataset reads pipe:COMMAND, and hands URLs to a shell


@dataclass
class LoadedModel:
    """A model with its weights, and where they came from.

    Attributes:
        model: In evaluation mode.
        name: Short, for tables and file names.
        weights: File, or name at the Hub or in timm.
        run: The folder of the run that trained it, if it is one of ours.
        run_args: That run's arguments, or empty.
    """

    model: Any
    name: str
    weights: str
    run: Path | None
    run_args: dict[str, Any]


def named_source(settings: SourceSettings) -> tuple[str, str, str]:
    """Read which model is meant, as the arguments of `load_model`.

    Returns:
        The source, the architecture of a weights file, and the setting that names the source.

    Raises:
        UserError: None is named.
    """
    source = settings.source or settings.checkpoint or settings.model
    if not source:
        raise UserError('name a model: a run folder, a weights file, a timm name, hf-hub:REPO or local-dir:FOLDER')
    setting = next(name for name in ('model', 'checkpoint', 'source') if getattr(settings, name) == source)
    return source, settings.model if source != settings.model else '', setting


def load_model(
    source: str | os.PathLike, architecture: str = '', setting: str = 'source', **options: Any
) -> LoadedModel:
    """Load a model.

    Args:
        source: A run's folder (its best.safetensors), a weights file, any timm name (its pretrained weights),
            `hf-hub:REPO` or `local-dir:FOLDER`.
        architecture: For a weights file that does not say what it is, and lies in no run.
        setting: That names the source, for messages.
        **options: For `timm.create_model`: num_classes, in_chans, ... None leaves the weights' own.

    Raises:
        UserError: Nothing there, or nothing that fits.
    """
    options = {k: v for k, v in options.items() if v is not None}
    source = os.fspath(source)
    path = Path(source)
    if path.is_dir():
        weights = path / 'best.safetensors'
        if not weights.is_file():
            weights = path / 'last.safetensors'
        if not weights.is_file():
            raise UserError(f'`{setting}` {source}: a folder without best.safetensors or last.safetensors is no run')
        return _from_file(weights, source, architecture, setting, options)
    if path.is_file():
        return _from_file(path, source, architecture, setting, options)
    if path.suffix in ('.safetensors', '.pth', '.pt', '.bin', '.tar'):
        raise UserError(f'`{setting}` {source}: no such file')
    if ':' not in source and not timm.is_model(source):
        near = nearest(get_arch_name(source), timm.list_models())
        raise UserError(f'`{setting}` {source}: no run folder, weights file or timm model of that name{near}')
    try:
        model = timm.create_model(source, pretrained=True, **options)
    except Exception as error:
        raise UserError(f'`{setting}` {source}: {one_line(error)}') from None
    return LoadedModel(model.eval(), file_name(source), source, None, {})


def run_of(source: str | Path) -> Path | None:
    """The run's folder that a source is, or lies in; None for anything else."""
    path = Path(source).resolve()
    if not path.exists():
        return None
    near = [path] if path.is_dir() else list(path.parents[:2])
    return next((p for p in near if (p / 'config.json').is_file()), None)


def run_arguments(run: Path | None) -> dict[str, Any]:
    """The arguments that a run was trained with, empty where there is no run.

    Raises:
        UserError: They are not plain values.
    """
    file = run / 'args.yaml' if run is not None else None
    return read_mapping(file) if file and file.is_file() else {}


def data_flags(run_args: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arguments those that say where its images come from, for measuring it on them.

    Raises:
        UserError: One of another type, or one that would be run as a command. A run may be of other people.
    """
    found = {key: run_args[key] for key in DATA_FLAGS if run_args.get(key) is not None}
    for key, value in found.items():
        if type(value) is not (int if key == 'workers' else str):
            raise UserError(f'args.yaml: `{key}` cannot be {value!r}')
        if found.get('dataset', '').lower().startswith('wds/') and _COMMAND.search(str(value)):
            raise UserError(f'args.yaml: `{key}` {value!r} would run a command; if you trust it, give `{key}` yourself')
    if 'data' in found:
        found['data_dir'] = found.pop('data')
    return found


def _from_file(weights: Path, source: str, architecture: str, setting: str, options: dict[str, Any]) -> LoadedModel:
    run = run_of(weights)
    arguments: dict[str, Any] = {}
    if run is not None and not architecture:
        architecture, arguments, data_facts = _read_config(run / 'config.json')
        options = {'pretrained_cfg_overlay': data_facts, **options}
    elif not architecture:
        facts = _metadata(weights)
        architecture = facts.get('architecture', '')
        if facts.get('num_classes', '').isdecimal():
            arguments = {'num_classes': int(facts['num_classes'])}
        if not architecture:
            raise UserError(
                f'`{setting}` {source}: the file does not say which architecture it is for; name it with `model`'
            )
    if not timm.is_model(architecture):
        raise UserError(f'`{setting}` {source}: is for {architecture!r}, which timm does not know')
    try:
        if weights.suffix == '.safetensors':
            check_hash(weights)
        model = timm.create_model(architecture, **{**arguments, **options})
        timm.models.load_checkpoint(model, str(weights), weights_only=True)
    except Exception as error:
        raise UserError(f'`{setting}` {source}: not weights of {architecture}: {one_line(error)}') from None
    name = file_name(f'{run.name}-{weights.stem}' if run is not None else weights.stem)
    return LoadedModel(model.eval(), name, str(weights), run, run_arguments(run))


def _read_config(file: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments of the model, and facts about its data, as a run's config.json gives them."""
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
        architecture, facts = config['architecture'], dict(config['pretrained_cfg'])
        known_facts(facts, str(file))
        arguments = {'num_classes': config['num_classes'], **check_model_args(config.get('model_args', {}), str(file))}
        if not isinstance(architecture, str):
            raise TypeError(f'the architecture cannot be {architecture!r}')
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{file}: no config of timm: {one_line(error)}') from None
    return architecture, arguments, {k: v for k, v in facts.items() if k not in ('num_classes', 'architecture')}


def _metadata(weights: Path) -> dict[str, str]:
    if weights.suffix != '.safetensors':
        return {}
    try:
        with safe_open(weights, framework='pt') as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
