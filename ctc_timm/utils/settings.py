"""Settings: typed values with one default each, from which flags, recipes and keyword arguments are made.

A group of settings is a frozen dataclass whose fields are declared by `setting`; a command's settings are a dataclass
whose fields are groups, declared by `group`. Outside, all settings of a command share one flat list of names:

    @dataclass(frozen=True)
    class LoaderSettings:
        batch_size: int = setting(128, 'images of each process', low=1, short='-b')

    @dataclass(frozen=True)
    class TrainSettings:
        loader: LoaderSettings = group('Loading', LoaderSettings)

    build(TrainSettings, {'batch_size': 64}).loader.batch_size

Messages name a setting in backquotes, with a value where one is proposed: `batch_size`, `resume='auto'`. The command
line shows them as flags.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from .errors import UserError, nearest
from .text import holds_token, without_tokens

LARGEST_INTEGER = 2**31 - 1  # what every library below can count
LARGEST, SMALLEST = 1e12, 1e-37  # float32 keeps the squares and reciprocals of numbers between them
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, the limits of file systems
T = TypeVar('T')


def setting(default: Any, help: str, **checks: Any) -> Any:
    """Declare a field of a settings dataclass, with its default and a line for `--help`.

    Of a number `low` and `high` are inclusive bounds, `above` and `below` exclusive ones; `empty` allows an empty text.
    For the command line: `short`, a flag of one letter; `aliases`, more flags; `metavar`, a word or a tuple of words;
    `const`, the value of a flag without a word; `positional`, an argument without a flag.
    """
    metadata = {'help': help, **checks}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(title: str, settings: type, **defaults: Any) -> Any:
    """Declare a group of a command's settings: its heading in `--help`, its dataclass, and defaults of the command."""
    return dataclasses.field(default_factory=lambda: settings(**defaults), metadata={'title': title})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a command."""

    name: str  # of the field and the keyword; the flag has dashes
    title: str  # heading of its group
    kind: type  # bool, int, float, str or dict
    many: bool  # whether it is a tuple of values
    count: int | None  # length of that tuple; None for any
    optional: bool  # whether None is a value
    choices: tuple[Any, ...]  # all values, or empty
    default: Any  # of this command
    checks: Mapping[str, Any]  # as `setting` takes them


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """All settings of a command by name, in the order of declaration."""
    return {setting.name: setting for setting in _walk(cls(), '')}


def _walk(instance: Any, title: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, field.metadata['title'])
        else:
            yield Setting(field.name, title, *_read_type(hints[field.name]), value, field.metadata)


def _read_type(hint: Any) -> tuple[type, bool, int | None, bool, tuple[Any, ...]]:
    """A field's type as kind, many, count, optional and choices."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    (hint,) = [part for part in parts if part is not type(None)]
    optional, many, count = type(None) in parts, False, None
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        many, count, hint = True, None if items[-1] is ... else len(items), items[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), many, count, optional, choices
    return typing.get_origin(hint) or hint, many, count, optional, ()


def build(cls: type[T], values: Mapping[str, Any], source: str = '') -> T:
    """Make a command's settings from values by name, which may have dashes; the others keep their defaults.

    Args:
        cls: Dataclass of the command.
        values: As keyword arguments or a recipe give them.
        source: Where they come from, such as a recipe's path, for messages.

    Raises:
        UserError: A name that is no setting, or a value that its setting refuses.
    """
    return replace(cls(), **check_values(cls, values, source))


def replace(settings: T, **values: Any) -> T:
    """A copy with some values changed, by flat name, unchecked."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = replace(value, **values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def flatten(settings: Any) -> dict[str, Any]:
    """All values by name, as a recipe holds them: tuples become lists."""
    values = {setting.name: setting.default for setting in _walk(settings, '')}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_values(cls: type, values: Mapping[str, Any], source: str = '') -> dict[str, Any]:
    """Values by name as their settings hold them, see `build`."""
    known, found = settings_of(cls), {}
    where = f'{source}: ' if source else ''
    if unknown := [key for key in values if str(key).replace('-', '_') not in known]:
        shown = [f'{shorten(key)} is not a setting{nearest(str(key).replace("-", "_"), known)}' for key in unknown]
        names = ', '.join(shorten(key) for key in unknown[:40])
        raise UserError(where + (shown[0] if len(shown) == 1 else f'{len(shown)} names are no settings: {names}'))
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name in found:
            raise UserError(f'{where}{shorten(key)} stands twice, with a dash and with an underscore')
        try:
            found[name] = check_value(known[name], value)
        except ValueError as error:
            raise UserError(f'{where}`{name}`: {error}') from None
        if holds_token(value):
            fault = 'holds a token or a password, which would be kept with the run'
            raise UserError(f'{where}`{name}`: {fault}; leave it out, and set HF_TOKEN or log in with `hf auth login`')
    return found


def check_value(setting: Setting, value: Any) -> Any:
    """A value as its setting holds it.

    Raises:
        ValueError: What is wrong with it, without the setting's name.
    """
    if value is None:
        if setting.optional:
            return None
        raise ValueError(f'has no value; leave it out for {setting.default!r}')
    if setting.kind is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f'takes a mapping, got {shorten(value)}')
        for key in value:
            if not (isinstance(key, str) and key.isidentifier()):
                raise ValueError(f'{shorten(key)} cannot be the name of an argument')
        return dict(value)
    if isinstance(value, dict):
        raise ValueError(f'takes no mapping, got {shorten(value)}')
    if setting.kind is bool and not isinstance(value, bool):
        raise ValueError(f'must be true or false, got {shorten(value)}')
    if isinstance(value, bool) and 'const' in setting.checks:
        return setting.checks['const'] if value else None
    if not setting.many:
        return _check_item(setting, value)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if setting.count is not None and len(items) != setting.count:
        raise ValueError(f'takes {setting.count} values, got {shorten(value)}')
    if not items and setting.default:
        raise ValueError(f'takes at least one value, got {shorten(value)}')
    return tuple(_check_item(setting, item) for item in items)


def _check_item(setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        return value
    value = (_check_text if setting.kind is str else _check_number)(setting, value)
    if setting.choices and value not in setting.choices:
        known = ', '.join(str(choice) or "''" for choice in setting.choices)
        near = nearest(str(value), map(str, setting.choices))
        raise ValueError(f'must be one of {known}, got {shorten(value)}{near}')
    return value


def _check_text(setting: Setting, value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
        raise ValueError(f'takes a text, got {shorten(value)}; put a text in quotes')
    if value == setting.default:
        return value
    if not value and not setting.checks.get('empty') and not setting.choices:
        raise ValueError('must not be empty; leave it out')
    if any(unicodedata.category(character) in ('Cc', 'Cs') for character in value):
        raise ValueError(f'must be UTF-8 text without control characters, got {shorten(value)}')
    if len(value) > LONGEST_PATH or max(map(len, value.encode().split(b'/'))) > LONGEST_NAME:
        raise ValueError(f'must be no longer than a path can be, got {shorten(value)}')
    return value


def _check_number(setting: Setting, value: Any) -> int | float:
    what = 'a whole number' if setting.kind is int else 'a number'
    try:
        number = setting.kind(str(value))  # 'True' is no number
    except ValueError:
        raise ValueError(f'must be {what}, got {shorten(value)}') from None
    largest = LARGEST_INTEGER if setting.kind is int else LARGEST
    low, high = setting.checks.get('low', -largest), setting.checks.get('high', largest)
    above, below = setting.checks.get('above'), setting.checks.get('below')
    got = f', got {shorten(str(value), plain=True)}'
    if above is not None and not number >= above + SMALLEST:
        raise ValueError(f'must be above {above:g}{got}')
    if below is not None and not number < below:
        raise ValueError(f'must be below {below:g}{got}')
    if not number >= low:
        raise ValueError(('must not be negative' if low == 0 else f'must be at least {low:g}') + got)
    if not number <= high:
        raise ValueError(f'must be at most {high if setting.kind is int else format(high, "g")}{got}')
    return number


def shorten(value: Any, plain: bool = False) -> str:
    """A value as messages show it, cut to a readable length, without tokens; `plain` texts have no quotes."""
    text = without_tokens(value if plain and isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f'{text[:60]}...'
