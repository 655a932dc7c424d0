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
    """argparse with errors of one line and the nearest flag to an unknown one.

    Args:
        **options: For argparse.
    """

    def __init__(self, **options: Any) -> None:
        options = {'allow_abbrev': False, 'argument_default': argparse.SUPPRESS, **options}
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, with the nearest flags to an unknown one."""
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

    Args:
        parser: Gets the flags. What is not typed is not in its result.
        cls: The command's settings.
        folder: Take the data folder without a flag too, as timm's training script does.
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
    checks = setting.checks
    names = [word for word in (checks.get('short'),) if word]
    names += [f'--{setting.name.replace("_", "-")}', *checks.get('aliases', ())]
    if 'positional' in checks:
        names = [setting.name]
    options: dict[str, Any] = {'help': _help(setting)}
    if setting.kind is bool:
        if not setting.name.startswith('no_'):
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(*names, action='store_true', **options)
        return
    if setting.choices:
        options['metavar'] = '{' + ','.join(map(str, setting.choices)) + '}'
    elif 'metavar' in checks:
        options['metavar'] = checks['metavar']
    if setting.kind is dict:
        options |= {'nargs': '*', 'action': _KeyValues}
    elif setting.many and isinstance(checks.get('metavar'), tuple):
        options['nargs'] = setting.count
    elif setting.many:
        options['nargs'] = setting.count or ('+' if setting.default or setting.optional else '*')
    elif 'const' in checks:
        options |= {'nargs': '?', 'const': checks['const']}
    if checks.get('positional'):
        options['nargs'] = checks['positional']
    group.add_argument(*names, **options)


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
    """What was typed, by name, each value checked.

    Args:
        parser: With the flags of `add_settings`.
        cls: The command's settings.
        words: The command line; that of the process when None.

    Raises:
        UserError: An unknown flag, or a value that its setting refuses.
    """
    given = vars(parser.parse_args(words))
    known = settings_of(cls)
    for name, value in given.items():
        if name in known:
            try:
                given[name] = check_value(known[name], value)
            except ValueError as error:
                raise UserError(f'`{name}`: {error}') from None
    return given


def as_flags(message: str, cls: type | None = None) -> str:
    """Write the settings that a library's message names as flags.

    Args:
        message: With settings in backquotes.
        cls: The command's settings, of which some have no flag.
    """
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
