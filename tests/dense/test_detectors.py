"""torchvision's detectors on a pyramid: losses, gradients everywhere, and a picture that is learned by heart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folders import content, write_coco
from PIL import Image

from ctc_timm.dense import coco_metrics
from ctc_timm.dense.augment import FitCanvas, collate, train_transform
from ctc_timm.dense.coco import CocoDataset, open_coco
from ctc_timm.dense.detection import detector_loss
from ctc_timm.dense.detectors import DETECTORS, create_detector, extra_levels
from ctc_timm.dense.drawing import draw_detections
from ctc_timm.dense.pyramid import create_pyramid
from ctc_timm.utils.errors import UserError

GRAY = [0.5, 0.5, 0.5]
LOSSES = {
    'fasterrcnn': {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'},
    'maskrcnn': {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg', 'loss_mask'},
    'retinanet': {'classification', 'bbox_regression'},
}


def detector_of(kind: str, size: int = 32, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    pyramid = create_pyramid('cifar_resnet20', size, from_scratch=True, out_channels=32, extra=extra_levels(kind, 32))
    return create_detector(kind, pyramid, 2, size, GRAY, GRAY, head_channels=64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize('kind', DETECTORS)
def test_an_image_is_learned_by_heart(kind: str, tmp_path: Path) -> None:
    """From losses that reach every parameter to the boxes, and masks, of two images."""
    split = open_coco(write_coco(tmp_path, {'train': content(2)}), 'train')
    masks = kind == 'maskrcnn'
    train = CocoDataset(split, train_transform(32, 0, (1, 1), GRAY), masks)
    batch = collate([train[0], train[1]])
    model = detector_of(kind).train()
    losses = detector_loss(model, batch)
    assert set(losses) == {'loss'} | LOSSES[kind]
    assert losses['loss'].item() == pytest.approx(sum(losses[name].item() for name in LOSSES[kind]), rel=1e-5)
    losses['loss'].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150 if kind == 'retinanet' else 45):
        optimizer.zero_grad()
        detector_loss(model, batch)['loss'].backward()
        optimizer.step()
    model.eval()
    shown = CocoDataset(split, FitCanvas(32, GRAY))
    images, targets = collate([shown[0], shown[1]])
    with torch.no_grad():
        outputs = model(images)
    rows = [
        coco_metrics.to_results(output, target, image, [3, 11])
        for output, target, image in zip(outputs, targets, split.images)
    ]
    found = coco_metrics.measure(split, rows[0] + rows[1], masks)
    assert found['box_ap50'] > 0.9
    if masks:
        assert found['mask_ap50'] > 0.9
    picture = draw_detections(
        [shown.image(0), shown.image(1)],
        [split.annotations[10], split.annotations[11]],
        rows,
        {3: 'square', 11: 'bar'},
        tmp_path / 'drawn.png',
    )
    assert len(np.unique(np.asarray(Image.open(picture).convert('L')))) > 20


@pytest.mark.parametrize('kind', DETECTORS)
def test_images_without_objects(kind: str) -> None:
    """Negatives alone give finite losses."""
    model = detector_of(kind).train()
    target = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64), 'masks': torch.zeros(0, 32, 32)}
    losses = detector_loss(model, ([torch.rand(3, 32, 32)] * 2, [target] * 2))
    assert all(loss.isfinite() for loss in losses.values())
    losses['loss'].backward()


def test_anchors_are_of_the_stride() -> None:
    """Eight strides a side, at each of a body's levels and the one on top."""
    sizes = detector_of('fasterrcnn').rpn.anchor_generator.sizes  # type: ignore[union-attr]
    assert sizes == ((16,), (32,), (64,))
    assert detector_of('fasterrcnn', anchor_scale=4).rpn.anchor_generator.sizes == ((8,), (16,), (32,))  # type: ignore


def test_images_are_taken_as_they_are() -> None:
    """Neither resized nor padded: what the pyramid sees is the normalized canvas."""
    model = detector_of('fasterrcnn', 40)
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))  # type: ignore[union-attr]
    images = [torch.rand(3, 40, 40), torch.rand(3, 40, 40)]
    for training in (True, False):
        model.train(training)
        target = {'boxes': torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 'labels': torch.tensor([1])}
        model(images, [target, target])
    for given in seen:
        torch.testing.assert_close(given, (torch.stack(images) - 0.5) / 0.5)


def test_unknown_options_are_told() -> None:
    with pytest.raises(UserError, match='--detector-kwargs: torchvision.s RetinaNet has no box_batch'):
        detector_of('retinanet', box_batch=3)
