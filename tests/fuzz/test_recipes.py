"""Recipes that no run can be made of: exit code 2 and one line that names the file, and the key where there is one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ctc_timm.cli.commands import repo_id
from runs import Ended
from test_flags import NOT_TEXT, SCRIPTS, commands

from ctc_timm.cli.arguments import KeyValues, any_text, load_recipe

Script = Callable[..., Ended]

BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join([f"*{before}"] * 9)}]\n' for before, name in zip('abcdefghij', 'bcdefghijk')
)
FILES: dict[str, tuple[bytes, str]] = {
    'bomb': (f'{BOMB}epochs: *k\n'.encode(), 'aliases'),
    'bomb in a key': (f'{BOMB}? *k\n: 1\n'.encode(), 'aliases'),
    'alias': (b'lr: &x 0.1\nlr-base: *x\n', 'aliases'),
    'merge': (b'base: &base {epochs: 1}\n<<: *base\n', 'aliases'),
    'itself': (b'mean: &m [*m]\n', 'aliases'),
    'twice': (b'epochs: 1\nlr: 0.1\nepochs: 2\n', "'epochs' stands twice"),
    'twice, as a dash': (b'num-negatives: 1\nnum_negatives: 2\n', "'num_negatives' stands twice"),
    'twice, nested': (b'model-kwargs: {depth: 1, depth: 2}\n', "'depth' stands twice"),
    'python object': (b'model: !!python/object/apply:os.system ["touch ran"]\n', 'os.system'),
    'python name': (b'lr: !!python/name:os.system\n', 'os.system'),
    'python tuple': (b'scale: !!python/tuple [0.5, 1]\n', 'tuple'),
    'python new': (b'!!python/object/new:os._exit [3]\n', 'os._exit'),
    'tag of its own': (b'epochs: !count 3\n', '!count'),
    'no such day': (b'experiment: 2001-99-99\n', 'month'),
    'no timestamp': (b'experiment: !!timestamp soon\n', 'not valid YAML'),
    'no boolean': (b'amp: !!bool perhaps\n', 'not valid YAML'),
    'no integer': (b"epochs: !!int ''\n", 'not valid YAML'),
    'no float': (b'lr: !!float fast\n', 'not valid YAML'),
    'no base64': (b'model: !!binary "@"\n', '--model takes a text'),
    'endless integer': (b'epochs: ' + b'9' * 5000 + b'\n', 'not valid YAML'),
    'deep': (b'mean: ' + b'[' * 20_000 + b'\n', 'nested too deeply'),
    'deep mapping': (b'{a: ' * 10_000 + b'\n', 'nested too deeply'),
    'deep, closed': (b'mean: ' + b'[' * 3000 + b']' * 3000 + b'\n', 'nested too deeply'),
    'long': (b'# ' + b'x' * 100_000 + b'\nepochs: 1\n', 'longer than'),
    'very long': (b'x' * 2_000_000, 'longer than'),
    'open quote': (b'model: "resnet50\n', 'not valid YAML'),
    'open list': (b'mean: [0.1, \n', 'not valid YAML'),
    'tab': (b'epochs:\n\t- 1\n', 'not valid YAML'),
    'two documents': (b'epochs: 1\n---\nepochs: 2\n', 'single document'),
    'directive': (b'%YAML 9.9\n---\nepochs: 1\n', 'not valid YAML'),
    'list': (b'- epochs\n- 1\n', 'must be a mapping of flags to values, got a list'),
    'text': (b'epochs 1\n', 'got a str'),
    'number': (b'3\n', 'got a int'),
    'latin-1': ('model: gr\u00f6\u00dfe\n'.encode('latin-1'), 'utf-8'),
    'utf-16': ('epochs: 1\n'.encode('utf-16'), 'utf-8'),
    'surrogate': (b'model: "\\ud800"\n', '--model'),
    'null byte': (b'model: "a\\0b"\n', '--model'),
    'raw null bytes': (b'\0' * 1000, 'not valid YAML'),
    'escape': (b'model: "\\e[2Jx"\n', '--model'),
    'png': (b'\x89PNG\r\n\x1a\n' + bytes(range(256)) * 8, 'utf-8'),
    'gzip': (b'\x1f\x8b\x08\x00' + bytes(range(256)), 'utf-8'),
    'safetensors': (
        b'\x3c\0\0\0\0\0\0\0{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}\0\0\0\0',
        'not valid YAML',
    ),
    'unknown key': (b'num-negative: 3\n', "'num-negative' is no flag; nearest: num_negatives"),
    'key that is a number': (b'3: 4\n', '3 is no flag'),
    'key that is a switch': (b'on: 4\n', 'True is no flag'),
    'key that is nothing': (b'null: 4\n', 'None is no flag'),
    'key that is a list': (b'? [a, b]\n: 4\n', 'not valid YAML'),
    'key of an escape': (b'"\\e[2J": 4\n', 'is no flag'),
    'long key': (b'"' + b'k' * 500 + b'": 4\n', 'is no flag'),
    'config in a recipe': (b'config: other.yaml\n', "'config' is no flag"),
    'help in a recipe': (b'help: true\n', "'help' is no flag"),
    'json of a list': (b'[{"epochs": 1}]', 'got a list'),
    'argument that is no word': (b'model-kwargs: {1: 2}\n', '--model-kwargs: 1 is no name of an argument'),
    'argument with a space': (b'opt-kwargs: {"a b": 2}\n', "--opt-kwargs: 'a b' is no name of an argument"),
}


@pytest.mark.parametrize('name', FILES)
def test_files_that_are_no_recipe(script: Script, tmp_path: Path, name: str) -> None:
    """None hangs, fills the memory, runs what it holds, or is taken for something else."""
    content, message = FILES[name]
    file = tmp_path / 'recipe.yaml'
    file.write_bytes(content)
    started = time.monotonic()
    ended = script('train.py', '-c', str(file), '--output', str(tmp_path / 'runs'))
    assert time.monotonic() - started < 10
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert str(file) in line and message in line and len(line) < 600 + len(str(file)) and line.isprintable()
    assert not (tmp_path / 'runs').exists() and not Path('ran').exists()


def test_what_is_no_file(script: Script, tmp_path: Path) -> None:
    """A folder, nothing at all, a file that must not be read, one that never ends."""
    os.mkfifo(tmp_path / 'pipe.yaml')
    (tmp_path / 'broken.yaml').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'around.yaml').symlink_to(tmp_path / 'around.yaml')
    for name, message in (
        ('', 'is a folder'),
        ('nothing.yaml', 'no such file'),
        ('broken.yaml', 'no such file'),
        ('around.yaml', 'no such file'),
        ('pipe.yaml', 'no such file'),
        ('x' * 300, 'longer'),
        ('a/' * 3000, 'longer'),
    ):
        ended = script('train.py', '-c', str(tmp_path / name))
        (line,) = ended.err.splitlines()
        assert ended.code == 2 and '--config' in line and message in line, (name, line)
    for name in ('/dev/zero', '/dev/null'):
        ended = script('train.py', '-c', name)
        assert ended.code == 2 and f'--config {name}: no such file' in ended.err


def test_an_empty_recipe_presets_nothing(tmp_path: Path) -> None:
    """Nothing, comments, or an empty mapping: the defaults, as without a recipe."""
    train: Any = commands()[0].parser
    for text in ('', '\n\n', '# epochs: 3\n', '---\n', '{}', '\ufeff# marked\n', 'null', '~'):
        file = tmp_path / 'recipe.yaml'
        file.write_text(text, encoding='utf-8')
        assert load_recipe(file) == {}
        train.preset(load_recipe(file), str(file))


def bad_values(action: Any) -> Iterator[Any]:
    """What a recipe must not give a flag, by what the flag is declared to take."""
    if isinstance(action, KeyValues):
        yield from (3, 'a=1', [1], True, {1: 2}, {'': 3}, {'a b': 1})
        return
    if action.nargs == 0:
        yield from (3, 'yes', [True], {'a': True}, 0, 1.0, '')
        return
    many = action.nargs in ('+', '*') or isinstance(action.nargs, int)
    yield {'a': 1}
    yield [[1, 2]] if many else [1, 2]
    if action.nargs == '+' and action.default != []:
        yield []
    if isinstance(action.nargs, int):
        yield [1] * (action.nargs + 1)
        yield []
    if action.default is not None:
        yield None
    if action.choices is not None:
        yield from ('unknown', 3, f' {list(action.choices)[0]}', '' if '' not in action.choices else 'none')
    elif action.type in (None, any_text, repo_id):
        if action.nargs != '?':
            yield from (3, 2.5, True)
        yield from NOT_TEXT
        if action.type is None:
            yield 'x' * 5000
            if action.default != '':  # which means that none is given
                yield ''
    else:
        yield from ('many', '', True, float('nan'), float('inf'), 1e300, 10**31, '1e400', 'nan', *NOT_TEXT)


def test_every_key_of_every_script(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Wrong types, lists where one value belongs, mappings, no value, no numbers; the key and the file are named."""
    tried, taken = 0, []
    for command in commands()[: len(SCRIPTS)]:
        parser: Any = command.parser
        for name, action in parser.actions_by_name().items():
            for value in bad_values(action):
                tried += 1
                try:
                    parser.preset({name: value}, 'FILE.yaml')
                except ValueError as error:
                    flag = next((word for word in action.option_strings if word.startswith('--')), name)
                    line = str(error)
                    assert flag in line and line.startswith('FILE.yaml: ') and len(line) < 800, (name, value, line)
                else:
                    taken.append((command.name, name, value))
    assert not taken
    assert tried >= 1000
    record_property('refused', tried)
    print(f'{tried} bad keys of recipes refused')


def test_a_written_bad_key_ends_the_script(script: Script, tmp_path: Path) -> None:
    """Through the file and the script's own entry, for each script."""
    for name, text, message in (
        ('train.py', 'epochs: [1, 2]', "--epochs: must be a whole number, got '[1, 2]'"),
        ('train.py', 'model: [resnet50, resnet18]', '--model takes a text'),
        ('train.py', 'experiment: 007', '--experiment takes a text, got 7; put a text in quotes'),
        ('validate.py', 'img-size: 1000000', '--img-size: must be at most 16384, got 1000000'),
        ('validate.py', 'mean: {r: 0.5}', "--mean takes no mapping, got {'r': 0.5}"),
        ('transfer/linear_probe.py', 'shots: [1, .inf]', '--shots: must be a whole number'),
        ('transfer/finetune.py', 'train-fraction: 2', '--train-fraction: must be a number above 0'),
        ('transfer/dynamics.py', 'every: true', '--every: must be a whole number'),
    ):
        file = tmp_path / 'recipe.yaml'
        file.write_text(yaml.safe_dump(yaml.safe_load(text)) if 'experiment' not in text else text)
        ended = script(name, 'RUN', '-c', str(file)) if name != 'train.py' else script(name, '-c', str(file))
        (line,) = ended.err.splitlines()
        assert ended.code == 2 and f'{file}: {message}' in line, line
