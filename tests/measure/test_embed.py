"""Embedded folders and data sets against features of plain timm."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

from ctc_timm.measure.embed import embed
from ctc_timm.measure.settings import EmbedSettings
from ctc_timm.models.backbones import features_and_logits
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from processes import run_processes
from runs import CONFIG

pandas, parquet = pytest.importorskip('pandas'), pytest.importorskip('pyarrow.parquet')


def write_weights(file: Path, num_classes: int = 7) -> Path:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=7)
    if not num_classes:
        model.reset_classifier(0)
    save_file(model.state_dict(), file, {'architecture': 'test_resnet', 'num_classes': str(num_classes)})
    return file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / 'w.safetensors')


def run(weights: Path, output: Path, **values: Any) -> dict[str, np.ndarray]:
    """The columns of the file that `embed` writes."""
    values = {'source': str(weights), 'output': str(output), 'batch_size': 5, 'workers': 0, **CONFIG, **values}
    assert embed(build(EmbedSettings, values)) == output and not list(output.parent.glob('.*'))
    if output.suffix == '.npz':
        return dict(np.load(output))
    if output.suffix == '.csv':
        columns = pandas.read_csv(output)
        plain = {name: columns[name].to_numpy() for name in columns.columns[:3]}
        wide = {name: columns.filter(regex=rf'^{name[0]}\d{{4}}$').to_numpy() for name in ('features', 'logits')}
        return plain | wide
    table = parquet.read_table(output)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def plainly(weights: Path, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    model = timm.create_model('test_resnet', num_classes=7, checkpoint_path=str(weights)).eval()
    images = torch.stack([create_transform(**CONFIG)(Image.open(file).convert('RGB')) for file in files])
    with torch.no_grad():
        return features_and_logits(model, images)


@pytest.mark.parametrize('suffix', ['.parquet', '.npz', '.csv'])
def test_a_folder_in_every_format(image_folder: Path, weights: Path, tmp_path: Path, suffix: str) -> None:
    """Both splits, class by class, with names, labels, features and logits."""
    files = sorted(image_folder.rglob('*.png'))
    features, logits = plainly(weights, files)
    found = run(weights, tmp_path / 'new' / f'out{suffix}', data_dir=str(image_folder), logits=True)
    assert list(found) == ['index', 'file_name', 'label', 'features', 'logits']
    assert found['index'].tolist() == list(range(51))
    assert found['file_name'].tolist() == [str(file.relative_to(image_folder)) for file in files]
    assert found['label'].tolist() == [int(file.parent.name.removeprefix('class')) for file in files]
    np.testing.assert_allclose(found['features'].astype(np.float32), features, atol=2e-5)
    np.testing.assert_allclose(found['logits'].astype(np.float32), logits, atol=2e-5)


def test_images_without_labels_and_unreadable_ones(
    image_folder: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A flat folder needs no class folders; an unreadable image has no row, and those after it keep their names."""
    flat = tmp_path / 'flat'
    flat.mkdir()
    for i, file in enumerate(sorted(image_folder.rglob('*.png'))[:9]):
        shutil.copy(file, flat / f'{i}.png')
    (flat / '4.png').write_bytes(b'no image')
    found = run(weights, tmp_path / 'out.parquet', data_dir=str(flat))
    assert list(found) == ['index', 'file_name', 'features']
    kept = [i for i in range(9) if i != 4]
    assert found['index'].tolist() == kept and found['file_name'].tolist() == [f'{i}.png' for i in kept]
    features = plainly(weights, [flat / f'{i}.png' for i in kept])[0]
    np.testing.assert_allclose(found['features'], features, atol=2e-5)


def test_splits_tars_and_data_sets(image_folder: Path, weights: Path, tmp_path: Path) -> None:
    """One split of a folder, a tar file, the digits; an encoder without a head."""
    options = {'output': tmp_path / 'out.npz', 'weights': weights}
    found = run(**options, data_dir=str(image_folder), split='validation')
    assert len(found['index']) == 15 and found['file_name'][0] == 'validation/class0/000.png'
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(image_folder / 'train', arcname='.')
    in_tar = run(**options, data_dir=str(tmp_path / 'images.tar'))
    assert len(in_tar['index']) == 36 and in_tar['file_name'][0] == 'class0/000.png'
    digits = run(**options, dataset='digits', split='validation[:12]')
    assert list(digits) == ['index', 'label', 'features'] and len(digits['index']) == 12
    options['weights'] = write_weights(tmp_path / 'encoder.safetensors', num_classes=0)
    headless = run(**options, data_dir=str(image_folder), split='validation')
    np.testing.assert_allclose(headless['features'], found['features'], atol=2e-5)


@pytest.mark.parametrize(
    'output, values, message',
    [
        ('out.txt', {}, 'must be a file that ends in .parquet, .npz, .csv'),
        ('out.csv', {'data_dir': '{}/empty'}, '`data_dir` .*empty'),
        ('out.csv', {'data_dir': '{}/broken'}, 'unreadable'),
        ('out.csv', {'data_dir': None}, 'name the data'),
        ('out.csv', {'logits': True, 'source': '{}/encoder.safetensors'}, '`logits=True`: the model has no'),
    ],
)
def test_mistakes_leave_no_file(
    image_folder: Path, weights: Path, tmp_path: Path, output: str, values: dict[str, Any], message: str
) -> None:
    write_weights(tmp_path / 'encoder.safetensors', num_classes=0)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'no image')
    values = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    values = {'data_dir': str(image_folder), **values}
    with pytest.raises(UserError, match=message):
        run(weights, tmp_path / output, **{name: value for name, value in values.items() if value is not None})
    assert not list(tmp_path.glob('*out*'))


def _embedded(rank: int, world: int) -> dict[str, Any]:
    values = {**CONFIG, 'source': 'w.safetensors', 'output': 'out.npz', 'dataset': 'digits', 'workers': 0}
    embed(build(EmbedSettings, {**values, 'split': 'validation[:33]', 'batch_size': 8}))
    return {}


def test_processes_write_what_one_writes(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes share an odd number of images; the main one writes them all, in order."""
    monkeypatch.chdir(tmp_path)
    run_processes(_embedded, 2, tmp_path)
    found = dict(np.load('out.npz'))
    alone = run(weights, tmp_path / 'alone.npz', dataset='digits', split='validation[:33]')
    assert found['index'].tolist() == list(range(33)) and found['label'].tolist() == alone['label'].tolist()
    np.testing.assert_allclose(found['features'], alone['features'], atol=2e-5)
