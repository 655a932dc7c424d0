"""Flags made from settings: a field's name with dashes, with its type, bounds and help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..utils.errors import UserError, nearest
from ..utils.settings import Setting, check_value, settings_of, shorten
from ..utils.yaml_files import read_values

# A setting in a library's message, `batch_size` or `resume='auto'`.
_NAMED = re.compile(r"`([a-z][a-z0-9_]*)(?:=('?)([^`']*)\2)?`")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and the nearest flag to an unknown one. What is not typed is left out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, naming the flags nearest to an unknown one."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = shorten(rest[0].partition('=')[0], plain=True)
            near = nearest(flag, self._option_string_actions) if flag.startswith('-') else ''
            self.error(f'{flag}: no such flag{near}')
        return known

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse would drop a word '--' and hand the flag nothing.
        if '--' in arg_strings and action.option_strings and action.nargs != argparse.PARSER:
            raise argparse.ArgumentError(action, "must be a value, got '--'")
        return super()._get_values(action, arg_strings)


def add_settings(parser: argparse.ArgumentParser, cls: type, folder: bool = False) -> None:
    """Declare a flag for every setting of a command, and `-c/--config`.

    With `folder` the data folder needs no flag, as in timm's training script.
    """
    if folder:
        parser.add_argument('data_dir', nargs='?', metavar='DIR', help='same as --data-dir')
    parser.add_argument('-c', '--config', metavar='RECIPE', help='a shipped recipe by name, or a YAML file')
    groups: dict[str, Any] = {}
    for setting in settings_of(cls).values():
        title = setting.title or 'options'
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], setting)


def _add_flag(group: Any, setting: Setting) -> None:
    checks, flag = setting.checks, f'--{setting.name.replace("_", "-")}'
    names = [*([checks['short']] if 'short' in checks else ()), flag, *checks.get('aliases', ())]
    options: dict[str, Any] = {'help': _help(setting)}
    if setting.choices:
        options['metavar'] = '{' + ','.join(map(str, setting.choices)) + '}'
    elif 'metavar' in checks:
        options['metavar'] = checks['metavar']
    if setting.kind is bool:
        options['action'] = 'store_true' if setting.name.startswith('no_') else argparse.BooleanOptionalAction
    elif setting.kind is dict:
        options |= {'nargs': '*', 'action': _KeyValues}
    elif setting.many:
        options['nargs'] = setting.count or ('+' if setting.default or setting.optional else '*')
    elif 'const' in checks:
        options |= {'nargs': '?', 'const': checks['const']}
    if checks.get('positional'):
        options['nargs'] = checks['positional']
    group.add_argument(*([setting.name] if 'positional' in checks else names), **options)


def _help(setting: Setting) -> str:
    """The help text with the default, where it says something."""
    text = setting.checks['help'].replace('%', '%%')
    default = setting.default
    if default in (None, '', (), {}) or setting.kind is bool:
        return text
    shown = ' '.join(map(str, default)) if isinstance(default, tuple) else default
    return f'{text} (default: {shown})'.replace('(default: %', '(default: %%')


class _KeyValues(argparse.Action):
    """`--model-kwargs img_size=96 act_layer=gelu`: words to a dict, values read as YAML scalars."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = {}
        for word in values:
            key, equals, value = word.partition('=')
            if not equals or not key.isidentifier():
                parser.error(f'{option_string}: must be key=value, got {shorten(word)}')
            try:
                found[key] = read_values(value)
            except ValueError:
                parser.error(f'{option_string}: {key} must be a YAML value, got {shorten(value)}')
        setattr(namespace, self.dest, found)


def read_flags(parser: argparse.ArgumentParser, cls: type, words: Sequence[str] | None = None) -> dict[str, Any]:
    """What was typed, or the process's command line, by name, each value checked.

    Raises:
        UserError: An unknown flag, or a value that its setting refuses.
    """
    given, known = vars(parser.parse_args(words)), settings_of(cls)
    for name, value in given.items():
        if name in known:
            try:
                given[name] = check_value(known[name], value)
            except ValueError as error:
                raise UserError(f'`{name}`: {error}') from None
    return given


def as_flags(message: str, cls: type | None = None) -> str:
    """Write the settings that a library's message names in backquotes as flags of a command."""
    known = settings_of(cls) if cls is not None else {}

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[3]
        if name in known and 'positional' in known[name].checks:
            return str(known[name].checks['metavar'])
        name = name.replace('_', '-')
        if value in ('True', 'False'):
            return f'--{"no-" * (value == "False")}{name}'
        return f'--{name}' + (f' {value}' if value else '')

    return _NAMED.sub(flag, message)
