"""Segmentation heads: what they compute, and on which bodies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from ctc_timm.dense.pyramid import create_pyramid
from ctc_timm.dense.segmentation import segmentation_loss
from ctc_timm.dense.segmenters import Segmenter, SemanticFPN

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def created(head: str, name: str = 'test_resnet', size: int = 64, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    pyramid = create_pyramid(name, size, from_scratch=True, out_channels=16, **options)
    return Segmenter(head, pyramid, 5, MEAN, STD, head_channels=16)


@pytest.mark.parametrize('head', ['fpn', 'deeplabv3'])
@pytest.mark.parametrize(
    'name,size', [('test_resnet', 64), ('test_resnet', 76), ('test_convnext', 64), ('test_vit', 64)]
)
def test_scores_have_the_size_of_the_images(head: str, name: str, size: int) -> None:
    """For bodies of four strides and of one, of sizes that no stride divides; every parameter takes part."""
    model = created(head, name, size).train()
    scores = model(torch.rand(2, 3, size, size))
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
    wanted = conv2d(total, head.classifier.weight, head.classifier.bias)
    assert torch.allclose(head(levels), wanted, atol=1e-5)


def test_images_are_normalized_by_the_model() -> None:
    """The body sees what timm's own normalization gives."""
    model = created('fpn').eval()
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(1, 3, 64, 64)
    model(images)
    for channel in range(3):
        wanted = (images[0, channel] - MEAN[channel]) / STD[channel]
        assert torch.allclose(seen[0][0, channel], wanted, atol=1e-6)


def test_deeplab_on_a_finer_map() -> None:
    """With timm's output_stride the last map is as large as was asked for."""
    for stride in (8, 16, 32):
        model = created('deeplabv3', 'resnet18', output_stride=stride)
        assert model.backbone.maps(torch.zeros(1, 3, 64, 64))[-1].shape == (1, 512, 64 // stride, 64 // stride)
        assert not any('fpn' in name for name, _ in model.named_parameters())


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    """By hand; 0 with gradient where none counts."""
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    truth = torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    truth[0, :2] = 255
    batch = [torch.zeros(3, 4, 4)] * 2, [{'mask': mask} for mask in truth]
    loss = segmentation_loss(lambda images: scores, batch)['loss']  # type: ignore[arg-type]
    logs = scores.log_softmax(1)
    picked = [
        -logs[b, int(truth[b, y, x]), y, x]
        for b in range(2)
        for y in range(4)
        for x in range(4)
        if truth[b, y, x] != 255
    ]
    assert len(picked) == 24 and torch.allclose(loss, torch.stack(picked).mean())
    none = [{'mask': torch.full_like(mask, 255)} for mask in truth]
    loss = segmentation_loss(lambda images: scores, (batch[0], none))['loss']  # type: ignore[arg-type]
    loss.backward()
    assert loss == 0 and torch.all(scores.grad == 0)
