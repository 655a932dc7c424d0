"""Linear probes and dynamics of runs that were really trained: numbers against plain ways to the same, and mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from ctc_timm.data.digits import DigitsReader
from ctc_timm.measure.dynamics import dynamics
from ctc_timm.measure.linear_probe import linear_probe
from ctc_timm.measure.settings import DynamicsSettings, LinearProbeSettings
from ctc_timm.training.build import train
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from runs import forget_processes, write_folder

Flags = Callable[..., Any]
SMALL = {'target': 'digits', 'max_train': 300, 'max_test': 200, 'workers': 0}


def probe(source: Path | None, **values: Any) -> list[dict[str, Any]]:
    return linear_probe(build(LinearProbeSettings, {'source': source, 'target': 'digits', 'workers': 0, **values}))


def follow(*runs: Path, **values: Any) -> dict[str, Any]:
    forget_processes()
    return dynamics(build(DynamicsSettings, {'runs': runs, **SMALL, **values}))


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory, flags: Flags, tiny: list[str]) -> Path:
    """A CTC run of four epochs and a supervised one of two, every epoch kept."""
    folder = tmp_path_factory.mktemp('runs')
    for words in ('ctc --epochs 4 --temporal-start-epoch 2', 'vanilla --epochs 2 --mode vanilla'):
        forget_processes()
        train(flags(*tiny, f'--keep-every 1 --output {folder} --experiment {words}'))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to measure in."""
    return Path(shutil.copytree(trained, tmp_path / 'runs'))


def digits(split: str, model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the digits, through timm's own evaluation transform."""
    reader = DigitsReader(split)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(Image.fromarray(pixels).convert('RGB')) for pixels in reader.images])
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True).numpy(), reader.labels


def picture_has_ink(file: Path) -> bool:
    """Whether a picture is more than one color."""
    return len(np.unique(np.asarray(Image.open(file).convert('L')))) > 20


def test_linear_probe_equals_scikit_learns_neighbors(runs: Path) -> None:
    """On features of plain timm, loaded from the run's folder; files hold what is returned."""
    found = probe(runs / 'ctc', probes=('knn', 'ridge'), shots=(1, 5), seeds=3)
    rows = {(row['method'], row.get('shots')): row for row in found}
    model = timm.create_model(f'local-dir:{runs / "ctc"}', pretrained=True).eval()
    nearest = KNeighborsClassifier(1, metric='cosine').fit(*digits('train', model))
    assert rows['knn-1', None]['top1'] == pytest.approx(100 * nearest.score(*digits('validation', model)), abs=0.3)
    assert (rows['ridge', None]['num_train'], rows['ridge', None]['num_test']) == (1437, 360)
    assert rows['ridge', None]['top1_low'] < rows['ridge', None]['top1'] < rows['ridge', None]['top1_high']
    assert {('ridge', 1), ('ridge', 5), ('knn-20', 5)} < set(rows)
    folder = runs / 'ctc' / 'linear_probe' / 'digits'
    assert json.loads((folder / 'results.json').read_text())['rows'] == found and picture_has_ink(folder / 'probes.png')
    with (folder / 'results.csv').open(newline='') as stream:
        assert [row['method'] for row in csv.DictReader(stream)] == [row['method'] for row in found]


def test_dynamics_follow_the_run(runs: Path, tmp_path: Path) -> None:
    """Source accuracy is what training measured; nothing is computed twice; another probe is computed alone."""
    both = (runs / 'ctc', runs / 'vanilla')
    options = {'information_images': 100, 'output': tmp_path / 'out'}
    results = follow(*both, **options)
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == results
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
    assert follow(*both, **options) == results
    assert store.read_text().splitlines() == lines and not (runs / 'ctc' / 'features').exists()

    store.write_text('\n'.join(lines[:5]) + '\n')  # as if interrupted
    again = follow(*both, **options, probes=('ridge', 'knn'))
    for old, new in zip(results['rows'], again['rows']):
        assert {key: new[key] for key in old} == pytest.approx(old, nan_ok=True)
        assert ('knn-5_top1' in new) == (old['set'] == 'target')
    assert len(store.read_text().splitlines()) == len(lines) + 4


def test_dynamics_keep_what_is_finished(runs: Path) -> None:
    """Weights that diverged at the second epoch are named; the first epoch's numbers stay."""
    file = runs / 'vanilla' / 'weights' / 'epoch-0001.safetensors'
    tensors = load_file(file)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).fill_(float('nan'))
    save_file(tensors, file, metadata={'format': 'pt'})
    with pytest.raises(UserError, match='epoch-0001.safetensors: the features of digits of 70 of 70 images are NaN'):
        follow(runs / 'vanilla', information='none')
    assert len((runs / 'vanilla' / 'dynamics' / 'rows.jsonl').read_text().splitlines()) == 4
    assert not (runs / 'vanilla' / 'dynamics' / 'results.json').exists()


def test_monitor_measures_what_the_probe_measures(tiny: list[str], flags: Flags, tmp_path: Path) -> None:
    """Its ridge accuracy of the last epoch is the linear probe's on the same draw of images."""
    words = ['--monitor-target', 'digits', '--monitor-images', '300', '--monitor-every', '2', '--keep-every', '1']
    run = train(flags(*tiny, *words, f'--output {tmp_path} --experiment run --epochs 3 --mode vanilla'))
    measured = [row['eval_monitor_ridge_top1'] for row in run.rows()]
    assert measured[0] == '' and measured[1] and measured[2]
    assert picture_has_ink(run.plots / 'monitor.png')
    forget_processes()
    (row,) = probe(run.last_weights, probes='ridge', max_train=200, max_test=100, output=tmp_path / 'out')
    assert float(measured[2]) == pytest.approx(row['top1'], abs=1e-3)


MISTAKES: list[tuple[Callable[..., Any], str, dict[str, Any], str]] = [
    (probe, 'vanilla', {'source': None}, 'name a model: a run folder'),
    (probe, 'vanilla', {'target': 'digit'}, '`target` digit: neither a data set nor a folder; nearest: digits'),
    (probe, 'vanilla', {'target': '{}/one'}, '`target` .*/one: every image is of class 0'),
    (probe, 'vanilla', {'shots': (5, 200)}, '`shots` 200'),
    (probe, 'vanilla', {'probes': 'rigde'}, '`probes`: must be one of .* nearest: ridge'),
    (probe, 'nowhere', {}, 'no run folder, weights file or timm model'),
    (follow, 'nowhere', {}, '`runs` .*nowhere: no such folder'),
    (follow, 'nothing_kept', {}, 'no kept epochs in'),
    (follow, 'vanilla', {'target': '{}/one'}, 'one: every image is of'),
]


@pytest.mark.parametrize('command, run, values, message', MISTAKES)
def test_mistakes_are_told_before_anything_is_written(
    runs: Path, tmp_path: Path, command: Callable[..., Any], run: str, values: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path / 'one' / 'train', 'train', 4, classes=1)
    write_folder(tmp_path / 'one' / 'validation', 'train', 4, classes=1)
    shutil.copytree(runs / 'vanilla', runs / 'nothing_kept', ignore=shutil.ignore_patterns('epoch-*.safetensors'))
    values = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(UserError, match=message):
        command(*([] if 'source' in values else [runs / run]), **values)
    if 'shots' not in values:  # there the rows of all images are finished before
        assert not list(tmp_path.rglob('results.json'))
