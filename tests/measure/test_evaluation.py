"""Evaluation against a loop over single images through plain timm."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from ctc_timm.data.datasets import open_split
from ctc_timm.data.digits import DigitsReader
from ctc_timm.data.loaders import create_eval_loader
from ctc_timm.data.transforms import data_config
from ctc_timm.measure.evaluation import PerClassEvaluator, evaluate


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=10, img_size=16)
    with torch.no_grad():
        model.head.weight.normal_(std=1.0)  # so that its answers differ from image to image
    return model


def test_accuracy_by_class_against_a_loop(flags: Callable[..., argparse.Namespace], model: nn.Module) -> None:
    """Top-1, top-5, loss and each class's accuracy, with a last batch that is smaller than the others."""
    args = flags('--dataset digits --img-size 16 --mean 0.3 --std 0.4 -b 32 -vb 30 -j 0')
    source = open_split(args, 'validation[:97]')
    config = data_config(args, model)
    accelerator = Accelerator(cpu=True)
    loader = create_eval_loader(source.dataset, args, config, accelerator.device)
    metrics = evaluate(model.train(), loader, accelerator, 10)

    transform = create_transform(**resolve_data_config(vars(args), model=model))
    reader = DigitsReader('validation[:97]')
    top1, top5, losses = 0, 0, 0.0
    per_class: dict[int, list[bool]] = {}
    model.eval()
    for pixels, label in zip(reader.images, reader.labels.tolist()):
        with torch.no_grad():
            logits = model(transform(Image.fromarray(pixels).convert('RGB')).unsqueeze(0))[0]
        ranking = logits.argsort(descending=True).tolist()
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
        losses += float(F.cross_entropy(logits[None], torch.tensor([label])))
        per_class.setdefault(label, []).append(ranking[0] == label)
    assert metrics['num_images'] == 97
    assert 0 < top1 < 97
    assert metrics['top1'] == pytest.approx(100 * top1 / 97, abs=1e-9)
    assert metrics['top5'] == pytest.approx(100 * top5 / 97, abs=1e-9)
    assert metrics['loss'] == pytest.approx(losses / 97, rel=1e-5)
    for label in range(10):
        hits = per_class[label]
        assert metrics['per_class'][label] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-9)


def test_padding_and_absent_classes() -> None:
    """Only the images that are no padding count; a class without images has no accuracy."""
    evaluator = PerClassEvaluator(4, torch.device('cpu'), max_samples=5)
    logits = torch.eye(4)[torch.tensor([0, 1, 1, 3, 0, 2])]
    targets = torch.tensor([0, 1, 0, 3, 3, 2])
    evaluator.update(logits[:4], targets[:4])
    evaluator.update(logits[4:], targets[4:])  # the last of the six is padding
    assert evaluator.per_class() == [50.0, 100.0, None, 50.0]
    evaluator.reset()
    assert evaluator.per_class() == [None] * 4
