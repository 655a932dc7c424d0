"""The package as a user imports it: light, registered whichever is imported first, and one API under the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ctc_timm
from ctc_timm.cli.flags import Parser, add_settings, read_flags
from ctc_timm.training.settings import TrainSettings
from runs import ROOT, TINY


def python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_command_line_is_light() -> None:
    """Help and mistakes need neither PyTorch nor timm."""
    code = """
import sys
from ctc_timm.cli.main import COMMANDS, main
for words in (['--help'], *([*name.split(), '--help'] for name in COMMANDS), ['train', '--no-such-flag']):
    try:
        main('', words)
    except SystemExit as ended:
        assert ended.code == (2 if '--no-such-flag' in words else 0), words
heavy = {'torch', 'timm', 'torchvision', 'sklearn', 'scipy', 'matplotlib', 'accelerate', 'numpy'} & set(sys.modules)
assert not heavy, heavy
"""
    assert python(code).count('usage:') >= 13


@pytest.mark.parametrize(
    'imports',
    [
        'import timm, ctc_timm',
        'import ctc_timm, timm',
        'import ctc_timm; from timm.models import create_model',
        'import ctc_timm.models.catalog',
        'import ctc_timm.models.cifar',
        'import ctc_timm.models.registry',
        'import ctc_timm.contrast.task',
        'import ctc_timm; ctc_timm.features_and_logits',
        'import ctc_timm.models.settings, timm',
    ],
)
def test_models_are_registered_whatever_is_imported_first(imports: str) -> None:
    check = 'import timm, ctc_timm.models.registry as r, ctc_timm.models.catalog as c; assert r.Entry is c.Entry; '
    names = "[timm.is_model(n) for n in ('resnet50_ctc', 'vit_small_patch16_224_ctc', 'cifar_resnet20_ctc')]"
    assert python(f'{imports}; {check}print({names})') == '[True, True, True]\n'


def test_public_names() -> None:
    """Every name is there; another one is an error for the interpreter, and for a type checker in CI."""
    for name in ctc_timm.__all__:
        assert callable(getattr(ctc_timm, name)) and name in dir(ctc_timm)
    with pytest.raises(AttributeError, match='trian'):
        ctc_timm.trian  # noqa: B018


def test_functions_do_what_the_commands_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keywords are the flags: the same weights, a run that says what it is, and every measurement of it."""
    parser = Parser()
    add_settings(parser, TrainSettings)
    keywords = read_flags(parser, TrainSettings, [*TINY, '--epochs', '2', '--output', str(tmp_path)])
    run = ctc_timm.train(**keywords, experiment='function')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'ctc_timm',
            'train',
            *TINY,
            '--epochs',
            '2',
            '--output',
            tmp_path,
            '--experiment',
            'cli',
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ('best', 'last'):
        mine, theirs = (load_file(tmp_path / folder / f'{name}.safetensors') for folder in ('function', 'cli'))
        assert all((mine[key] == theirs[key]).all() for key in mine) and mine.keys() == theirs.keys()
    assert run.path == tmp_path / 'function' and run.best_weights == run.path / 'best.safetensors'
    assert 'top-1' in str(run.summary()) and 'test_resnet' in str(run.summary())
    assert 'epoch   1' in capsys.readouterr().out

    results = ctc_timm.validate(run)
    assert results == json.loads((run.path / 'validation' / 'results.json').read_text())
    rows = ctc_timm.linear_probe(run, target=['digits'], probes=['ridge'], max_train=64, max_test=32, workers=0)
    assert [row['method'] for row in rows] == ['ridge'] and 0 <= rows[0]['top1'] <= 100
    again = ctc_timm.train(resume=run, epochs=3)
    assert again.path.resolve() == run.path.resolve()
    assert [row['epoch'] for row in again.rows()] == ['0', '1', '2']


@pytest.mark.parametrize(
    'keywords, message',
    [
        ({'batchsize': 3}, "'batchsize' is not a setting; nearest: batch_size"),
        ({'batch_size': 0}, '`batch_size`: must be at least 1, got 0'),
        ({'mode': 'ctcc'}, '`mode`: must be one of ctc, vanilla'),
        ({'config': 'digit'}, '`config` digit: no such recipe or file; nearest: digits'),
        ({'model': 'resnt50'}, '`model` resnt50: unknown to timm; nearest: resnet50'),
        ({'data_dir': '/nowhere'}, '`data_dir` /nowhere: no such folder'),
    ],
)
def test_mistakes_name_the_keyword(tmp_path: Path, keywords: dict, message: str) -> None:
    """As a Python name: a notebook has no flags."""
    with pytest.raises(ctc_timm.UserError) as error:
        ctc_timm.train(**keywords, output=tmp_path / 'runs')
    assert message in str(error.value) and not (tmp_path / 'runs').exists()
