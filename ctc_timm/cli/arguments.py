"""Flags and recipes: a command line that speaks timm's names, and YAML files that preset it.

Each module declares the flags it reads with a function `add_arguments(parser)`; a script puts together the
ones it uses. A recipe is a YAML mapping of flag names (dashes or underscores) to values; what is typed wins.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub

from ..data import decoding as workers
from ..data.decoding import UnreadableError
from ..utils.errors import Stopped, UserError, nearest
from ..utils.text import holds_token, sanitize, without_tokens
from ..utils.yaml_files import read_mapping, read_values

MOST = 2**31 - 1  # of a whole number; what all libraries beneath can count
LARGEST, SMALLEST = 1e12, 1e-37  # of other numbers; float32 keeps their squares, and their reciprocals
LONGEST, LONGEST_NAME = 4096, 255  # bytes of a path and of a name in it, as file systems have them


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no number that is none, and no text that is no text.

    A flag without a type takes a text that is not empty, one declared with `int` a whole number, one with `float` a
    finite number; `any_text` alone takes an empty text, as a shell's variable that is not set must not go for a value.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{'allow_abbrev': False, **kwargs})
        self.register('type', int, whole_number(-MOST))
        self.register('type', float, finite_float)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse's own, once the words are sound."""
        for word in arg_strings if action.nargs != argparse.PARSER else ():
            fault = text_fault(action, word)
            if fault:
                raise argparse.ArgumentError(action, fault)
        return super()._get_values(action, arg_strings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, with the nearest flags to an unknown one."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = brief(rest[0].partition('=')[0], plain=True)
            near = nearest(flag, self._option_string_actions) if flag.startswith('-') else ''
            self.error(f'{flag}: no such flag{near}')
        return known


class Parser(OneLineParser):
    """The scripts' parser: it knows `-c/--config`, and takes presets from a mapping."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{'formatter_class': argparse.ArgumentDefaultsHelpFormatter, **kwargs})
        self._declared: dict[str, Any] | None = None
        self.add_argument('-c', '--config', metavar='FILE.yaml', help='recipe whose values preset the flags')

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
        seen: set[str] = set()
        for key, value in values.items():
            name = str(key).replace('-', '_')
            if name not in actions:
                raise UserError(f'{source}: {brief(key)} is no flag{nearest(name, actions)}')
            if name in seen:
                raise UserError(f'{source}: {brief(key)} stands twice, with a dash and with an underscore')
            seen.add(name)
            self.set_defaults(**{name: self._checked(actions[name], value, source)})

    def _checked(self, action: argparse.Action, value: Any, source: str) -> Any:
        """A YAML value as the flag's own type would have read it."""
        flag = next((word for word in action.option_strings if word.startswith('--')), action.dest)
        if value is None:
            if self._declared and self._declared[action.dest] is not None:
                raise UserError(f'{source}: {flag} has no value; leave it out for {self._declared[action.dest]!r}')
            return None
        if self._declared and value == self._declared[action.dest] and type(value) is type(self._declared[action.dest]):
            return value  # an empty text can be a default, but not be asked for
        if isinstance(action, KeyValues) != isinstance(value, dict):
            wanted = 'a mapping' if isinstance(action, KeyValues) else 'no mapping'
            raise UserError(f'{source}: {flag} takes {wanted}, got {brief(value)}')
        if isinstance(value, dict):
            for key in value:
                if not (isinstance(key, str) and key.isidentifier()):
                    raise UserError(f'{source}: {flag}: {brief(key)} is no name of an argument')
            return value
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f'{source}: {flag} is a switch, true or false, got {brief(value)}')
            return value
        many = action.nargs in ('+', '*') or isinstance(action.nargs, int)
        if many and not isinstance(value, (list, tuple)):
            value = [value]
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise UserError(f'{source}: {flag} takes {action.nargs} values, got {brief(value)}')
        if action.nargs == '+' and not value:
            raise UserError(f'{source}: {flag} takes at least one value, got {brief(value)}')
        if action.nargs == '?' and isinstance(value, bool):
            return action.const if value else None
        convert = self._registry_get('type', action.type, action.type) or str
        out = []
        for item in value if many else [value]:
            if action.type in (None, any_text) and not isinstance(item, str):
                raise UserError(f'{source}: {flag} takes a text, got {brief(item)}; put a text in quotes')
            fault = text_fault(action, str(item))
            if fault:
                raise UserError(f'{source}: {flag}: {fault}')
            try:
                item = convert(str(item))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise UserError(f'{source}: {flag}: {error}') from None
            if action.choices is not None and item not in action.choices:
                known = ', '.join(map(str, action.choices))
                raise UserError(f'{source}: {flag} must be one of {known}, got {brief(item)}')
            out.append(item)
        return out if many else out[0]


def load_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        UserError: No such file, or not a YAML mapping.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f'--config {path}: is a folder; name a file in it')
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob('*.yaml')]) if file.parent.is_dir() else ''
        raise UserError(f'--config {path}: no such file{near}')
    return read_mapping(file, f'--config {path}')


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

    Raises:
        UserError: Flags that can't be, or one that holds a secret.
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
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if holds_token(value):
            raise UserError(
                f'--{name.replace("_", "-")}: holds a token or a password, which would be kept with the run; leave it '
                f'out, and set HF_TOKEN or log in with `hf auth login`'
            )
    return args


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script; a `UserError` becomes one line and its exit code.

    Of several processes only the first prints it, unless it is about what one of them read or lost.
    """
    huggingface_hub.logging.set_verbosity_error()  # a Hub out of reach is told once, not at each retry
    try:
        with workers.translate_errors():
            main()
    except UserError as error:
        of_one = isinstance(error, (UnreadableError, workers.WorkerError))
        if os.environ.get('RANK', '0') == '0' or of_one:
            _tell(str(error), '' if isinstance(error, Stopped) else 'error: ')
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_MACHINE:
            raise
        _tell(f'{os.fsdecode(error.filename)}: {error.strerror}')
        sys.exit(1 if error.errno in _OUT_OF_ROOM else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


# What a file system may refuse with any script at fault of nothing.
_OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
_OF_THE_MACHINE = _OUT_OF_ROOM | {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
}


def _tell(message: str, what: str = 'error: ') -> None:
    """An error as one line of what a terminal can show: what was typed may hold anything."""
    print(f'{Path(sys.argv[0]).name}: {what}{sanitize(" ".join(message.split()))}', file=sys.stderr)


def whole_number(low: int, high: int = MOST) -> Callable[[str], int]:
    """The check of a whole number from `low` to `high`, for argparse."""

    def check(text: str) -> int:
        value = _number(int, text, 'a whole number')
        if value < low:
            wanted = 'not be negative' if low == 0 else f'be at least {low}'
            raise argparse.ArgumentTypeError(f'must {wanted}, got {brief(text, plain=True)}')
        if value > high:
            raise argparse.ArgumentTypeError(f'must be at most {high}, got {brief(text, plain=True)}')
        return value

    return check


def number(low: float, high: float) -> Callable[[str], float]:
    """The check of a number from `low` to `high`, both included, for argparse."""

    def check(text: str) -> float:
        value = _number(float, text, 'a number')
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'must be from {low:g} to {high:g}, got {brief(text, plain=True)}')
        return value

    return check


positive_int = whole_number(1)
non_negative_int = whole_number(0)
finite_float = number(-LARGEST, LARGEST)


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = _number(float, text, 'a number')
    if not value >= SMALLEST:
        raise argparse.ArgumentTypeError(f'must be above 0, got {brief(text, plain=True)}')
    return _at_most_largest(value, text)


def non_negative_float(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = _number(float, text, 'a number')
    if not value >= 0:
        raise argparse.ArgumentTypeError(f'must not be negative, got {brief(text, plain=True)}')
    return _at_most_largest(value, text)


def below_one(text: str) -> float:
    """A number in [0, 1), for argparse."""
    value = _number(float, text, 'a number')
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be in [0, 1), got {brief(text, plain=True)}')
    return value


momentum = below_one


def probability(text: str) -> float:
    """A number in [0, 1], for argparse."""
    value = _number(float, text, 'a number')
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be in [0, 1], got {brief(text, plain=True)}')
    return value


def any_text(text: str) -> str:
    """A text that may be empty, for argparse."""
    return text


def _number(convert: Callable[[str], Any], text: str, what: str) -> Any:
    try:
        return convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be {what}, got {brief(text)}') from None


def _at_most_largest(value: float, text: str) -> float:
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f'must be at most {LARGEST:g}, got {brief(text, plain=True)}')
    return value


def text_fault(action: argparse.Action, text: str) -> str:
    """Why a text can't be the value of a flag, whatever its type; empty if it can."""
    if not text and action.type is not any_text and action.choices is None:
        return 'must not be empty; leave the flag out'
    if text == '--' and action.option_strings:  # argparse would take --flag=-- for a flag without a value
        return "must be a value, got '--'"
    if any(unicodedata.category(character) in ('Cc', 'Cs') for character in text):
        return f'must be UTF-8 text without control characters, got {brief(text)}'
    longest = max(map(len, text.encode().split(b'/')))
    if not isinstance(action, KeyValues) and (len(text) > LONGEST or longest > LONGEST_NAME):
        return f'must be no longer than a path can be, got {brief(text)}'
    return ''


def brief(value: Any, plain: bool = False) -> str:
    """A value as error messages show it, cut to a length that can be read.

    Args:
        value: From a flag or a recipe.
        plain: Whether a text goes without quotes.
    """
    text = without_tokens(value if plain and isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f'{text[:60]}...'


class KeyValues(argparse.Action):
    """`--model-kwargs img_size=96 act_layer=gelu`: words to a dict, values read as YAML scalars."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = {}
        for word in values:
            key, equals, value = word.partition('=')
            if not equals or not key.isidentifier():
                parser.error(f'argument {option_string}: must be key=value, got {brief(word)}')
            try:
                found[key] = read_values(value)
            except ValueError:
                parser.error(f'argument {option_string}: {key} must be a YAML value, got {brief(value)}')
        setattr(namespace, self.dest, found)
