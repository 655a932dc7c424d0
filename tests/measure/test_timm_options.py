"""Options of timm's validation script, against plain timm."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet, create_transform
from timm.layers import apply_test_time_pool

from ctc_timm.measure.settings import ValidateSettings
from ctc_timm.measure.validation import validate
from ctc_timm.runs import Run
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from runs import CONFIG

CONFIG32 = {**CONFIG, 'input_size': (3, 32, 32)}


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[Path, int]]:
    """Twelve images in three class folders, named as ImageNet's validation images, with their classes."""
    found, draw = [], np.random.default_rng(0)
    for i in range(12):
        file = tmp_path / 'images' / 'validation' / f'class{i % 3}' / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        found.append((file, i % 3))
    return sorted(found)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A model of ten classes whose answers differ from image to image, and its file."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    torch.nn.init.normal_(model.fc.weight)
    save_file(model.state_dict(), tmp_path / 'w.safetensors', metadata={'architecture': 'test_resnet'})
    return model.eval()


def logits_of(model: Any, images: list[tuple[Path, int]], **config: Any) -> torch.Tensor:
    transform = create_transform(**{**CONFIG32, **config})
    with torch.no_grad():
        return torch.cat([model(transform(Image.open(file).convert('RGB'))[None]) for file, _ in images])


@pytest.fixture
def measured(tmp_path: Path, model: Any, images: Any) -> Callable[..., dict[str, Any]]:
    def measure(**values: Any) -> dict[str, Any]:
        given = {**CONFIG32, 'source': str(tmp_path / 'w.safetensors'), 'data_dir': str(tmp_path / 'images')}
        given |= {'model': 'test_resnet', 'num_classes': 10, 'output': str(tmp_path / 'out'), 'workers': 0}
        return validate(build(ValidateSettings, {**given, 'batch_size': 5, **values}))

    return measure


def test_some_of_the_classes(measured: Any, model: Any, images: Any, tmp_path: Path) -> None:
    (tmp_path / 'labels.txt').write_text('7\n3\n5\n')
    results = measured(valid_labels=str(tmp_path / 'labels.txt'))
    hits = logits_of(model, images)[:, [7, 3, 5]].argmax(dim=1) == torch.tensor([label for _, label in images])
    assert 0 < hits.sum() < 12 and results['top1'] == pytest.approx(100 * hits.double().mean().item())
    assert results['top5'] == 100.0 and results['loss'] != measured()['loss']
    for text, words in (
        ('7\n3\n10\n', 'output 10 of a model with 10'),
        ('7\n3\n', '`num_classes` 2: image'),
        *(
            ('7\nx\n', 'invalid literal'),
            ('', 'must hold a class number'),
            ('7\n7\n3\n', 'each once'),
            ('-1\n1', 'from 0'),
        ),
    ):
        (tmp_path / 'labels.txt').write_text(text)
        with pytest.raises(UserError, match=words):
            measured(valid_labels=str(tmp_path / 'labels.txt'))
    with pytest.raises(UserError, match='`valid_labels` nowhere.txt: .*No such file'):
        measured(valid_labels='nowhere.txt')


def test_imagenet_real(measured: Any, model: Any, images: Any, tmp_path: Path) -> None:
    """An image may have several labels or none; those without count in neither accuracy."""
    file, draw = tmp_path / 'real.json', np.random.default_rng(1)
    real = [sorted(draw.choice(10, size, replace=False).tolist()) for size in [0, 1, 2, 3] * 3]
    file.write_text(json.dumps(real))
    results = measured(real_labels=str(file))
    ranking = logits_of(model, images).argsort(dim=1, descending=True).tolist()
    labels = {path.name: real[int(path.stem[-8:]) - 1] for path, _ in images}
    counted = [(set(labels[path.name]), row) for (path, _), row in zip(images, ranking) if labels[path.name]]
    for k in (1, 5):
        hits = [bool(known & set(row[:k])) for known, row in counted]
        assert results[f'top{k}'] == pytest.approx(100 * np.mean(hits)) and len(hits) == 9
    theirs = RealLabelsImagenet([path.name for path, _ in images], real_json=str(file))
    theirs.add_result(logits_of(model, images))
    assert results['top1'] == theirs.get_accuracy(1)
    for text, words in (
        (json.dumps(real[1:]), 'is not for the 12 images'),
        ('[1', 'is no JSON that can be read'),
        ('[' * 100_000, 'is no JSON that can be read'),
        (b'\xff', 'is no JSON that can be read'),
        ('{"1": [0]}', 'a list of classes for each image, got a dict'),
        (json.dumps([*real[:-1], [3, 10]]), 'image 12 must have a list of classes from 0 to 9, got .3, 10'),
        (json.dumps([*real[:-1], [-1]]), 'image 12 must have a list of classes'),
        (json.dumps([5, *real[1:]]), 'image 1 must have a list of classes from 0 to 9, got 5'),
        (json.dumps([['5'], *real[1:]]), 'image 1 must have'),
        (json.dumps([[]] * 12), 'has no label of any image'),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f'^`real_labels` {file}: .*{words}'):
            measured(real_labels=str(file))
    file.write_text(json.dumps(real))
    images[3][0].rename(images[3][0].with_name('other.JPEG'))
    with pytest.raises(UserError, match='has no image other.JPEG'):
        measured(real_labels=str(file))


def test_pooling_at_test_time(measured: Any, model: Any, images: Any, tmp_path: Path) -> None:
    """Of images larger than the model's; those of its own size are measured as ever."""
    config = {'input_size': (3, 192, 192), 'crop_pct': 0.9}
    model.default_cfg['pool_size'] = (5, 5)
    pooling, pooled = apply_test_time_pool(model, config)
    assert pooled
    expected = logits_of(pooling.eval(), images, **{**config, 'crop_pct': 1.0})
    hits = expected.argmax(dim=1) == torch.tensor([label for _, label in images])
    plain = measured(**config)
    results = measured(**config, test_pool=True)
    assert results['top1'] == pytest.approx(100 * hits.double().mean().item()) and results['crop_pct'] == 1.0
    assert results['loss'] != plain['loss'] and results['parameters'] == plain['parameters']
    assert measured(test_pool=True)['loss'] == measured()['loss']
    vit = timm.create_model('test_vit', num_classes=10, dynamic_img_size=True)
    save_file(vit.state_dict(), tmp_path / 'w.safetensors', metadata={'architecture': 'test_vit'})
    with pytest.raises(UserError, match='`test_pool`: test_vit does not fit it: '):
        measured(**config, test_pool=True, model='test_vit', model_kwargs={'dynamic_img_size': True})


@pytest.mark.parametrize('suffix', ['csv', 'json'])
def test_results_file(measured: Any, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / 'new' / f'all.{suffix}'
    results = measured(results_file=str(file))
    if suffix == 'json':
        row = json.loads(file.read_text())
    else:
        with file.open(newline='') as stream:
            (row,) = csv.DictReader(stream)
    columns = ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
    assert list(row) == columns and row['model'] == 'test_resnet'
    assert float(row['top1']) == pytest.approx(results['top1'], abs=1e-4)
    assert float(row['top1']) + float(row['top1_err']) == pytest.approx(100)
    (tmp_path / 'folder.csv').mkdir()
    for name, words in (
        ('x.txt', 'must end in .csv or .json'),
        ('folder.csv', 'is a folder'),
        ('w.safetensors/row.csv', 'w.safetensors is no folder that can be written to'),
    ):
        with pytest.raises(UserError, match=f'`results_file` {tmp_path / name}: .*{words}'):
            measured(results_file=str(tmp_path / name), output=str(tmp_path / 'refused'))
    assert not (tmp_path / 'refused').exists()


def test_what_is_published_stays(measured: Any, model: Any, images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Accuracies by other labels, on some classes or with pooling are not written into a run's folder."""
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / 'run')
    run.create({})
    run.write_config(model, CONFIG32, {})
    run.save_weights('best', model, {})
    given = {'source': str(run), 'output': '', 'model': ''}
    measured(**given)
    before = (run.validation / 'results.json').read_bytes()
    (tmp_path / 'real.json').write_text(json.dumps([[3]] * 12))
    (tmp_path / 'valid.txt').write_text('4\n5\n6\n')
    for options in ({'real_labels': 'real.json'}, {'valid_labels': 'valid.txt'}, {'test_pool': True}):
        results = measured(**given, **options)
        assert options.items() <= results.items() and (run.validation / 'results.json').read_bytes() == before
        (file,) = (tmp_path / 'results').glob('*/validation/results.json')
        assert json.loads(file.read_text())['top1'] == pytest.approx(results['top1'])
