"""Shape of a cloud of features against loops over images and pairs."""

import math

import numpy as np
import pytest
import torch

from ctc_timm.measure import geometry
from ctc_timm.measure.geometry import alignment, class_spread, effective_rank, measure_geometry, uniformity
from ctc_timm.utils.errors import UserError

NAMES = ['effective_rank', 'within', 'between', 'spread', 'collapse', 'alignment', 'uniformity']


def cloud(count=60, size=12, classes=4, seed=0):
    """Features far from the origin, of unequal scales, with a dead feature and classes of unequal size."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.choice(classes, count - classes, p=[0.6, 0.2, 0.1, 0.1])])
    features = rng.normal(size=(classes, size))[labels] + rng.normal(size=(count, size)) * np.linspace(0.1, 2, size)
    features += 5
    features[:, 0] = 0.1
    return torch.tensor(features), torch.tensor(labels)


def squared_distances(features):
    """Compute those of unit-length rows, [N, N]; a zero row stays zero."""
    rows = features.numpy() / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    return ((rows[:, None] - rows) ** 2).sum(axis=-1)


@pytest.fixture(params=[1, 7, 8192], ids=lambda rows: f'blocks of {rows}')
def blocks(request, monkeypatch):
    monkeypatch.setattr(geometry, 'BLOCK_ROWS', request.param)
    monkeypatch.setattr(geometry, '_BLOCK_PAIRS', request.param * 61)


@pytest.mark.parametrize('count, size', [(60, 12), (9, 40)])
def test_effective_rank_against_singular_values(count, size, blocks):
    features, _ = cloud(count, size)
    values = np.linalg.svd(features.numpy() - features.numpy().mean(axis=0), compute_uv=False)
    share = values[values > 1e-10] / values.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


@pytest.mark.parametrize('count, size', [(60, 12), (20, 40), (60, 3)])
def test_class_spread_against_covariances(count, size, blocks):
    features, labels = cloud(count, size)
    x, y = features.numpy(), labels.numpy()
    means = np.stack([x[y == label].mean(axis=0) for label in y])
    within, between = (np.cov(part, rowvar=False, bias=True) for part in (x - means, means))
    found = class_spread(features, labels)
    assert found.within == pytest.approx(np.trace(within), rel=1e-10)
    assert found.between == pytest.approx(np.trace(between), rel=1e-10)
    assert found.spread == pytest.approx(np.trace(within) / np.trace(between), rel=1e-10)
    collapse = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4
    assert found.collapse == pytest.approx(collapse, rel=1e-8)


def test_alignment_against_all_pairs_of_a_class(blocks):
    features, labels = cloud()
    features[5] = 0
    labels[5] = 0
    same = (labels[:, None] == labels).numpy() & ~np.eye(len(labels), dtype=bool)
    assert alignment(features, labels) == pytest.approx(squared_distances(features)[same].mean(), rel=1e-10)


@pytest.mark.parametrize('dtype, rel', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_uniformity_against_all_pairs(dtype, rel, blocks):
    features, _ = cloud()
    features = features - 5  # all around the origin
    features[5] = 0
    potential = np.exp(-2 * squared_distances(features))[np.triu_indices(len(features), 1)]
    assert uniformity(features.to(dtype)) == pytest.approx(math.log(potential.mean()), rel=rel)


def test_full_collapse_and_no_structure():
    labels = torch.arange(300) % 3
    found = measure_geometry(torch.eye(3)[labels], labels)
    for name in ('within', 'spread', 'collapse', 'alignment'):
        assert found[name] == pytest.approx(0, abs=1e-20), name
    assert found['effective_rank'] == pytest.approx(2)
    noise = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0))
    found = measure_geometry(noise, torch.arange(3000) % 3)
    assert found['alignment'] == pytest.approx(2, abs=0.02)
    assert found['uniformity'] == pytest.approx(-4, abs=0.06)  # exp(-2 d^2) is convex: a little above
    assert found['spread'] > 300


def test_scale_matters_to_variances_alone_and_the_origin_to_none_of_them():
    features, labels = cloud()
    plain, scaled = measure_geometry(features, labels), measure_geometry(features * 1e3, labels)
    assert list(plain) == NAMES
    for name in NAMES:
        factor = 1e6 if name in ('within', 'between') else 1
        assert scaled[name] == pytest.approx(plain[name] * factor, rel=1e-9), name
    assert class_spread(features + 1e5, labels) == pytest.approx(class_spread(features, labels), rel=1e-7)
    assert effective_rank(features + 1e5) == pytest.approx(plain['effective_rank'], rel=1e-7)


def test_dead_features_and_zero_vectors():
    shapes = (torch.zeros(20, 5), torch.full((20, 5), 0.1), torch.full((1003, 5), 0.1, dtype=torch.float64))
    assert (shapes[-1] - shapes[-1].mean(dim=0)).any()  # a plain mean is off by a rounding error
    for features in shapes:
        labels = torch.arange(len(features)) % 2
        found = measure_geometry(features, labels)
        infinite = dict.fromkeys(('spread', 'collapse'), math.inf)
        assert found == {**dict.fromkeys(NAMES, 0.0), **infinite, 'uniformity': pytest.approx(0, abs=1e-6)}
    features, labels = cloud()
    features[:10] = 0
    found = measure_geometry(features, labels)
    assert all(math.isfinite(value) for value in found.values())
    dead = torch.cat([features, torch.zeros(len(features), 7)], dim=1)
    assert measure_geometry(dead, labels) == pytest.approx(found, rel=1e-9)


def test_what_cannot_be_measured():
    features, labels = cloud()
    features[3, 0], features[9, 2] = torch.nan, -torch.inf
    with pytest.raises(UserError, match='features of 2 of 60 images are NaN or infinite'):
        measure_geometry(features, labels)
    features, labels = cloud()
    with pytest.raises(UserError, match='one class'):
        measure_geometry(features, torch.zeros_like(labels))
    with pytest.raises(UserError, match='single image'):
        measure_geometry(features, torch.arange(len(labels)))
    with pytest.raises(UserError, match='two images'):
        uniformity(features[:1])
