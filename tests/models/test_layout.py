"""The layout of a model: images need no change, numbers stay, and it is chosen by what the convolutions are."""

from __future__ import annotations

import pytest
import timm
import torch

from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.layout import prefers_channels_last, use_layout


@pytest.mark.parametrize('name', ['test_efficientnet', 'resnet10t', 'test_convnext'])
def test_the_numbers_stay_and_images_need_no_change(name: str) -> None:
    torch.manual_seed(0)
    plain, laid = (timm.create_model(name, num_classes=5).eval() for _ in range(2))
    laid.load_state_dict(plain.state_dict())
    use_layout(laid, True, torch.device('cpu'))
    images = torch.randn(2, 3, 64, 64)
    maps = laid.forward_features(images)
    assert images.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)
    for expected, found in zip(features_and_logits(plain, images), features_and_logits(laid, images)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'name, cpu, cuda',
    [
        ('tf_efficientnet_lite0', True, True),
        ('cifar_resnet20', True, True),
        ('resnet18', False, True),  # 6% slower on a CPU
        ('vit_tiny_patch16_224', False, False),  # convolves its patches alone
    ],
)
def test_it_is_chosen_by_the_convolutions_unless_the_user_chose(name: str, cpu: bool, cuda: bool) -> None:
    with torch.device('meta'):
        model = timm.create_model(name)
    assert [prefers_channels_last(model, torch.device(kind)) for kind in ('cpu', 'cuda', 'mps')] == [cpu, cuda, False]


@pytest.mark.parametrize('channels_last, expected', [(None, True), (True, True), (False, False)])
def test_a_setting_wins(channels_last: bool | None, expected: bool) -> None:
    model = use_layout(timm.create_model('mobilenetv3_small_050'), channels_last, torch.device('cpu'))
    assert model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) == expected
