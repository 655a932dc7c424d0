"""Mixup and CutMix against timm's own on the same random state."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.utils import random_seed

from ctc_timm.data.mixup import InstanceMixup, create_mixup

B, C, SMOOTHING = 8, 5, 0.1
SETTINGS = {
    'mixup': dict(mixup_alpha=0.8, cutmix_alpha=0.0),
    'cutmix': dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    'both': dict(mixup_alpha=0.4, cutmix_alpha=1.0),
    'seldom': dict(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.5),
    'minmax': dict(mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_minmax=(0.3, 0.7)),
}


def pair(kind: str, mode: str) -> tuple[InstanceMixup, Mixup]:
    settings = SETTINGS[kind]
    names = {'mixup_alpha': 'mixup', 'cutmix_alpha': 'cutmix'}
    mine = InstanceMixup(C, SMOOTHING, mode=mode, **{names.get(k, k): v for k, v in settings.items()})  # type: ignore[arg-type]
    return mine, Mixup(**settings, mode=mode, label_smoothing=SMOOTHING, num_classes=C)  # type: ignore[arg-type]


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kind', SETTINGS)
def test_images_targets_and_lambda_are_timms(kind: str, mode: str) -> None:
    """Images and soft targets equal timm's; lambda is what the pixels themselves say."""
    mine, timms = pair(kind, mode)
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


def test_lambda_weighs_the_partner(flags: Callable[..., argparse.Namespace]) -> None:
    """With one class per image the soft targets are lambda at home and the rest at B - 1 - b."""
    mixup = create_mixup(flags('--mixup 0.8 --smoothing 0.0 --mixup-mode elem'), B)
    assert mixup is not None
    np.random.seed(0)
    _, soft, lam = mixup(torch.rand(B, 3, 4, 4), torch.arange(B))
    expected = torch.zeros(B, B)
    for b in range(B):
        expected[b, b] += lam[b]
        expected[b, B - 1 - b] += 1 - lam[b]
    assert torch.allclose(soft, expected, atol=1e-6) and len(set(lam.tolist())) > 1


@pytest.mark.parametrize('words, on', [('', False), ('--mixup 0.2', True), ('--cutmix 1', True)])
def test_when_anything_is_mixed(flags: Callable[..., argparse.Namespace], words: str, on: bool) -> None:
    assert (create_mixup(flags(words), C) is not None) is on
