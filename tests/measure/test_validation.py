"""Validation against a loop over single images through plain timm."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

from ctc_timm.data.digits import DigitsReader
from ctc_timm.measure.settings import ValidateSettings
from ctc_timm.measure.validation import PerClassEvaluator, validate
from ctc_timm.runs import Run
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build
from runs import CONFIG


def test_accuracy_by_class_against_a_loop(tmp_path: Path) -> None:
    """Top-1, top-5, loss and each class's accuracy, with a last batch that is smaller than the others."""
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=10, img_size=16)
    torch.nn.init.normal_(model.head.weight)  # so that its answers differ from image to image
    save_file(model.state_dict(), tmp_path / 'w.safetensors', metadata={'architecture': 'test_vit'})
    transform, reader = create_transform(**CONFIG), DigitsReader('validation[:97]')
    images = [transform(Image.fromarray(pixels).convert('RGB')) for pixels in reader.images]
    labels = torch.from_numpy(reader.labels)
    with torch.no_grad():
        logits = torch.cat([model.eval()(image[None]) for image in images])
    ranking = logits.argsort(dim=1, descending=True)
    hits = ranking[:, 0] == labels
    values = {**CONFIG, 'source': str(tmp_path / 'w.safetensors'), 'dataset': 'digits', 'output': str(tmp_path / 'out')}
    values |= {'model': 'test_vit', 'model_kwargs': {'img_size': 16}, 'num_classes': 10, 'split': 'validation[:97]'}
    results = validate(build(ValidateSettings, {**values, 'validation_batch_size': 30, 'workers': 0}))
    assert results['num_images'] == 97 and 0 < hits.sum() < 97
    assert results['top1'] == pytest.approx(100 * hits.double().mean().item(), abs=1e-9)
    top5 = (ranking[:, :5] == labels[:, None]).any(dim=1)
    assert results['top5'] == pytest.approx(100 * top5.double().mean().item(), abs=1e-9)
    assert results['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    by_class = [100 * hits[labels == c].double().mean().item() for c in range(10)]
    assert [row['top1'] for row in results['per_class']] == pytest.approx(by_class, abs=1e-9)
    assert results['mean_per_class'] == pytest.approx(sum(by_class) / 10, abs=1e-9)

    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == results
    with (tmp_path / 'out' / 'per_class.csv').open(newline='') as stream:
        assert [(row['name'], float(row['top1'])) for row in csv.DictReader(stream)] == [
            (str(c), pytest.approx(value)) for c, value in enumerate(by_class)
        ]
    with (tmp_path / 'out' / 'results.csv').open(newline='') as stream:
        assert [row['top1'] for row in csv.DictReader(stream)] == [str(results['top1'])]


def test_classes_of_a_run_go_by_name(image_folder: Path, tmp_path: Path) -> None:
    """A folder that lacks the first class moves no other one; a class that the run does not know is refused."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3, global_pool='avg')
    run = Run(tmp_path / 'run')
    run.create({'data_dir': str(image_folder), 'mode': 'vanilla'})
    config = {**CONFIG, 'input_size': (3, 32, 32)}
    run.write_config(model, config, {i: f'class{i}' for i in range(3)})
    run.save_weights('best', model, {})
    values = {'source': str(run), 'data_dir': str(image_folder), 'output': str(tmp_path / 'out'), 'workers': 0}

    def accuracies() -> dict[str, float]:
        return {row['name']: row['top1'] for row in validate(build(ValidateSettings, values))['per_class']}

    whole = accuracies()
    assert list(whole) == ['class0', 'class1', 'class2'] and len(set(whole.values())) > 1
    shutil.rmtree(image_folder / 'validation' / 'class0')
    assert accuracies() == {name: whole[name] for name in ('class1', 'class2')}
    (image_folder / 'validation' / 'class2').rename(image_folder / 'validation' / 'clas2')
    with pytest.raises(UserError, match="class 'clas2' is missing in the run .*; nearest: class2,"):
        accuracies()


def test_padding_and_absent_classes() -> None:
    """Only the images that are no padding count; a class without images has no accuracy."""
    evaluator = PerClassEvaluator(4, torch.device('cpu'), max_samples=5)
    logits = torch.eye(4)[torch.tensor([0, 1, 1, 3, 0, 2])]
    targets = torch.tensor([0, 1, 0, 3, 3, 2])
    evaluator.update(logits[:4], targets[:4])
    evaluator.update(logits[4:], targets[4:])  # the last of the six is padding
    metrics = evaluator.compute()
    assert metrics['per_class'] == [50.0, 100.0, None, 50.0] and metrics['num_images'] == 5
