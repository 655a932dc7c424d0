"""Folded batch norms: the features of plain timm, from fewer modules, and a copy as it was where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.folding import fold_batch_norms


def trained(name: str, **options: Any) -> Any:
    """A model in evaluation mode whose batch norms are far from the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 1.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def norms(model: nn.Module) -> int:
    """How many batch norms a model has."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    'name, left',
    [
        ('resnet10t', 0),
        ('test_efficientnet', 0),
        ('mobilenetv3_small_050', 0),
        ('regnety_002', 0),
        ('repvgg_a0', None),  # of parallel branches that end in a batch norm, one without a convolution
        ('densenet121', None),  # most of its batch norms come before a convolution
        ('test_convnext', 0),
        ('test_vit', 0),
    ],
)
def test_the_features_and_the_model_stay(name: str, left: int | None) -> None:
    model = trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(3, 3, 64, 64) if name != 'test_vit' else torch.randn(3, 3, 160, 160)
    folded = fold_batch_norms(model, images[:2])
    assert norms(folded) == left if left is not None else 0 < norms(folded) < norms(model)
    with torch.no_grad():
        for expected, found in zip(features_and_logits(model, images), features_and_logits(folded, images)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(parameter.requires_grad for parameter in folded.parameters()) and not folded.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_convolution_that_others_read_is_left_alone() -> None:
    """Its output goes past the batch norm too, or its batch norm runs twice: the copy is the model itself."""

    class Reads(nn.Module):
        num_classes = 2

        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.fc, self.twice = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), twice

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.conv(images)
            return self.norm(self.norm(maps)) if self.twice else self.norm(maps) + maps

        def forward_head(self, maps: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            features = maps.mean(dim=(2, 3))
            return features if pre_logits else self.fc(features)

    for twice in (True, False):
        model = Reads(twice).eval()
        nn.init.normal_(model.norm.bias)
        images = torch.randn(2, 3, 8, 8)
        folded = fold_batch_norms(model, images)
        assert norms(folded) == 1
        assert all(
            torch.equal(a, b) for a, b in zip(features_and_logits(folded, images), features_and_logits(model, images))
        )


def test_under_autocast_in_half_precision() -> None:
    """Weights are folded in full precision; the result is about as near to float32 as the model in bfloat16."""
    model, images = trained('test_efficientnet'), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = features_and_logits(model, images)[0]
        with torch.autocast('cpu', torch.bfloat16):
            folded = fold_batch_norms(model, images[:2])
            half, mine = (features_and_logits(net, images)[0].float() for net in (model, folded))
    assert norms(folded) == 0
    assert (mine - exact).norm() <= 2 * (half - exact).norm()
