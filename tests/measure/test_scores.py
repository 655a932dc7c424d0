"""Accuracies against sorting, and their intervals against resampling images in a loop."""

import numpy as np
import pytest
import torch

from ctc_timm.measure.scores import METRICS, bootstrap_scores, point_scores, ranks


def scored(count=200, classes=8):
    """Logits with ties, and classes of very different sizes."""
    rng = np.random.default_rng(0)
    share = np.exp(-np.arange(classes))
    labels = np.concatenate([np.arange(classes), rng.choice(classes, count - classes, p=share / share.sum())])
    logits = rng.integers(0, 6, (count, classes)) + 2.0 * np.eye(classes)[labels]
    return torch.tensor(logits), torch.tensor(labels)


def by_sorting(logits, labels):
    order, labels = np.argsort(-logits.numpy(), axis=1, kind='stable'), labels.numpy()
    hits = order[:, 0] == labels
    top5 = (order[:, :5] == labels[:, None]).any(axis=1)
    per_class = [hits[labels == c].mean() for c in np.unique(labels)]
    return dict(zip(METRICS, (100 * hits.mean(), 100 * top5.mean(), 100 * np.mean(per_class))))


@pytest.mark.parametrize('classes', [2, 5, 8])
def test_scores_against_sorting(classes):
    logits, labels = scored(classes=classes)
    assert point_scores(logits, labels) == pytest.approx(by_sorting(logits, labels), rel=1e-12)
    # A class of which there is no image: it can be predicted, and is no part of the mean.
    kept = labels != 1
    assert point_scores(logits[kept], labels[kept]) == pytest.approx(by_sorting(logits[kept], labels[kept]), rel=1e-12)
    diverged = point_scores(torch.full((30, classes), torch.nan), torch.arange(30) % classes)
    assert set(diverged.values()) == {0.0}
    assert ranks(torch.zeros(4, 4), torch.arange(4)).tolist() == [0, 1, 2, 3]  # equal scores go to the lower class


def test_bootstrap_against_resampling_images_in_a_loop():
    logits, labels = scored()
    rng = np.random.default_rng(1)
    hit, hit5 = (ranks(logits, labels) == 0).numpy(), (ranks(logits, labels) < 5).numpy()
    drawn = {name: [] for name in METRICS}
    for _ in range(8000):
        index = rng.integers(len(labels), size=len(labels))
        label = labels.numpy()[index]
        drawn['top1'].append(hit[index].mean())
        drawn['top5'].append(hit5[index].mean())
        drawn['mean_per_class'].append(np.mean([hit[index][label == c].mean() for c in np.unique(label)]))
    scores = bootstrap_scores(logits, labels, resamples=20_000)
    widths = {}
    for name, values in drawn.items():
        low, high = 100 * np.percentile(values, [2.5, 97.5])
        widths[name] = high - low
        # One image is half a percent; the ends of 8,000 draws wander by about a twentieth of the width.
        assert scores[f'{name}_low'] == pytest.approx(low, abs=0.06 * widths[name]), name
        assert scores[f'{name}_high'] == pytest.approx(high, abs=0.06 * widths[name]), name
        assert scores[name] == pytest.approx(by_sorting(logits, labels)[name], rel=1e-12)
    assert widths['mean_per_class'] > 1.5 * widths['top1']  # so that the two can't be mistaken for each other


def test_bootstrap_repeats_with_its_seed_and_knows_rare_classes():
    logits, labels = scored()
    assert bootstrap_scores(logits, labels, seed=3) == bootstrap_scores(logits, labels, seed=3)
    assert bootstrap_scores(logits, labels, seed=3) != bootstrap_scores(logits, labels, seed=4)
    certain = bootstrap_scores(torch.eye(4), torch.arange(4))
    assert [certain[name] for name in ('top1', 'top1_low', 'top1_high')] == [100.0] * 3
    rare = bootstrap_scores(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 1]))  # classes often not drawn
    assert rare['mean_per_class'] == pytest.approx(100 * 2.5 / 3)
    assert all(np.isfinite(list(rare.values())))
