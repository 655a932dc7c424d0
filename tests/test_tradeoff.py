"""The comparison of docs/results.md: made anew in small, and the document that is kept against its numbers."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from runs import ROOT
from scipy import stats

from ctc_timm.cli.arguments import Parser, parse
from ctc_timm.cli.training_flags import add_arguments

DOCS = ROOT / 'docs'
STORED = sorted((DOCS / 'results').glob('tradeoff_*.json'))
RECIPE = """
mode: ctc
model: test_resnet
train-split: train[:300]
img-size: 16
mean: [0.3, 0.3, 0.3]
std: [0.4, 0.4, 0.4]
batch-size: 50
workers: 0
epochs: 3
temporal-start-epoch: 2
lr: 0.01
num-negatives: 32
no-aug: true
keep-every: 1
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import tradeoff_report

    return tradeoff_report


def test_the_comparison_in_small(tmp_path: Path) -> None:
    (tmp_path / 'tradeoff_overfit.yaml').write_text(RECIPE)
    (tmp_path / 'README.md').write_text('before\n<!-- results -->\nold\n<!-- /results -->\nafter\n')
    command = [sys.executable, str(ROOT / 'benchmarks' / 'tradeoff.py'), '--recipe', 'tradeoff_overfit.yaml']
    command += ['--source', 'digits', '--source-test', 'validation', '--targets', 'digits', '--docs', 'docs']
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
        assert set(end['targets']['digits']) >= {'ridge', 'logistic', 'sgd-last', 'knn-20', 'ridge-10-shot'}
        assert run['processor_seconds'] > 1
    readme = (tmp_path / 'README.md').read_text()
    assert readme.startswith('before\n') and readme.endswith('after\n') and 'old' not in readme
    assert 'ctc-discriminability' in readme
    assert (tmp_path / 'docs' / 'tradeoff_overfit.png').stat().st_size > 10_000

    weights = tmp_path / 'runs' / 'tradeoff' / 'tradeoff_overfit' / 'vanilla-0' / 'last.safetensors'
    made = weights.stat().st_mtime_ns
    again = subprocess.run([*command, '--redraw'], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and weights.stat().st_mtime_ns == made
    assert (tmp_path / 'README.md').read_text() == readme


def test_intervals_are_students(report: ModuleType) -> None:
    values = np.random.default_rng(0).normal(50, 3, 5)
    mean, half = report.interval(list(values))
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert math.isclose(mean - half, low) and math.isclose(mean + half, high)
    assert report.interval([7.0]) == (7.0, None)
    assert report.differences({0: 5.0, 2: 7.0, 3: 1.0}, {0: 4.0, 1: 9.0, 2: 9.0}) == [1.0, -2.0]


@pytest.mark.parametrize('file', STORED, ids=lambda file: file.stem)
def test_the_document_says_what_is_stored(report: ModuleType, file: Path) -> None:
    """Means by hand, each in the document; and no name of a folder in the numbers."""
    text = (DOCS / 'results.md').read_text(encoding='utf-8')
    results = json.loads(file.read_text())
    target = results['targets'][0]
    for method in results['methods']:
        ends = [run['ends']['last'] for run in results['runs'] if run['method'] == method]
        row = next(line for line in report.section(file.stem, results).splitlines() if line.startswith(f'| {method} |'))
        assert row in text
        for number in (
            np.mean([end['source']['top1'] for end in ends]),
            np.mean([end['targets'][target]['ridge'] for end in ends]),
        ):
            assert f'| {number:.1f}' in row
    assert not any('/' in value for value in (results['source'], *results['targets']))


@pytest.mark.parametrize('file', sorted((DOCS / 'results').glob('dense_*.json')), ids=lambda file: file.stem)
def test_the_document_says_what_bodies_do_when_frozen(report: ModuleType, file: Path) -> None:
    results = json.loads(file.read_text())
    section = report.dense_section(results)
    assert section in (DOCS / 'results.md').read_text(encoding='utf-8')
    for method in {run['method'] for run in results['runs']}:
        ends = [run['ends']['last'] for run in results['runs'] if run['method'] == method]
        row = next(line for line in section.splitlines() if line.startswith(f'| {method} |'))
        for script, key in report.DENSE.values():
            assert f'| {np.mean([end[script][key] for end in ends]):.1f}' in row


@pytest.mark.parametrize('kind', ['detection', 'segmentation'])
def test_the_dense_comparison_gives_flags_that_the_scripts_take(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import dense

    made = dense.task({'detection': 'detect', 'segmentation': 'segment'}[kind], Path('RUN'), 7, Path('OUT'), 4)
    ((_, *words),) = made.steps
    parser = Parser()
    importlib.import_module(f'ctc_timm.dense.{kind}_flags').add_arguments(parser)
    args = parse(parser, words)
    assert (args.seed, args.freeze_stages, args.freeze_bn, args.resume) == (7, 4, True, 'auto')
    assert made.done == Path('OUT') / args.experiment / 'results.json'


def test_document_and_readme_are_drawn_from_the_numbers(report: ModuleType) -> None:
    found = report.stored(DOCS)
    assert (DOCS / 'results.md').read_text(encoding='utf-8') == report.document(DOCS)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert readme == report.with_table(readme, found)


@pytest.mark.parametrize('recipe', sorted((ROOT / 'recipes').glob('tradeoff_*.yaml')), ids=lambda file: file.stem)
def test_every_method_is_one_that_train_takes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import tradeoff

    for flags in tradeoff.METHODS.values():
        parser = Parser()
        add_arguments(parser)
        args = parse(parser, ['-c', str(recipe), '--dataset', 'digits', *(word.format(epochs=9) for word in flags)])
        assert args.epochs > args.temporal_start_epoch or '--temporal-start-epoch' in flags
        assert args.mode == ('vanilla' if 'vanilla' in flags else 'ctc')
