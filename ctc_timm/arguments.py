"""Flags and recipes: a command line that speaks timm's names, and YAML files that preset it.

Each module declares the flags it reads with a function `add_arguments(parser)`; a script puts together the
ones it uses. A recipe is a YAML mapping of flag names (dashes or underscores) to values; what is typed wins.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import yaml

from .data.indexed import UnreadableError
from .errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which knows `-c/--config`."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault('formatter_class', argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._declared: dict[str, Any] | None = None
        self.add_argument('-c', '--config', metavar='FILE.yaml', help='recipe whose values preset the flags')

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, with the nearest flags to an unknown one."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = rest[0].partition('=')[0]
            near = nearest(flag, self._option_string_actions) if flag.startswith('-') else ''
            self.error(f'{flag}: no such flag{near}')
        return known

    def actions_by_name(self) -> dict[str, argparse.Action]:
        """Flags by the name their value is stored under."""
        return {a.dest: a for a in self._actions if a.dest not in ('help', 'config')}

    def preset(self, values: dict[str, Any], source: str) -> None:
        """Make these the defaults.

        Args:
            values: Flag names to values.
            source: File they come from, for error messages.

        Raises:
            UserError: A key that is no flag, or a value that its flag refuses.
        """
        actions = self.actions_by_name()
        if self._declared is None:
            self._declared = {name: action.default for name, action in actions.items()}
        for key, value in values.items():
            name = str(key).replace('-', '_')
            if name not in actions:
                raise UserError(f'{source}: {key!r} is no flag{nearest(name, actions)}')
            self.set_defaults(**{name: self._checked(actions[name], value, source)})

    def _checked(self, action: argparse.Action, value: Any, source: str) -> Any:
        """A YAML value as the flag's own type would have read it."""
        flag = next((word for word in action.option_strings if word.startswith('--')), action.dest)
        if value is None:
            if self._declared and self._declared[action.dest] is not None:
                raise UserError(f'{source}: {flag} has no value; leave it out for {self._declared[action.dest]!r}')
            return None
        if isinstance(action, KeyValues) != isinstance(value, dict):
            wanted = 'a mapping' if isinstance(action, KeyValues) else 'no mapping'
            raise UserError(f'{source}: {flag} takes {wanted}, got {value!r}')
        if isinstance(value, dict):
            return value
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f'{source}: {flag} is a switch, true or false, got {value!r}')
            return value
        many = action.nargs in ('+', '*') or isinstance(action.nargs, int)
        if many and not isinstance(value, (list, tuple)):
            value = [value]
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise UserError(f'{source}: {flag} takes {action.nargs} values, got {value!r}')
        if action.nargs == '?' and isinstance(value, bool):
            return action.const if value else None
        convert: Callable[[str], Any] = action.type if callable(action.type) else str
        out = []
        for item in value if many else [value]:
            try:
                item = convert(str(item))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise UserError(f'{source}: {flag}: {error}') from None
            if action.choices is not None and item not in action.choices:
                raise UserError(f'{source}: {flag} must be one of {", ".join(map(str, action.choices))}, got {item!r}')
            out.append(item)
        return out if many else out[0]


def load_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        UserError: No such file, or not a YAML mapping.
    """
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob('*.yaml')]) if file.parent.is_dir() else ''
        raise UserError(f'--config {path}: no such file{near}')
    try:
        recipe = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'--config {path}: not valid YAML: {" ".join(str(error).split())}') from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f'--config {path}: must be a mapping of flags to values, got a {type(recipe).__name__}')
    return recipe


def parse(
    parser: Parser,
    argv: Sequence[str] | None = None,
    default_recipe: Path | None = None,
    presets: Callable[[argparse.Namespace], tuple[dict[str, Any], str] | None] | None = None,
) -> argparse.Namespace:
    """Read the command line over a recipe over the flags' defaults.

    Args:
        parser: With all flags declared.
        argv: Command line without the program's name; the process's own when None.
        default_recipe: Used when neither a recipe nor data are named.
        presets: Given the first reading, values that come between recipe and command line (a resumed run's).

    Returns:
        All flags; `config` names the recipe that was used, if any.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = parser.parse_args(argv)
    if first.config:
        parser.preset(load_recipe(first.config), str(first.config))
    elif default_recipe is not None and not (first.dataset or first.data_dir or first.data):
        parser.preset(load_recipe(default_recipe), str(default_recipe))
    between = presets(parser.parse_args(argv)) if presets else None
    if between:
        parser.preset(*between)
    return parser.parse_args(argv)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script; a `UserError` becomes one line and exit code 2.

    Of several processes only the first prints it, unless it is about what one of them read.
    """
    huggingface_hub.logging.set_verbosity_error()  # a Hub out of reach is told once, not at each retry
    try:
        main()
    except UserError as error:
        if os.environ.get('RANK', '0') == '0' or isinstance(error, UnreadableError):
            print(f'{Path(sys.argv[0]).name}: error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def positive_int(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = _number(int, text, 'a whole number')
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def non_negative_int(text: str) -> int:
    """An integer of at least 0, for argparse."""
    value = _number(int, text, 'a whole number')
    if value < 0:
        raise argparse.ArgumentTypeError(f'must not be negative, got {text}')
    return value


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = _number(float, text, 'a number')
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = _number(float, text, 'a number')
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f'must not be negative, got {text}')
    return value


def momentum(text: str) -> float:
    """A number in [0, 1), for argparse."""
    value = _number(float, text, 'a number')
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be in [0, 1), got {text}')
    return value


def probability(text: str) -> float:
    """A number in [0, 1], for argparse."""
    value = _number(float, text, 'a number')
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be in [0, 1], got {text}')
    return value


def _number(convert: Callable[[str], Any], text: str, what: str) -> Any:
    try:
        return convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be {what}, got {text!r}') from None


class KeyValues(argparse.Action):
    """`--model-kwargs img_size=96 act_layer=gelu`: words to a dict, values read as YAML scalars."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = {}
        for word in values:
            key, equals, value = word.partition('=')
            if not equals:
                parser.error(f'argument {option_string}: must be key=value, got {word!r}')
            try:
                found[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                parser.error(f'argument {option_string}: {key} must be a YAML value, got {value!r}')
        setattr(namespace, self.dest, found)
