"""The comparison of docs/results.md: made anew in small, and the documents against the stored numbers."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import dense
import tradeoff
import tradeoff_report as report
from ctc_timm.dense.settings import DetectSettings, SegmentSettings
from ctc_timm.utils.settings import flatten
from ctc_timm.utils.yaml_files import RECIPES
from runs import ROOT

DOCS = ROOT / 'docs'
STORED = {**report.stored(DOCS), **report.stored(DOCS, 'dense')}
RECIPE = """
{mode: ctc, model: test_resnet, train-split: 'train[:300]', img-size: 16, mean: 0.3, std: 0.4, batch-size: 50,
workers: 0, epochs: 3, temporal-start-epoch: 2, lr: 0.01, num-negatives: 32, no-aug: true, keep-every: 1}
"""


def test_the_comparison_in_small(tmp_path: Path) -> None:
    (tmp_path / 'tradeoff_overfit.yaml').write_text(RECIPE)
    (tmp_path / 'README.md').write_text('before\n<!-- results -->\nold\n<!-- /results -->\nafter\n')
    command = [sys.executable, str(ROOT / 'benchmarks' / 'tradeoff.py'), '--recipe', 'tradeoff_overfit.yaml']
    command += ['--source', 'digits', '--targets', 'digits', '--docs', 'docs']
    command += ['--methods', 'vanilla', 'ctc-discriminability', '--seeds', '1', '--jobs', '2']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / 'docs' / 'results' / 'tradeoff_overfit.json').read_text())
    assert [run['method'] for run in results['runs']] == ['vanilla', 'ctc-discriminability']
    for run in results['runs']:
        assert [row['epoch'] for row in run['trajectory']] == [0, 1, 2]
        end, last = run['ends']['last'], run['trajectory'][-1]
        assert end['epoch'] == 2 and end['targets']['digits']['ridge'] == last['targets']['digits']['ridge']
        assert end['source']['top1'] == last['source']['top1']  # here of the same images
        assert run['ends']['best']['source']['top1'] == max(row['source']['top1'] for row in run['trajectory'])
        assert set(end['targets']['digits']) >= {*report.PROBES.values(), *report.FEATURES.values()}
        assert run['processor_seconds'] > 1
    readme = (tmp_path / 'README.md').read_text()
    assert readme.startswith('before\n') and readme.endswith('after\n') and 'old' not in readme
    assert 'ctc-discriminability' in readme
    assert (tmp_path / 'docs' / 'tradeoff_overfit.png').stat().st_size > 10_000

    report.redraw(tmp_path / 'docs')
    assert (tmp_path / 'README.md').read_text() == readme


def test_intervals_are_students() -> None:
    values = np.random.default_rng(0).normal(50, 3, 5)
    mean, half = report.interval(list(values))
    assert math.isclose(half, stats.t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5))
    assert math.isclose(mean, values.mean()) and report.interval([7.0]) == (7.0, None)
    mine, others = {0: {'a': 5.0}, 2: {'a': 7.0}}, {0: {'a': 4.0}, 1: {'a': 9.0}, 2: {'a': 9.0}}
    assert report.differences(mine, others, 'a') == [1.0, -2.0]
    assert report.show([0.96, 1.0], sign='+') == '+1.0 ± 0.3' and report.show([-0.01]) == '0.0'


@pytest.mark.parametrize('name, results', STORED.items(), ids=STORED)
def test_the_document_holds_the_stored_means(name: str, results: dict[str, Any]) -> None:
    """Means by hand, each in the block of its file; and no name of a folder in the numbers."""
    text = (DOCS / 'results.md').read_text(encoding='utf-8').split(f'<!-- {name} -->')[1].split(f'<!-- /{name} -->')[0]
    paths = [tuple(path.split('/')) for path in report.DENSE.values()]
    if 'targets' in results:
        paths = [('source', 'top1'), *(('targets', target, 'ridge') for target in results['targets'])]
        assert not any('/' in value for value in (results['source'], *results['targets']))
    for method in {run['method'] for run in results['runs']}:
        ends = [run['ends']['last'] for run in results['runs'] if run['method'] == method]
        row = next(line for line in text.splitlines() if line.startswith(f'| {method} |'))
        cells = row.split(' | ')[2:]
        for cell, path in zip(cells, paths, strict=True):
            values = ends
            for key in path:
                values = [value[key] for value in values]
            assert cell.startswith(f'{np.mean(values):.1f}'), (method, path)


@pytest.mark.parametrize('file', [DOCS / 'results.md', ROOT / 'README.md'], ids=lambda file: file.name)
def test_documents_are_drawn_from_the_stored_numbers(file: Path) -> None:
    text = file.read_text(encoding='utf-8')
    assert text == report.fill(text, report.blocks(DOCS))


@pytest.mark.parametrize('recipe', [file.stem for file in RECIPES.glob('tradeoff_*.yaml')])
def test_every_method_is_one_that_train_takes(recipe: str, flags: Callable[..., Any]) -> None:
    assert recipe in report.stored(DOCS)
    for words in tradeoff.METHODS.values():
        settings = flags(words.format(epochs=9), '--dataset digits')
        assert settings.ctc.mode == ('vanilla' if 'vanilla' in words else 'ctc')


@pytest.mark.parametrize('kind, cls', [('detect', DetectSettings), ('segment', SegmentSettings)])
def test_the_dense_comparison_gives_flags_that_the_commands_take(kind: str, cls: type, flags: Any) -> None:
    task = dense.task(kind, Path('RUN'), 7, Path('OUT'))
    (command,) = task.steps
    values = flatten(flags(*command[4:], cls=cls))
    assert command[:4] == ['-m', 'ctc_timm', kind, 'RUN/last.safetensors']
    found = [values[name] for name in ('seed', 'freeze_stages', 'freeze_bn', 'resume')]
    assert found == [7, 4, True, 'auto'] and task.done == Path('OUT') / values['experiment'] / 'results.json'


def test_the_example_of_a_loop_learns(capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(ROOT / 'examples' / 'own_loop.py'))
    assert float(capsys.readouterr().out.split()[-1].rstrip('%')) > 85
