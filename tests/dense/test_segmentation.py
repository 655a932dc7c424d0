"""Segmentation heads, losses and predictions, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn.functional import conv2d, interpolate

from ctc_timm.data.settings import LoaderSettings
from ctc_timm.dense.loading import FitCanvas
from ctc_timm.dense.masks import open_masks
from ctc_timm.dense.pyramid import open_pyramid
from ctc_timm.dense.segmentation import SegmentationEvaluator, SegmentationTask, Segmenter, SemanticFPN
from ctc_timm.dense.settings import BackboneSettings, SegmenterSettings
from ctc_timm.models.settings import SourceSettings
from mask_folders import write_voc

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def segmenter(head: str, name: str = 'test_resnet', size: int = 64, classes: int = 5, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    pyramid = open_pyramid(SourceSettings(model=name), BackboneSettings(True, 16), size, **options)
    return Segmenter(head, pyramid, classes, MEAN, STD, head_channels=16)


@pytest.mark.parametrize('head', ['fpn', 'deeplabv3'])
@pytest.mark.parametrize(
    'name,size', [('test_resnet', 64), ('test_resnet', 76), ('test_convnext', 64), ('test_vit', 64)]
)
def test_scores_have_the_size_of_the_images(head: str, name: str, size: int) -> None:
    """For backbones of four strides and of one, of sizes that no stride divides; every parameter takes part."""
    model = segmenter(head, name, size).train()
    scores = model([torch.rand(3, size, size)] * 2)
    assert scores.shape == (2, 5, size, size)
    scores.square().mean().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None]
    assert not [key for key in idle if key.startswith('head') or 'fpn' in key], idle


def test_the_fpn_head_is_the_sum_of_its_levels() -> None:
    """By its weights written out: blocks, doubling, sum, classifier."""
    torch.manual_seed(0)
    head = SemanticFPN(6, 3, 4, channels=8).eval()
    levels = [torch.randn(2, 6, side, side) for side in (16, 8, 4)]

    def block(x: torch.Tensor, part: Any) -> torch.Tensor:
        x = conv2d(x, part[0].weight, padding=1)
        x = x.reshape(2, 2, 4, *x.shape[-2:])  # two groups of four channels
        mean, deviation = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), unbiased=False, keepdim=True)
        return ((x - mean) / (deviation + 1e-5).sqrt()).flatten(1, 2).relu()

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)

    first, second, third = head.branches
    total = block(levels[0], first[0]) + doubled(block(levels[1], second[0]))
    total = total + doubled(block(doubled(block(levels[2], third[0])), third[1]))
    assert torch.allclose(head(levels), conv2d(total, head.classifier.weight, head.classifier.bias), atol=1e-5)


def test_images_are_normalized() -> None:
    model = segmenter('fpn').eval()
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.rand(3, 64, 64)
    model([image])
    for channel in range(3):
        assert torch.allclose(seen[0][0, channel], (image[channel] - MEAN[channel]) / STD[channel], atol=1e-6)


@pytest.mark.parametrize('stride', [8, 16, 32])
def test_deeplab_on_a_finer_map(stride: int) -> None:
    """With timm's output_stride the last map is as large as was asked for."""
    model = segmenter('deeplabv3', 'resnet18', output_stride=stride)
    assert model.backbone.maps(torch.zeros(1, 3, 64, 64))[-1].shape == (1, 512, 64 // stride, 64 // stride)
    assert not any('fpn' in name for name, _ in model.named_parameters())


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    """By hand; 0 with gradient where none counts."""
    task = SegmentationTask(torch.nn.Identity(), torch.device('cpu'))
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    task.trainable_module.forward = lambda images: scores  # type: ignore[method-assign]
    truth = torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    truth[0, :2] = 255
    loss = task.run_batch(([], [{'mask': mask} for mask in truth]))['loss']
    places = (truth != 255).nonzero().tolist()
    picked = [-scores.log_softmax(1)[b, int(truth[b, y, x]), y, x] for b, y, x in places]
    assert len(picked) == 24 and torch.allclose(loss, torch.stack(picked).mean())
    loss = task.run_batch(([], [{'mask': torch.full_like(mask, 255)} for mask in truth]))['loss']
    loss.backward()
    assert loss == 0 and torch.all(scores.grad == 0)


def test_masks_are_measured_at_their_own_size(tmp_path: Path) -> None:
    """Images of other shapes than the canvas: predictions have the masks' shapes."""
    folder = write_voc(tmp_path / 'voc')
    for name, shape in (('val0', (24, 50)), ('val1', (61, 17))):
        for file in (folder / 'JPEGImages' / f'{name}.jpg', folder / 'SegmentationClass' / f'{name}.png'):
            with Image.open(file) as opened:
                resized = opened.resize(shape[::-1], Image.Resampling.NEAREST)
            resized.save(file)
    val = open_masks(str(folder), SegmenterSettings())[1]
    evaluator = SegmentationEvaluator(val, FitCanvas(32, MEAN), LoaderSettings(3, workers=0), Accelerator(cpu=True))
    model = segmenter('fpn', 'cifar_resnet20', 32, 3)
    shapes = [(tuple(p.shape), tuple(t.shape)) for p, t in evaluator.predictions(model)]
    assert shapes == [((24, 50),) * 2, ((61, 17),) * 2, ((32, 32),) * 2]
    assert 0 <= evaluator(model)['miou'] <= 1
