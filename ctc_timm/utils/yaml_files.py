"""YAML files, which may be a stranger's: plain values only, each key once, no larger than they look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, nearest, one_line

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'
LARGEST = 1 << 16  # characters; all settings of a run take a twentieth of that
# What PyYAML's conversions raise: no such month, a number too long, a word that is no boolean, nesting too deep.
_CONVERSION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    """yaml.safe_load's loader without aliases, by which a few lines can stand for gigabytes, and with unique keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, 'aliases (*name) are not allowed', mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            word = key.value if isinstance(key, yaml.ScalarNode) else None
            if word is not None and word in seen:
                raise yaml.constructor.ConstructorError(None, None, f'{word!r} stands twice', key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


def read_values(text: str) -> Any:
    """Parse a YAML text by the rules of `yaml.safe_load`, without aliases and with unique keys.

    Raises:
        ValueError: Not YAML, more than plain values, or longer than `LARGEST`.
    """
    if len(text) > LARGEST:
        raise ValueError(f'longer than {LARGEST} characters')
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError('nested too deeply') from None
    except (yaml.YAMLError, *_CONVERSION_ERRORS) as error:
        raise ValueError(one_line(error)) from None


def read_mapping(file: Path, what: str = '') -> dict[str, Any]:
    """Read a recipe or an args.yaml: values by name, none in an empty file. Messages call it `what`, or by its path.

    Raises:
        UserError: It can't be read, or is no mapping of names to plain values.
    """
    what = what or str(file)
    try:
        if file.stat().st_size > 4 * LARGEST:  # before it is in memory
            raise ValueError(f'longer than {LARGEST} characters')
        values = read_values(file.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{what}: cannot be read: {error.strerror or one_line(error)}') from None
    except ValueError as error:
        raise UserError(f'{what}: not valid YAML: {one_line(error)}') from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f'{what}: must be a mapping of names to values, got a {type(values).__name__}')
    return values


def read_recipe(name: str | os.PathLike) -> dict[str, Any]:
    """Read a recipe, a shipped one by name or any file by path, as by `read_mapping`."""
    file = Path(name)
    shipped = RECIPES / f'{file.name.removesuffix(".yaml")}.yaml'
    if not file.exists() and file.parent == Path() and shipped.is_file():
        file = shipped
    if file.is_dir():
        raise UserError(f'`config` {name}: is a folder; name a file in it')
    if not file.is_file():
        known = {path.stem for path in RECIPES.glob('*.yaml')}
        known |= {path.name for path in file.parent.glob('*.yaml')} if file.parent.is_dir() else set()
        raise UserError(f'`config` {name}: no such recipe or file{nearest(file.name, known)}')
    return read_mapping(file, f'`config` {name}')
