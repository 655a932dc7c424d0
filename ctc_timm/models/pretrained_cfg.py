"""Facts about input and shape that published weights may state, and the check of each.

They come from files of other people, so each has to be of its right type before timm is told it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..utils.errors import UserError

_WORD = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]*')
_MODULE = re.compile(r'[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*')

# Arguments of timm's factory that would change where weights come from or how strictly they are loaded, beside
# those that begin with `pretrained`; an entry has no say in that.
_RESERVED = {'checkpoint_path', 'cache_dir', 'scriptable', 'exportable', 'no_jit', 'features_only', 'device', 'dtype'}


def check_facts(facts: Any, where: str) -> dict[str, Any]:
    """The known facts about input and shape, each of its right type.

    Raises:
        UserError: One that is missing, unknown or of another type.
    """
    if not isinstance(facts, dict):
        raise UserError(f'{where}: pretrained_cfg must be a mapping')
    for key in ('num_classes', 'input_size', 'mean', 'std', 'classifier', 'first_conv'):
        if key not in facts:
            raise UserError(f'{where}: pretrained_cfg has no {key}')
    for key, value in facts.items():
        if key not in FACTS:
            raise UserError(f'{where}: pretrained_cfg has no {key!r} in timm, or none that a catalog may set')
        if not FACTS[key](value):
            raise UserError(f'{where}: {key} cannot be {value!r}')
    if len(facts['mean']) != len(facts['std']):
        raise UserError(f'{where}: mean and std must be of the same length')
    return dict(facts)


def known_facts(config: Any, where: str) -> dict[str, Any]:
    """The facts that a config.json of timm states, checked; what else it states is left out.

    Args:
        config: Its pretrained_cfg.
        where: For error messages: the file.

    Raises:
        UserError: As `check_facts`.
    """
    if not isinstance(config, dict):
        raise UserError(f'{where}: pretrained_cfg must be a mapping')
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key in FACTS}
    return check_facts({'classifier': None, 'first_conv': None, **facts}, where)


def check_model_args(model_args: Any, where: str) -> dict[str, Any]:
    """Arguments an architecture may be built with.

    Raises:
        UserError: One that would change where weights come from.
    """
    if not isinstance(model_args, dict):
        raise UserError(f'{where}: model_args must be a mapping')
    for key in model_args:
        if key in _RESERVED or str(key).startswith('pretrained') or not str(key).isidentifier():
            raise UserError(f'{where}: model_args may not set {key!r}')
    return dict(model_args)


def _integers(count: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        whole = isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        return whole and len(value) == count and min(value) > 0

    return check


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float('inf')


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _numbers(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(check, value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(_WORD.fullmatch(value))


def _modules(value: Any) -> bool:
    names = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(name, str) and _MODULE.fullmatch(name) for name in names)


# Facts about the data and the shape of a model, which hold for any weights of it, each with its check. A list
# of what to keep, not of what to drop: a kind of weight source that timm adds later must not slip through.
FACTS: dict[str, Callable[[Any], bool]] = {
    'input_size': _integers(3),
    'test_input_size': _optional(_integers(3)),
    'min_input_size': _optional(_integers(3)),
    'fixed_input_size': lambda value: isinstance(value, bool),
    'interpolation': _text,
    'crop_pct': _positive,
    'test_crop_pct': _optional(_positive),
    'crop_mode': _text,
    'mean': _numbers(is_number),
    'std': _numbers(_positive),
    'num_classes': lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    'pool_size': _optional(_integers(2)),
    'test_pool_size': _optional(_integers(2)),
    'first_conv': _optional(_modules),
    'classifier': _optional(_modules),
}
