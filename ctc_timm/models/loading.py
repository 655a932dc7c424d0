"""A model from wherever its weights are: a run's folder, a weights file, a timm name, the Hub, a local folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_name

from ..runs import Run
from ..utils.errors import UserError, nearest, one_line
from ..utils.text import file_name
from ..utils.weights_files import read_weights, weights_metadata
from .backbones import architecture as architecture_of
from .pretrained_cfg import read_config
from .settings import SourceSettings

_KEYS = ('class_map', 'input_key', 'target_key', 'input_img_mode', 'workers')
_DATA = ('dataset', 'data_dir', 'data', 'val_split', *_KEYS)
_COMMAND = re.compile(r'pipe:|[\'"`$;\\\n]')  # webdataset reads pipe:COMMAND, and hands URLs to a shell


@dataclass
class LoadedModel:
    """A model in evaluation mode with its weights, and where they came from."""

    model: Any
    name: str  # short, for tables and file names
    weights: str  # file, or name at the Hub or in timm
    run: Path | None = None  # folder of the run that trained it, if it is one of ours


def named_source(settings: SourceSettings) -> tuple[str, str, str]:
    """Read which model is meant: the source, the architecture of a weights file, and the setting that names it.

    These are the first arguments of `load_model`. A UserError is raised where none is named.
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
    where, path = f'`{setting}` {source}', Path(source)
    if path.is_dir():
        path = Run(path).best_weights
        if not path.is_file():
            raise UserError(f'{where}: a folder without best.safetensors or last.safetensors is no run')
    if path.is_file():
        return _load_file(path, where, architecture, options)
    if path.suffix in ('.safetensors', '.pth', '.pt', '.bin', '.tar'):
        raise UserError(f'{where}: no such file')
    if ':' not in source and not timm.is_model(source):
        near = nearest(get_arch_name(source), timm.list_models())
        raise UserError(f'{where}: no run folder, weights file or timm model of that name{near}')
    try:
        model = timm.create_model(source, pretrained=True, **options)
    except Exception as error:  # of timm, torch and huggingface_hub, about weights and configs of other people
        raise UserError(f'{where}: {one_line(error)}') from None
    return LoadedModel(model.eval(), file_name(source), source)


def load_weights(model: Any, file: Path, where: str) -> None:
    """Load all of a weights file, safetensors or what loads with `weights_only=True`, or raise a UserError."""
    if not file.is_file():
        raise UserError(f'{where}: no such file')
    try:
        if file.suffix == '.safetensors':
            read_weights(file)
        timm.models.load_checkpoint(model, str(file), weights_only=True)
    except Exception as error:  # of any format
        raise UserError(f'{where}: not weights of {architecture_of(model)}: {one_line(error)}') from None


def run_of(source: str | os.PathLike) -> Path | None:
    """Find the run's folder that a source is, or lies in; None for anything else."""
    path = Path(source).resolve()
    if not path.exists():
        return None
    near = [path] if path.is_dir() else list(path.parents[:2])
    return next((p for p in near if Run(p).config_file.is_file()), None)


def data_settings(run: str | os.PathLike | None) -> dict[str, Any]:
    """Read those of a run's settings that say where its images come from, by name; empty where there are none.

    Raises:
        UserError: One of another type, or one that would be run as a command. A run may be of other people.
    """
    args = Run(run).args() if run is not None and Run(run).args_file.is_file() else {}
    found = {key: args[key] for key in _DATA if args.get(key) is not None}
    for key, value in found.items():
        if type(value) is not (int if key == 'workers' else str):
            raise UserError(f'args.yaml: `{key}` cannot be {value!r}')
        if found.get('dataset', '').lower().startswith('wds/') and _COMMAND.search(str(value)):
            raise UserError(f'args.yaml: `{key}` {value!r} would run a command; if you trust it, give `{key}` yourself')
    if 'data' in found:
        found['data_dir'] = found.pop('data')
    return found


def _load_file(weights: Path, where: str, architecture: str, options: dict[str, Any]) -> LoadedModel:
    """Load a weights file: of the architecture that is named, that its run's config.json names, or that it states."""
    run, arguments = run_of(weights), {}
    if run is not None and not architecture:
        architecture, config, model_args = read_config(run)
        arguments = {'num_classes': config.pop('num_classes'), 'pretrained_cfg_overlay': config, **model_args}
    elif not architecture and weights.suffix == '.safetensors':
        stated = weights_metadata(weights)
        architecture, classes = stated.get('architecture', ''), stated.get('num_classes', '')
        arguments = {'num_classes': int(classes)} if classes.isdecimal() else {}
    if not architecture:
        raise UserError(f'{where}: the file does not say which architecture it is for; name it with `model`')
    if not timm.is_model(architecture):
        raise UserError(f'{where}: is for {architecture!r}, which timm does not know')
    try:
        model = timm.create_model(architecture, **{**arguments, **options})
    except Exception as error:  # of any architecture
        raise UserError(f'{where}: not weights of {architecture}: {one_line(error)}') from None
    load_weights(model, weights, where)
    name = file_name(f'{run.name}-{weights.stem}' if run is not None else weights.stem)
    return LoadedModel(model.eval(), name, str(weights), run)
