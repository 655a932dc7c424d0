"""Every flag of every script against values that it must not take: exit code 2 and one line that names the flag.

The flags are read off the parsers themselves, so that a new one is tried without anything added here.
"""

from __future__ import annotations

import argparse
import inspect
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ctc_timm.cli.commands import commands as cli
from ctc_timm.cli.commands import flags as arguments
from runs import ROOT, Ended

from ctc_timm.cli.arguments import KeyValues, OneLineParser, any_text, run_script
from ctc_timm.utils.errors import UserError

SCRIPTS = (
    *('train.py', 'validate.py', 'transfer/linear_probe.py', 'transfer/finetune.py', 'transfer/dynamics.py'),
    *('transfer/detect.py', 'transfer/segment.py', 'transfer/digit_scenes.py'),
)
REQUIRED = {'transfer/dynamics.py': ('RUN',), 'transfer/digit_scenes.py': ('OUT',)}
COMMANDS = {
    'publish': ['publish', 'RUN', '--repo-id', 'a/b'],
    'zoo list': ['zoo', 'list'],
    'zoo add': ['zoo', 'add', 'RUN'],
    'zoo sync': ['zoo', 'sync', 'alice'],
}
LEAST_CASES = 300

NOT_TEXT = ['\udcff', 'caf\udce9', 'a\0b', 'two\nlines', '\x1b[2J', '\x7f']  # bytes that are no UTF-8, as argv has them
TOO_LONG = ['x' * 5000, 'a/' * 3000, 'y' * 300]
NO_NUMBER = [
    *('many', '', ' ', 'nan', '-nan', 'inf', '-inf', '1e400', '-1e400', '9' * 31, '9' * 5000, '0x10', '1,5', '1..2'),
    *('None', 'true', '[1]', '--', '1 2', '1e', '%d', '{}', *NOT_TEXT),
]
NO_MAPPING = [
    *('', 'depth', '=3', 'a b=3', '1=2', 'a=[1', 'a=&x [*x]', 'a=!!python/none', 'a=2001-99-99', 'a=!!bool x'),
    *('a=' + '[' * 5000, 'a={b: 1, b: 2}', *NOT_TEXT),
]
NO_REPO = ['', 'x', 'a/b/c', '../x', 'a/..', ' a/b', 'a/b ', '/a/b', 'a//b', 'a/b@main', 'a/--', 'ä/b', *NOT_TEXT]
SIGNED = {'mean', 'opt_betas'}  # numbers that may be below zero
MAY_BE_ZERO = {arguments.non_negative_int, arguments.non_negative_float, arguments.momentum, arguments.probability}
MUST_NOT_BE_ZERO = {arguments.positive_int, arguments.positive_float}


@dataclass(frozen=True)
class Command:
    """A script or a command of `ctc-timm`: how it is run, its parser, and the words it can't do without."""

    name: str
    main: Callable[[], None]
    parser: argparse.ArgumentParser
    words: tuple[str, ...] = ()

    def parse(self, words: list[str]) -> Any:
        """What its parser makes of these words."""
        return (self.parser if self.name in SCRIPTS else cli.build_parser()).parse_args([*self.words, *words])


class _Seen(Exception):
    """A parser that has all its flags."""


def _parser_of(main: Any) -> argparse.ArgumentParser:
    """The parser that a script puts together."""
    seen: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        seen.append(parser)
        raise _Seen

    original, main.__globals__['parse'] = main.__globals__['parse'], stop
    try:
        main()
    except _Seen:
        return seen[0]
    finally:
        main.__globals__['parse'] = original
    raise AssertionError('parses nothing')


@cache
def commands() -> tuple[Command, ...]:
    """All that has flags."""
    found = []
    for name in SCRIPTS:
        main = runpy.run_path(str(ROOT / name))['main']
        found.append(Command(name, main, _parser_of(main), REQUIRED.get(name, ())))
    for name, words in COMMANDS.items():
        parser: Any = cli.build_parser()
        for word in name.split():
            (nested,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = nested.choices[word]
        found.append(Command(name, cli.main, parser, tuple(words)))
    return tuple(found)


def test_no_command_is_left_out() -> None:
    """Every script of the repository that reads flags, and every command of `ctc-timm`."""
    scripts = [path for folder in (ROOT, ROOT / 'transfer') for path in folder.glob('*.py')]
    assert {str(path.relative_to(ROOT)) for path in scripts} == set(SCRIPTS)

    def leaves(parser: Any, name: str = '') -> Iterator[str]:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for word, inner in nested[0].choices.items() if nested else ():
            yield from leaves(inner, f'{name} {word}'.strip())
        if not nested:
            yield name

    assert set(leaves(cli.build_parser())) == set(COMMANDS)


def actions(command: Command) -> list[argparse.Action]:
    """Flags and positional arguments, but for --help."""
    return [action for action in command.parser._actions if not isinstance(action, argparse._HelpAction)]


def bad_values(action: argparse.Action) -> list[str]:
    """What an argument must not take, by what it is declared to take."""
    if action.choices is not None:
        words = ['', 'unknown', '7', f' {list(action.choices)[-1]} ', *NOT_TEXT]
        return [word for word in words if word not in action.choices]
    if isinstance(action, KeyValues):
        return NO_MAPPING
    if action.type is any_text:
        return NOT_TEXT
    if action.type is cli.repo_id:
        return NO_REPO
    if action.type is None:
        return ['', *NOT_TEXT, *TOO_LONG]
    below = [] if action.dest in SIGNED else ['-1', '-0.5', '-1e30']
    return NO_NUMBER + below + (['0', '-0.0', '0e5'] if action.type in MUST_NOT_BE_ZERO else [])


def words_for(action: argparse.Action, value: str, good: str = '1') -> list[str]:
    """The words of a command line that give an argument this value."""
    if not action.option_strings:
        return [value]
    flag = action.option_strings[-1]
    if isinstance(action.nargs, int) and action.nargs:
        return [flag, value, *[good] * (action.nargs - 1)]
    return [f'{flag}={value}']


def cases(command: Command) -> Iterator[tuple[argparse.Action, list[str]]]:
    """Arguments with words that must be refused."""
    for action in actions(command):
        if not action.option_strings:
            for value in bad_values(action):
                yield action, [value]
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            for value in ('', '0', 'true', '\udcff'):
                yield action, [f'{flag}={value}']
            continue
        for value in bad_values(action):
            yield action, words_for(action, value)
        if action.nargs not in ('?', '*'):
            yield action, [flag]
            yield action, [flag, '--dry-run']
        if isinstance(action.nargs, int):
            yield action, [flag, *['1'] * (action.nargs - 1)]


def translate_errors(command: Command, action: argparse.Action, words: list[str], message: str) -> None:
    """A message that helps: one line, not endless, with the argument's name."""
    line = ' '.join(message.split())
    names = action.option_strings or [str(action.metavar)]
    assert any(name in line for name in names), (command.name, words, line)
    assert len(line) < 500 and '\n' not in line, (command.name, words, line)


def test_every_flag_refuses_what_it_cannot_take(record_property: Callable[[str, object], None]) -> None:
    """Wrong types, nothing, below zero, huge, no number, no UTF-8, control characters, no value at all."""
    tried, taken = 0, []
    for command in commands():
        for action, words in cases(command):
            if command.words and not action.option_strings:
                continue  # given already; see below
            tried += 1
            try:
                command.parse(words)
            except UserError as error:
                translate_errors(command, action, words, str(error))
            else:
                taken.append((command.name, words))
    assert not taken
    assert tried >= LEAST_CASES
    record_property('refused', tried)
    print(f'{tried} bad flags refused')


def test_required_arguments() -> None:
    """What has to be named without a flag is checked as flags are."""
    for prefix, rest in ((['publish'], ['--repo-id', 'a/b']), (['zoo', 'add'], []), (['zoo', 'sync'], [])):
        for value in ['', *NOT_TEXT, *TOO_LONG]:
            with pytest.raises(UserError, match='argument (RUN|NAMESPACE)'):
                cli.build_parser().parse_args([*prefix, value, *rest])
    for command in commands():
        for name in REQUIRED.get(command.name, ()):
            for value in ['', *NOT_TEXT, *TOO_LONG]:
                with pytest.raises(UserError, match=f'argument {name}'):
                    command.parser.parse_args([value])


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command as its script does."""

    def run(command: Command, words: list[str]) -> Ended:
        monkeypatch.setattr(sys, 'argv', [Path(command.name).name, *command.words, *words])
        with pytest.raises(SystemExit) as ended:
            run_script(command.main)
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run


def test_scripts_end_with_2_and_one_line(
    start: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable
) -> None:
    """The same through the scripts' own entry: every argument of every script with one of its bad values in turn."""
    monkeypatch.chdir(tmp_path)
    tried = 0
    for command in commands():
        last: dict[str, int] = {}
        by_action: dict[str, list[list[str]]] = {}
        for action, words in cases(command):
            if not (command.words and not action.option_strings):
                by_action.setdefault(action.dest, []).append(words)
        for number, (dest, tries) in enumerate(by_action.items()):
            last[dest] = number % len(tries)
            ended = start(command, tries[last[dest]])
            assert ended.code == 2, (command.name, tries[last[dest]], ended)
            lines = ended.err.splitlines()
            assert len(lines) == 1 and lines[0].isprintable(), (command.name, ended)
            assert lines[0].startswith(f'{Path(command.name).name}: error: ') and not ended.out
            tried += 1
    assert tried >= LEAST_CASES and not list(tmp_path.iterdir())
    record_property('refused_by_scripts', tried)
    print(f'{tried} bad flags refused through the scripts')


def test_every_flag_takes_what_it_should() -> None:
    """The default of every flag typed out, and the ends of what it is declared to take."""
    tried = 0
    for command in commands():
        for action in actions(command):
            if command.words and not action.option_strings:
                continue
            for value, wanted in good_values(action):
                found = getattr(command.parse(words_for(action, value, value)), action.dest)
                found = found[0] if isinstance(found, list) else found
                assert found == wanted, (command.name, action.option_strings, value, found)
                tried += 1
    assert tried >= LEAST_CASES


def lowest(kind: Any) -> float:
    """The lower end that `arguments.whole_number` or `arguments.number` made a check with; 1 of any other."""
    return inspect.getclosurevars(kind).nonlocals.get('low', 1) if inspect.isfunction(kind) else 1


def good_values(action: argparse.Action) -> Iterator[tuple[str, Any]]:
    """What an argument must take, and what it makes of it."""
    if action.nargs == 0 or isinstance(action, KeyValues) or action.type is cli.repo_id or action.dest == 'config':
        return
    if action.choices is not None:
        yield from ((str(choice), choice) for choice in action.choices)
    elif action.type is any_text:
        yield from (('', ''), ('train[:100]', 'train[:100]'))
    elif action.type is None:
        yield from ((text, text) for text in ('größe/日本/👩‍👧', ' a b ', '%s {}', "it's", '~/x'))
    else:
        default = (*action.default, None)[0] if isinstance(action.default, (list, tuple)) else action.default
        if isinstance(default, (int, float)) and math.isfinite(default):
            yield from ((str(default), default), (f' {default} ', default))
        if action.type in MAY_BE_ZERO:
            yield '0', 0
        if action.type is not arguments.momentum:
            least = max(1, lowest(action.type))
            yield str(least), least


@pytest.mark.parametrize(
    'words, message',
    [
        (['--no-such-flag'], '--no-such-flag: no such flag'),
        (['--no-such-flag=\udcff'], '--no-such-flag: no such flag'),
        (['--\udcff'], 'no such flag'),
        (['--epoch', '3'], '--epoch: no such flag; nearest: --epochs'),  # no prefix stands for a flag
        (['-z'], '-z: no such flag'),
        (['a', 'b'], 'b: no such flag'),
        (['--epochs', '1', '--epochs', 'x'], '--epochs: must be a whole number'),
    ],
)
def test_words_that_are_no_flags(start: Callable[..., Ended], words: list[str], message: str) -> None:
    """Named in one line too."""
    ended = start(commands()[0], words)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and message in ended.err


def test_a_plain_int_or_float_is_checked_too() -> None:
    """A flag that somebody declares with Python's own types takes no infinity and no number beyond counting."""
    parser = OneLineParser()
    parser.add_argument('--count', type=int)
    parser.add_argument('--share', type=float)
    assert parser.parse_args(['--count', '-3', '--share', '-2.5']) == argparse.Namespace(count=-3, share=-2.5)
    for flag in ('--count', '--share'):
        for value in NO_NUMBER:
            with pytest.raises(UserError, match=flag):
                parser.parse_args([f'{flag}={value}'])


NOT_FOR_A_RUN = [
    ('--dataset hfds/', '--dataset hfds/: names no data set'),
    ('--dataset /', '--dataset /'),
    ('--dataset imagefolder', '--data-dir'),
    ('--train-split train[a:b]', "'train[a:b]'"),
    ('--train-split=', "split ''"),
    ('--val-split validation[5:2]', "'validation[5:2]' of the digits is empty"),
    ('--train-split train[:1]', 'fewer than two classes'),
    ('--input-img-mode foo', '--input-img-mode foo'),
    ('--in-chans 4096', '--in-chans 4096'),
    ('--model local-dir:/', '--model local-dir:/'),
    ('--model hf-hub:../x', '--model hf-hub:../x'),
    ('--model %s', '--model %s: unknown to timm'),
    ('--model-kwargs num_classes=x', '--model test_resnet'),
    ('--model-kwargs act_layer=foo', '--model test_resnet'),
    ('--model-kwargs drop_rate=2', 'dropout probability'),
    ('--gp foo', 'Invalid pool type: foo'),
    ('--initial-checkpoint /', '--initial-checkpoint /: no such file'),
    ('--initial-checkpoint train.py', '--initial-checkpoint train.py: not weights of'),
    ('--experiment ../x', '--experiment ../x'),
    ('--resume /', '--resume /: no run with a saved state there'),
    ('--opt-kwargs lr=x', '--opt-kwargs'),
    ('--opt adamw --opt-betas -1 2', '--opt-betas'),
    ('--sched wsd', '--sched wsd'),
    ('--sched cosine --lr-cycle-limit 1000 --lr-cycle-mul 10', '--sched cosine'),
    ('--sched step --decay-epochs 0.001 --decay-rate 10', '--decay-rate 10'),
    ('--cutmix-minmax 0.5 0.2', '--cutmix-minmax 0.5 0.2: the first must be smaller'),
    ('--cutmix-minmax 0.3 0.31', '--cutmix-minmax 0.3 0.31: no box is between'),
    ('--monitor-target nothing', '--monitor-target nothing'),
    ('--output /dev/null/x', '/dev/null/x'),
    ('--output train.py', 'train.py'),
]


@pytest.mark.parametrize('words, message', NOT_FOR_A_RUN, ids=[words for words, _ in NOT_FOR_A_RUN])
def test_what_shows_only_when_a_run_begins(
    script: Callable[..., Ended], tiny: list[str], tmp_path: Path, words: str, message: str
) -> None:
    """Values that only the data, the model, the optimizer or the disk can refuse are told as the others are."""
    where = [] if '--output' in words else ['--output', str(tmp_path / 'runs')]
    small = ['--train-split', 'train[:32]', '--val-split', 'validation[:8]', '-b', '16', '--epochs', '3']
    ended = script('train.py', *tiny, *small, *where, *words.split())
    errors = [line for line in ended.err.splitlines() if 'error: ' in line]
    assert ended.code in (1, 2) and 'Traceback' not in ended.err, ended.err
    assert len(errors) == 1 and message in errors[0], ended.err
    assert ended.code == 2 or '--output' in words  # where a disk refuses, the flags are not at fault
