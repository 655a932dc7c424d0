"""Files that are no recipe: none hangs, fills the memory, runs what it holds, or is taken for something else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from ctc_timm.utils.yaml_files import RECIPES, read_recipe

BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join([f"*{before}"] * 9)}]\n' for before, name in zip('abcdefghij', 'bcdefghijk')
)
FILES: dict[str, tuple[bytes, str]] = {
    'bomb': (f'{BOMB}epochs: *k\n'.encode(), 'aliases'),
    'alias': (b'lr: &x 0.1\nlr-base: *x\n', 'aliases'),
    'merge': (b'base: &base {epochs: 1}\n<<: *base\n', 'aliases'),
    'itself': (b'mean: &m [*m]\n', 'aliases'),
    'twice': (b'epochs: 1\nlr: 0.1\nepochs: 2\n', "'epochs' stands twice"),
    'twice, as a dash': (b'num-negatives: 1\nnum_negatives: 2\n', "'num_negatives' stands twice"),
    'python object': (b'model: !!python/object/apply:os.system ["touch ran"]\n', 'os.system'),
    'python name': (b'lr: !!python/name:os.system\n', 'os.system'),
    'python tuple': (b'scale: !!python/tuple [0.5, 1]\n', 'tuple'),
    'tag of its own': (b'epochs: !count 3\n', '!count'),
    'no such day': (b'experiment: 2001-99-99\n', 'month'),
    'no boolean': (b'amp: !!bool perhaps\n', 'not valid YAML'),
    'no base64': (b'model: !!binary "@"\n', '`model`: takes a text'),
    'endless integer': (b'epochs: ' + b'9' * 5000 + b'\n', 'not valid YAML'),
    'deep': (b'mean: ' + b'[' * 20_000 + b'\n', 'nested too deeply'),
    'deep, closed': (b'mean: ' + b'[' * 3000 + b']' * 3000 + b'\n', 'nested too deeply'),
    'long': (b'# ' + b'x' * 100_000 + b'\nepochs: 1\n', 'longer than'),
    'very long': (b'x' * 2_000_000, 'longer than'),
    'open quote': (b'model: "resnet50\n', 'not valid YAML'),
    'two documents': (b'epochs: 1\n---\nepochs: 2\n', 'single document'),
    'list': (b'- epochs\n- 1\n', 'must be a mapping of names to values, got a list'),
    'text': (b'epochs 1\n', 'got a str'),
    'latin-1': ('model: gr\u00f6\u00dfe\n'.encode('latin-1'), 'utf-8'),
    'surrogate': (b'model: "\\ud800"\n', '`model`'),
    'null byte': (b'model: "a\\0b"\n', '`model`'),
    'escape': (b'model: "\\e[2Jx"\n', '`model`'),
    'png': (b'\x89PNG\r\n\x1a\n' + bytes(range(256)) * 8, 'utf-8'),
    'unknown key': (b'num-negative: 3\n', "'num-negative' is not a setting; nearest: num_negatives"),
    'key that is a number': (b'3: 4\n', '3 is not a setting'),
    'key that is a switch': (b'on: 4\n', 'True is not a setting'),
    'key that is a list': (b'? [a, b]\n: 4\n', 'not valid YAML'),
    'long key': (b'"' + b'k' * 500 + b'": 4\n', 'is not a setting'),
    'config in a recipe': (b'config: other.yaml\n', "'config' is not a setting"),
    'help in a recipe': (b'help: true\n', "'help' is not a setting"),
    'argument that is no word': (b'model-kwargs: {1: 2}\n', '`model_kwargs`: 1 cannot be the name of an argument'),
}


@pytest.mark.parametrize('name', FILES)
def test_files_that_are_no_recipe(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    file = tmp_path / 'recipe.yaml'
    file.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        build(TrainSettings, read_recipe(file), f'`config` {file}')
    line = str(error.value)
    assert time.monotonic() - started < 10 and not Path('ran').exists()
    assert str(file) in line and message in line and len(line) < 600 + len(str(file)) and line.isprintable()


def test_what_is_no_file(tmp_path: Path) -> None:
    """A folder, nothing at all, a file that must not be read, one that never ends."""
    os.mkfifo(tmp_path / 'pipe.yaml')
    (tmp_path / 'broken.yaml').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'around.yaml').symlink_to(tmp_path / 'around.yaml')
    names = [tmp_path / name for name in ('nothing.yaml', 'broken.yaml', 'around.yaml', 'pipe.yaml')]
    for name in [*names, Path('/dev/zero'), Path('/dev/null')]:
        with pytest.raises(UserError, match='`config` .*: no such recipe or file'):
            read_recipe(name)
    with pytest.raises(UserError, match='is a folder'):
        read_recipe(tmp_path)


@pytest.mark.parametrize('text', ['', '\n\n', '# epochs: 3\n', '---\n', '{}', '\ufeff# marked\n', 'null', '~'])
def test_an_empty_recipe_presets_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / 'recipe.yaml'
    file.write_text(text, encoding='utf-8')
    assert read_recipe(file) == {}


def test_shipped_recipes_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without their suffix; a file of that name in the working folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert read_recipe('digits') == read_recipe('digits.yaml') == read_recipe(RECIPES / 'digits.yaml')
    Path('digits.yaml').write_text('epochs: 1')
    assert read_recipe('digits.yaml') == {'epochs': 1}
