"""A model from wherever its weights are: a run's folder, a weights file, a timm name, the Hub, a local folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_name
from timm.models._hub import _EXT_PRIORITY, _PREFERRED_FILES

from ..runs import Run
from ..utils.errors import UserError, nearest, one_line
from ..utils.text import file_name
from ..utils.weights_files import weights_metadata
from .backbones import architecture as architecture_of
from .checkpoint import fit_weights, read_weights, stated_sizes
from .pretrained_cfg import base_of, check_source, read_config
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


def named_source(settings: SourceSettings) -> dict[str, Any]:
    """Read which model is meant, as the first arguments of `load_model`: source, architecture, setting and use_ema.

    Raises:
        UserError: None is named, or two are. `model` is no second one where it says what a file or a run is of.
    """
    given = {name: str(getattr(settings, name) or '') for name in ('source', 'checkpoint', 'model')}
    setting, *others = [name for name, value in given.items() if value] or ['']
    if not setting:
        raise UserError('name a model: a run folder, a weights file, a timm name, hf-hub:REPO or local-dir:FOLDER')
    source = given[setting]
    if others and (others != ['model'] or ':' in source + given['model'] or timm.is_model(source)):
        two = f'`{setting}` {source} and `{others[0]}` {given[others[0]]}'
        raise UserError(f'{two}: two models are named; name one, or by `model` the architecture of a weights file')
    architecture = given['model'] if others else ''
    return {'source': source, 'architecture': architecture, 'setting': setting, 'use_ema': settings.use_ema}


def load_model(
    source: str | os.PathLike,
    architecture: str = '',
    setting: str = 'source',
    use_ema: bool = False,
    head: bool = True,
    **options: Any,
) -> LoadedModel:
    """Load a model.

    Args:
        source: A run's folder (its best.safetensors), a weights file, any timm name (its pretrained weights),
            `hf-hub:REPO` or `local-dir:FOLDER`; a folder that timm loads as the latter.
        architecture: For a weights file that does not say what it is, and lies in no run.
        setting: That names the source, for messages.
        use_ema: Take a checkpoint's moving average where it holds one.
        head: Whether the classifier is used. If not, a file without it, or with modules beside the backbone, is taken
            too; a classifier that is not in the file is zero.
        **options: For `timm.create_model`: num_classes, in_chans, ... None leaves the weights' own.

    Raises:
        UserError: Nothing there, or nothing that fits.
    """
    options = {k: v for k, v in options.items() if v is not None}
    source = os.fspath(source)
    where, path = f'`{setting}` {source}', Path(source)
    if path.is_dir():
        path = Run(path).best_weights
        if not path.is_file() and Run(source).config_file.is_file():
            return load_model(f'local-dir:{source}', architecture, setting, use_ema, head, **options)
        if not path.is_file():
            what = 'a folder without best.safetensors or last.safetensors is no run'
            raise UserError(f'{where}: {what}, and without config.json no model of timm')
    if path.is_file():
        return _load_file(path, where, architecture, use_ema, head, options)
    if source.startswith('local-dir:'):
        folder = Path(source.partition(':')[2])
        return _load_file(_weights_in(folder, where), where, '', use_ema, head, options, folder, file_name(source))
    if path.suffix in ('.safetensors', '.pth', '.pt', '.bin', '.tar'):
        raise UserError(f'{where}: no such file')
    if ':' not in source and not timm.is_model(source):
        near = nearest(get_arch_name(source), timm.list_models())
        raise UserError(f'{where}: no run folder, weights file or timm model of that name{near}')
    try:
        check_source(source)
        headless = not head and not getattr(timm.get_pretrained_cfg(source), 'num_classes', 1)
        options = {'num_classes': 1, **options} if headless else options
        model = timm.create_model(source, pretrained=True, **options)
    except Exception as error:  # of timm, torch and huggingface_hub, about weights and configs of other people
        raise UserError(f'{where}: {one_line(error)}') from None
    return LoadedModel(model.eval(), file_name(source), source)


def load_weights(model: Any, file: Path, where: str, new_head: bool = False, use_ema: bool = True) -> None:
    """Load all of a weights file, or raise a UserError; see `read_weights` and `fit_weights`."""
    weights = read_weights(file, where, architecture_of(model), use_ema)
    fit_weights(model, weights, file, where, new_head, new_channels=new_head)


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


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether a folder holds a model: a run, or what timm loads as `local-dir:`."""
    run = Run(path)
    return run.best_weights.is_file() or run.config_file.is_file() or run.args_file.is_file()


def _weights_in(folder: Path, where: str) -> Path:
    """The weights file of a folder that timm would load by its config.json."""
    if not (folder / 'config.json').is_file():
        raise UserError(f'{where}: Config file not found: {folder / "config.json"}')
    named = [folder / name for name in _PREFERRED_FILES]
    for file in (*named, *(file for suffix in _EXT_PRIORITY for file in sorted(folder.glob(f'*{suffix}')))):
        if file.is_file():
            return file
    raise UserError(f'{where}: no weights beside config.json; timm looks for {_PREFERRED_FILES[0]} and such')


def _load_file(
    file: Path,
    where: str,
    architecture: str,
    use_ema: bool,
    head: bool,
    options: dict[str, Any],
    folder: Path | None = None,
    name: str = '',
) -> LoadedModel:
    """Load a weights file: of the architecture that its run's or folder's config.json names, that it states, or given.

    `folder` and `name` are those of a `local-dir:`.
    """
    home, arguments, stated = folder or run_of(file), dict[str, Any](), ''
    if home and not folder and file.name != _PREFERRED_FILES[0]:  # in the Hub's cache, which is made of links
        Run(home).check_links()  # measurements are read from and written to it
    if home:
        stated, config, model_args = read_config(home, headless=True)
        arguments = {'num_classes': config.pop('num_classes'), 'pretrained_cfg_overlay': config, **model_args}
    elif file.suffix == '.safetensors':
        try:
            metadata = weights_metadata(file)
        except UserError as error:
            fault = one_line(error).removeprefix(f'{file}: ')
            raise UserError(f'{where}: not weights of {architecture or "a model"}: {fault}') from None
        stated, classes = base_of(metadata.get('architecture', '')), metadata.get('num_classes', '')
        arguments = {'num_classes': int(classes)} if classes.isdecimal() else {}
    if stated and architecture and base_of(architecture) != stated:
        raise UserError(f'{where}: is for {stated}, not for `model` {architecture}; leave the latter out')
    architecture = stated or architecture
    if not architecture:
        raise UserError(f'{where}: the file does not say which architecture it is for; name it with `model`')
    if not timm.is_model(architecture):
        raise UserError(f'{where}: is for {architecture!r}, which timm does not know')
    weights = read_weights(file, where, architecture, use_ema)
    try:
        model = timm.create_model(architecture, **(arguments | options))
        # What the file is of, where nobody said; a head of one zero where there is none lets features pass.
        sizes = stated_sizes(weights, model) if 'num_classes' not in arguments else {}
        if not head and not model.num_classes:
            sizes['num_classes'] = 1
        if sizes.keys() - options:
            model = timm.create_model(architecture, **(arguments | sizes | options))
    except Exception as error:  # of any architecture
        raise UserError(f'{where}: not weights of {architecture}: {one_line(error)}') from None
    for tensor in fit_weights(model, weights, file, where, not head, new_channels=not head or folder is not None):
        model.state_dict()[tensor].zero_()
    run = home if home and not folder and Run(home).args_file.is_file() else None  # not a folder of other people
    name = name or file_name(f'{home.name}-{file.stem}' if home else file.stem)
    return LoadedModel(model.eval(), name, where.partition(' ')[2] if folder else str(file), run)
