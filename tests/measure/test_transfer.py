"""The transfer scripts on runs that were really trained: numbers against plain ways to the same, and mistakes."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import Ended, forget_processes, write_folder
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from ctc_timm.data.digits import DigitsReader
from ctc_timm.training.trainer import Trainer

Script = Callable[..., Ended]
Flags = Callable[..., argparse.Namespace]
SMALL = ['--max-train', '300', '--max-test', '200', '-j', '0']


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory, flags: Flags, tiny: list[str]) -> Path:
    """A CTC run of four epochs and a vanilla one of two, every epoch kept."""
    folder = tmp_path_factory.mktemp('runs')
    for words in ('ctc --epochs 4 --temporal-start-epoch 2', 'vanilla --epochs 2 --mode vanilla'):
        forget_processes()
        Trainer(flags(*tiny, f'--keep-every 1 --output {folder} --experiment {words}')).fit()
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to measure in."""
    return Path(shutil.copytree(trained, tmp_path / 'runs'))


def digits(split: str, model: torch.nn.Module) -> tuple[torch.Tensor, np.ndarray]:
    """The digits through timm's own evaluation transform for a model."""
    reader = DigitsReader(split)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [transform(Image.fromarray(pixels).convert('RGB')) for pixels in reader.images]
    return torch.stack(images), reader.labels


def picture_has_ink(file: Path) -> bool:
    """Whether a picture is more than one color."""
    return len(np.unique(np.asarray(Image.open(file).convert('L')))) > 20


def test_linear_probe_equals_scikit_learns_neighbors(runs: Path, script: Script) -> None:
    """On features of plain timm, loaded from the run's folder."""
    words = ['--probes', 'knn', 'ridge', '--shots', '1', '5', '--seeds', '3', '-j', '0']
    ended = script('transfer/linear_probe.py', str(runs / 'ctc'), '--target', 'digits', *words)
    assert ended.code == 0, ended.err
    folder = runs / 'ctc' / 'linear_probe' / 'digits'
    results = json.loads((folder / 'results.json').read_text())
    rows = {(row['method'], row.get('shots')): row for row in results['rows']}

    model = timm.create_model(f'local-dir:{runs / "ctc"}', pretrained=True).eval()
    with torch.no_grad():
        seen = [
            (model.forward_head(model.forward_features(x), pre_logits=True).numpy(), y)
            for x, y in (digits(split, model) for split in ('train', 'validation'))
        ]
    nearest = KNeighborsClassifier(1, metric='cosine').fit(*seen[0])
    assert rows['knn-1', None]['top1'] == pytest.approx(100 * nearest.score(*seen[1]), abs=0.3)
    assert (rows['ridge', None]['num_train'], rows['ridge', None]['num_test']) == (1437, 360)
    assert rows['ridge', None]['top1_low'] < rows['ridge', None]['top1'] < rows['ridge', None]['top1_high']
    assert {('ridge', 1), ('ridge', 5), ('knn-20', 5)} < set(rows)
    assert f'{rows["ridge", None]["top1"]:.2f}' in ended.out and str(folder / 'results.json') in ended.out
    assert picture_has_ink(folder / 'probes.png')
    with (folder / 'results.csv').open(newline='') as stream:
        assert [row['method'] for row in csv.DictReader(stream)] == [row['method'] for row in results['rows']]


def test_dynamics_follow_the_run(runs: Path, script: Script, tmp_path: Path) -> None:
    """Source accuracy is what training measured; nothing is computed twice; another probe is computed alone."""
    both = [str(runs / 'ctc'), str(runs / 'vanilla')]
    words = ['--target', 'digits', *SMALL, '--information-images', '100', '--output', str(tmp_path / 'out')]
    assert script('transfer/dynamics.py', *both, *words).code == 0
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert [(run['name'], run['stage_change']) for run in results['runs']] == [('ctc', 1.5), ('vanilla', None)]
    assert len(results['rows']) == 2 * (4 + 2)
    for run in ('ctc', 'vanilla'):
        with (runs / run / 'summary.csv').open(newline='') as stream:
            trained = {int(row['epoch']): float(row['eval_top1']) for row in csv.DictReader(stream)}
        source = {r['epoch']: r['top1'] for r in results['rows'] if r['run'] == run and r['set'] == 'source'}
        assert source == pytest.approx(trained, abs=1e-3)
    stages = [row['stage'] for row in results['rows'] if row['run'] == 'ctc' and row['set'] == 'target']
    assert stages == ['instance', 'instance', 'temporal', 'temporal']
    target = next(row for row in results['rows'] if row['set'] == 'target')
    for column in ('ridge_top1_low', 'information_xt', 'information_ty_se', 'effective_rank', 'uniformity'):
        assert np.isfinite(target[column])
    for name in ('tradeoff', 'path', 'information', 'compression'):
        assert picture_has_ink(tmp_path / 'out' / f'{name}.png')

    store = runs / 'ctc' / 'dynamics' / 'rows.jsonl'
    lines = store.read_text().splitlines()
    shutil.rmtree(runs / 'ctc' / 'features')
    assert script('transfer/dynamics.py', *both, *words).code == 0
    assert store.read_text().splitlines() == lines and not (runs / 'ctc' / 'features').exists()
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == results

    store.write_text('\n'.join(lines[:5]) + '\n')  # as if interrupted
    assert script('transfer/dynamics.py', *both, *words, '--probes', 'ridge', 'knn').code == 0
    again = json.loads((tmp_path / 'out' / 'results.json').read_text())
    for old, new in zip(results['rows'], again['rows']):
        assert {key: new[key] for key in old} == pytest.approx(old, nan_ok=True)
        assert ('knn-5_top1' in new) == (old['set'] == 'target')
    assert len(store.read_text().splitlines()) == len(lines) + 4


def test_dynamics_keep_what_is_finished(runs: Path, script: Script) -> None:
    """Weights that diverged at the second epoch are named; the first epoch's numbers stay."""
    file = runs / 'vanilla' / 'weights' / 'epoch-0001.safetensors'
    tensors = load_file(file)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).fill_(float('nan'))
    save_file(tensors, file, metadata={'format': 'pt'})
    ended = script('transfer/dynamics.py', str(runs / 'vanilla'), *SMALL, '--information', 'none')
    assert ended.code == 2 and 'epoch-0001.safetensors: the features of digits of 70 of 70 images are NaN' in ended.err
    assert len((runs / 'vanilla' / 'dynamics' / 'rows.jsonl').read_text().splitlines()) == 4
    assert not (runs / 'vanilla' / 'dynamics' / 'results.json').exists()


def test_monitor_measures_what_the_probe_measures(
    tiny: list[str], flags: Flags, script: Script, tmp_path: Path
) -> None:
    """Its ridge accuracy of the last epoch is the linear probe's on the same draw of images."""
    words = ['--monitor-target', 'digits', '--monitor-images', '300', '--monitor-every', '2', '--keep-every', '1']
    Trainer(flags(*tiny, *words, f'--output {tmp_path} --experiment run --epochs 3 --mode vanilla')).fit()
    with (tmp_path / 'run' / 'summary.csv').open(newline='') as stream:
        rows = list(csv.DictReader(stream))
    measured = [row['eval_monitor_ridge_top1'] for row in rows]
    assert measured[0] == '' and measured[1] and measured[2]
    assert picture_has_ink(tmp_path / 'run' / 'plots' / 'monitor.png')
    probe = ['--probes', 'ridge', '--max-train', '200', '--max-test', '100', '-j', '0', '--output', str(tmp_path / 'o')]
    assert script('transfer/linear_probe.py', str(tmp_path / 'run' / 'last.safetensors'), *probe).code == 0
    (row,) = json.loads((tmp_path / 'o' / 'digits' / 'results.json').read_text())['rows']
    assert float(measured[2]) == pytest.approx(row['top1'], abs=1e-3)


MISTAKES = [
    ('linear_probe.py', 'name a model: a run folder'),
    ('linear_probe.py {run} --target digit', '--target digit: neither a data set nor a folder; nearest: digits'),
    ('linear_probe.py {run} --target {}/one', '--target {}/one: every image is of'),
    ('linear_probe.py {run} --target {}/absent', 'absent: no test images of class 2'),
    ('linear_probe.py {run} --target digits --shots 5 200', '--shots 200'),
    ('linear_probe.py {run} --probes rigde', 'invalid choice'),
    ('linear_probe.py {}/nowhere --target digits', 'no run folder, weights file or timm model'),
    ('dynamics.py {}/nowhere', 'no such folder'),
    ('dynamics.py {}/nothing_kept', 'no kept epochs in'),
    ('dynamics.py {run} --target {}/one', '--target {}/one: every image is of'),
    ('dynamics.py {run} --information reni', 'invalid choice'),
]


@pytest.mark.parametrize('words,message', MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_told_in_a_line(runs: Path, script: Script, tmp_path: Path, words: str, message: str) -> None:
    """Exit code 2, one line, no results."""
    for split, classes in (('train', 1), ('validation', 1)):
        write_folder(tmp_path / 'one' / split, 'train', 4, classes=classes)
    write_folder(tmp_path / 'absent' / 'train', 'train', 4, classes=3)
    write_folder(tmp_path / 'absent' / 'validation', 'train', 4, classes=2)
    shutil.copytree(runs / 'vanilla', tmp_path / 'nothing_kept', ignore=shutil.ignore_patterns('epoch-*.safetensors'))
    name, *rest = words.replace('{run}', str(runs / 'vanilla')).format(tmp_path, tmp_path).split()
    ended = script(f'transfer/{name}', *rest)
    assert ended.code == 2
    assert ended.err.strip().splitlines()[-1].startswith(f'{name}: error: ')
    assert message.format(tmp_path, tmp_path) in ended.err
    assert 'Traceback' not in ended.err
    if '--shots' not in words:  # there the rows of the whole set are finished before
        assert not list(tmp_path.rglob('results.json'))
