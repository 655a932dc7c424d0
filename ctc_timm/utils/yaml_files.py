"""YAML files, which may be of other people: plain values and nothing else, every key once, no larger than they look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, one_line

LARGEST = 1 << 16  # characters; all flags of a run take a twentieth of that
# What PyYAML lets through of its conversions: no such month, a number too long, a word that is no boolean, too deep.
_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    """yaml.safe_load's, without aliases, by which a few lines can stand for gigabytes, and with each key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, 'aliases (*name) are not taken', mark)
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
    """What a YAML text holds, by the rules of `yaml.safe_load`, without aliases and without a key that stands twice.

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
    except (yaml.YAMLError, *_ODD) as error:
        raise ValueError(one_line(error)) from None


def read_mapping(file: Path, what: str = '') -> dict[str, Any]:
    """A recipe or an args.yaml: flags by name, none in an empty file.

    Args:
        file: To be read.
        what: What to call it in error messages; its path when empty.

    Raises:
        UserError: It can't be read, or is no mapping of flags to plain values.
    """
    what = what or str(file)
    try:
        if file.stat().st_size > 4 * LARGEST:  # before it is in memory
            raise ValueError(f'longer than {LARGEST} characters')
        found = read_values(file.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{what}: cannot be read: {error.strerror or one_line(error)}') from None
    except ValueError as error:
        raise UserError(f'{what}: not valid YAML: {one_line(error)}') from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f'{what}: must be a mapping of flags to values, got a {type(found).__name__}')
    return found
