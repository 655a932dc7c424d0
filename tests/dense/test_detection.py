"""Detectors from their losses to boxes and masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from coco_folders import content, write_coco
from ctc_timm.data.settings import LoaderSettings
from ctc_timm.dense.coco import CocoSplit
from ctc_timm.dense.detection import DetectionEvaluator, DetectionTask, create_detector, extra_levels
from ctc_timm.dense.loading import FitCanvas, collate, train_transform
from ctc_timm.dense.pyramid import open_pyramid
from ctc_timm.dense.settings import BackboneSettings, CanvasSettings, DetectorSettings, DetectSettings
from ctc_timm.models.settings import SourceSettings
from ctc_timm.runs import Run
from ctc_timm.utils.settings import build
from ctc_timm.utils.yaml_files import read_recipe
from runs import Ended

Script = Callable[..., Ended]
KINDS = ('fasterrcnn', 'maskrcnn', 'retinanet')
GRAY = [0.5, 0.5, 0.5]
_RCNN = {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}
LOSSES = {'fasterrcnn': _RCNN, 'maskrcnn': _RCNN | {'loss_mask'}, 'retinanet': {'classification', 'bbox_regression'}}


def detector_of(kind: str, size: int = 32, **options: Any) -> DetectionTask:
    torch.manual_seed(0)
    backbone = BackboneSettings(from_scratch=True, fpn_channels=32)
    pyramid = open_pyramid(SourceSettings(model='cifar_resnet20'), backbone, size, extra_levels(kind, 32))
    settings = build(DetectorSettings, {'detector': kind, 'head_channels': 64, **options})
    return DetectionTask(create_detector(settings, pyramid, 2, size, GRAY, GRAY), torch.device('cpu')).train()


@pytest.mark.parametrize('kind', KINDS)
def test_two_images_are_memorized(kind: str, tmp_path: Path) -> None:
    """From losses that reach every parameter to the boxes, masks and picture of two images."""
    # RetinaNet leaves anchors of an IoU from 0.4 to 0.5 out of its loss; whether one ends as a false alarm is chance.
    options = {'detector_kwargs': {'bg_iou_thresh': 0.5}} if kind == 'retinanet' else {}
    split = CocoSplit(write_coco(tmp_path, {'train': content(2)}), 'train', masks=kind == 'maskrcnn')
    still = train_transform(CanvasSettings(img_size=32, hflip=0, scale=(1, 1)), GRAY, boxes=True)
    batch, task = collate([still(*split[0]), still(*split[1])]), detector_of(kind, **options)
    losses = task.run_batch(batch)
    assert set(losses) == {'loss'} | LOSSES[kind]
    assert losses['loss'].item() == pytest.approx(sum(losses[name].item() for name in LOSSES[kind]), rel=1e-5)
    losses['loss'].backward()
    assert not [name for name, p in task.named_parameters() if p.grad is None]
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    for _ in range(200 if kind == 'retinanet' else 45):
        optimizer.zero_grad()
        task.run_batch(batch)['loss'].backward()
        optimizer.step()
    evaluator = DetectionEvaluator(split, FitCanvas(32, GRAY), LoaderSettings(2, workers=0), Accelerator(cpu=True))
    metrics = evaluator(task.eval_model)
    assert min(value for name, value in metrics.items() if name.endswith('ap50')) > 0.9
    assert ('mask_ap50' in metrics) == (kind == 'maskrcnn')
    evaluator.draw(task.eval_model, Run(tmp_path), range(2))
    picture = Image.open(tmp_path / 'plots' / 'detections.png')
    assert len(np.unique(np.asarray(picture.convert('L')))) > 20


@pytest.mark.parametrize('kind', KINDS)
def test_images_without_objects(kind: str) -> None:
    """Negatives alone give finite losses."""
    target = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64), 'masks': torch.zeros(0, 32, 32)}
    losses = detector_of(kind).run_batch(([torch.rand(3, 32, 32)] * 2, [target] * 2))
    assert all(loss.isfinite() for loss in losses.values())
    losses['loss'].backward()


def test_anchors_and_images() -> None:
    """Anchors are eight strides a side, at each level and the one on top; images are neither resized nor padded."""
    model: Any = detector_of('fasterrcnn', 40).eval_model
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,))
    smaller: Any = detector_of('fasterrcnn', anchor_scale=4).eval_model
    assert smaller.rpn.anchor_generator.sizes == ((8,), (16,), (32,))
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = [torch.rand(3, 40, 40), torch.rand(3, 40, 40)]
    target = {'boxes': torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 'labels': torch.tensor([1])}
    for training in (True, False):
        model.train(training)(images, [target, target])
    for pixels in seen:
        torch.testing.assert_close(pixels, (torch.stack(images) - 0.5) / 0.5)


@pytest.mark.parametrize('kind', KINDS)
def test_every_detector_takes_the_recipe_of_the_scenes(kind: str) -> None:
    """But for RetinaNet's sizes of a second stage, which it has none of."""
    recipe = read_recipe('detect_digits')
    if kind == 'retinanet':
        del recipe['detector_kwargs']
    settings = build(DetectSettings, {**recipe, 'detector': kind})
    extra = extra_levels(kind, settings.backbone.fpn_channels)
    pyramid = open_pyramid(settings.source, settings.backbone, settings.canvas.img_size, extra)
    create_detector(settings.detector, pyramid, 10, 96, GRAY, GRAY)
