"""Mixup and CutMix against timm's own on the same random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.data import Mixup
from timm.utils import random_seed

from ctc_timm.data.mixup import InstanceMixup, create_mixup
from ctc_timm.data.settings import MixupSettings
from ctc_timm.utils.errors import UserError

B, C, SMOOTHING = 8, 5, 0.1
SETTINGS = {
    'mixup': dict(mixup_alpha=0.8, cutmix_alpha=0.0),
    'cutmix': dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    'both': dict(mixup_alpha=0.4, cutmix_alpha=1.0),
    'seldom': dict(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.5),
    'minmax': dict(mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_minmax=(0.3, 0.7)),
}


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kind', SETTINGS)
def test_images_targets_and_lambda_are_timms(kind: str, mode: str) -> None:
    """Images and soft targets equal timm's; lambda is what the pixels themselves say."""
    options: Any = {**SETTINGS[kind], 'mode': mode}
    mine, timms = InstanceMixup(C, SMOOTHING, **options), Mixup(**options, label_smoothing=SMOOTHING, num_classes=C)
    for seed in range(6):
        images = torch.rand(B, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        targets = torch.randint(C, (B,), generator=torch.Generator().manual_seed(seed))
        random_seed(seed)
        mixed, soft, lam = mine(images.clone(), targets)
        random_seed(seed)
        expected, expected_soft = timms(images.clone(), targets)
        assert torch.equal(mixed, expected)
        assert torch.allclose(soft, expected_soft.to(soft.dtype), atol=1e-6)
        partner = images.flip(0)
        for b in range(B):
            own = (mixed[b] == images[b]).all(dim=0)
            pasted = (mixed[b] == partner[b]).all(dim=0)
            if bool((own | pasted).all()):  # nothing mixed, or a box pasted: lambda is the share of own pixels
                share = own.float().mean().item()
            else:  # least squares of mixed - partner on own - partner
                a, y = (images[b] - partner[b]).flatten(), (mixed[b] - partner[b]).flatten()
                share = float(a @ y / (a @ a))
            assert lam[b].item() == pytest.approx(share, abs=1e-4)


def test_settings() -> None:
    """What mixes, and which ranges of box sizes are refused."""
    assert create_mixup(MixupSettings(), C, 0.1) is None
    for settings in (MixupSettings(mixup=0.2), MixupSettings(cutmix=1.0), MixupSettings(cutmix_minmax=(0, 1))):
        assert create_mixup(settings, C, 0.1) is not None
    with pytest.raises(UserError, match='`cutmix_minmax` 0.5 0.3: the first must be smaller than the second'):
        create_mixup(MixupSettings(cutmix_minmax=(0.5, 0.3)), C, 0.1)
    mixup = create_mixup(MixupSettings(cutmix_minmax=(0.3, 0.35)), C, 0.1)
    with pytest.raises(UserError, match='`cutmix_minmax` 0.3 0.35: no box is between these shares of 8x8 images'):
        assert mixup is not None and mixup(torch.rand(B, 3, 8, 8), torch.zeros(B, dtype=torch.int64))
