"""Checks of what published weights state about their input and shape.

Catalogs and config.json files come from other people, so each value must be of its form before timm reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, is_model, parse_model_name
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from ..utils.errors import UserError, one_line
from ..utils.settings import shorten

SUFFIX = '_ctc'
_COUNT = r'[1-9]\d*'
_NUMBER = r'-?\d[\d.]*(e[+-]?\d+)?'
_POSITIVE = rf'(?![0.]+([],e]|$)){_NUMBER[2:]}'
_WORD = r'"\w[\w.-]*"'
_MODULE = r'"\w+(\.\w+)*"'
# Fields of timm's PretrainedCfg that hold for any weights of a model, each with the form of its JSON. A list of what
# to keep, not of what to drop: a kind of weight source that timm adds later must not slip through.
_REQUIRED = {
    'num_classes': _COUNT,
    'input_size': rf'\[{_COUNT}, {_COUNT}, {_COUNT}\]',
    'mean': rf'\[{_NUMBER}(, {_NUMBER})*\]',
    'std': rf'\[{_POSITIVE}(, {_POSITIVE})*\]',
}
_FORMS = {
    **_REQUIRED,
    'test_input_size': rf'null|{_REQUIRED["input_size"]}',
    'min_input_size': rf'null|{_REQUIRED["input_size"]}',
    'fixed_input_size': 'true|false',
    'interpolation': _WORD,
    'crop_pct': _POSITIVE,
    'test_crop_pct': rf'null|{_POSITIVE}',
    'crop_mode': _WORD,
    'pool_size': rf'null|\[{_COUNT}, {_COUNT}\]',
    'test_pool_size': rf'null|\[{_COUNT}, {_COUNT}\]',
    'first_conv': rf'null|\[\]|{_MODULE}|\[{_MODULE}(, {_MODULE})*\]',
    'classifier': rf'null|{_MODULE}|\[{_MODULE}(, {_MODULE})*\]',
}
FIELDS = tuple(_FORMS)
# What timm's transforms know, and ranges that images of a usable size come from.
_WORDS = {
    'interpolation': ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    'crop_mode': ('center', 'border', 'squash'),
}
_COUNTS = {'num_classes': 'a whole number', **dict.fromkeys(('crop_pct', 'test_crop_pct'), 'a number')}
_COUNTS |= dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), 'three whole numbers')
_RANGES = {
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), (0.05, 2)),
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size', 'pool_size', 'test_pool_size'), (1, 16384)),
    **{'num_classes': (1, 10**6), 'mean': (-1e6, 1e6), 'std': (1e-6, 1e6)},
}
# Arguments of timm's factory that would change where weights come from or how strictly they are loaded, beside those
# that begin with `pretrained`.
_RESERVED = {'checkpoint_path', 'cache_dir', 'scriptable', 'exportable', 'no_jit', 'features_only', 'device', 'dtype'}


def check_pretrained_cfg(config: Any, where: str, headless: bool = False) -> dict[str, Any]:
    """Take `FIELDS` out of a pretrained_cfg of the file `where`; `headless` models with 0 classes are as good then.

    Raises:
        UserError: A value of another form, or one that timm does not know or that no image can have.
    """
    if not isinstance(config, Mapping):
        raise UserError(f'{where}: pretrained_cfg must be a mapping')
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key in FIELDS}
    if missing := sorted(set(_REQUIRED) - set(found)):
        raise UserError(f'{where}: pretrained_cfg has no {missing[0]}')
    for key, value in found.items():
        known, (low, high) = _WORDS.get(key), _RANGES.get(key, (None, None))
        formed = re.fullmatch(_FORMS[key], json.dumps(value, default=str), re.ASCII)
        numbers = value if isinstance(value, list) else [value]
        inside = low is None or value is None or formed and all(low <= number <= high for number in numbers)
        if headless and key == 'num_classes' and value == 0 and type(value) is int:
            continue
        if not formed or not inside or (known and value not in known):
            allowed = f'; use one of {", ".join(known)}' if known else ''
            allowed = f'; use {_COUNTS.get(key, "numbers")} from {low:g} to {high:g}' if low is not None else allowed
            raise UserError(f'{where}: {key} cannot be {shorten(value)}{allowed}')
    if len(found['mean']) != len(found['std']):
        raise UserError(f'{where}: mean and std must be of the same length')
    if len(found['mean']) not in (1, 3, found['input_size'][0]):  # three are adapted to other channels, as in timm
        channels, given = found['input_size'][0], shorten(found['mean'])
        raise UserError(f'{where}: mean cannot be {given} for {channels} channel(s); use 1 or {channels} numbers')
    return found


def own_config(model: Any) -> None:
    """Leave out of a model's config whose weights it had: tag, papers, license, class names. It is to be trained."""
    cfg = {key: model.pretrained_cfg[key] for key in ('architecture', *FIELDS) if key in model.pretrained_cfg}
    model.pretrained_cfg = model.default_cfg = cfg


def check_model_args(model_args: Any, where: str) -> dict[str, Any]:
    """Check arguments for an architecture; a UserError is raised for those that change where weights come from."""
    if not isinstance(model_args, dict):
        raise UserError(f'{where}: model_args must be a mapping')
    for key in model_args:
        if key in _RESERVED or str(key).startswith('pretrained') or not str(key).isidentifier():
            raise UserError(f'{where}: model_args may not set {key!r}')
    return dict(model_args)


def check_source(name: str) -> None:
    """Check the config.json of an `hf-hub:` or `local-dir:` name; a UserError is raised for what is not sound in it."""
    if ':' in name:
        source, place = parse_model_name(name)
        read = load_model_config_from_path if source == 'local-dir' else load_model_config_from_hf
        stated = {key: value for key, value in read(place)[0].items() if value is not None}
        check_pretrained_cfg({**PretrainedCfg().to_dict(), **stated}, 'config.json', headless=True)


def base_of(architecture: str) -> str:
    """The base of an architecture that may have the suffix, and a tag, as timm lets it."""
    return architecture.partition('.')[0].removesuffix(SUFFIX)


def read_config(folder: Path, where: str = '', headless: bool = False) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read a folder's config.json, or raise a UserError for what is not sound in it; `where` is what it is of.

    `headless` models are taken too, see `check_pretrained_cfg`.

    Returns:
        The base architecture, its checked pretrained_cfg, and the arguments that it is built with.
    """
    where = f'{where}: config.json' if where else str(folder / 'config.json')
    try:
        pretrained_cfg, architecture, model_args = load_model_config_from_path(folder)
        base = base_of(architecture)
        if not is_model(base):
            raise UserError(f'{where}: {base!r} is unknown to timm')
        cfg = check_pretrained_cfg(pretrained_cfg, where, headless)
        return base, cfg, check_model_args(model_args, where)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{where}: no config of timm: {one_line(error)}') from None
