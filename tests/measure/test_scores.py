"""Scores and their intervals against loops over images."""

import numpy as np
import pytest
import torch

from ctc_timm.measure.scores import METRICS, Score, bootstrap_scores, point_scores, ranks


def images(count=200, classes=8, seed=0, skew=1.0):
    """Logits with ties, and classes of very different sizes: the last ones have a few images or one."""
    rng = np.random.default_rng(seed)
    share = np.exp(-skew * np.arange(classes))
    labels = np.concatenate([np.arange(classes), rng.choice(classes, count - classes, p=share / share.sum())])
    logits = rng.integers(0, 6, (count, classes)) + 2.0 * np.eye(classes)[labels]
    return torch.tensor(logits), torch.tensor(labels)


def by_loop(logits, labels):
    """The scores, one image at a time."""
    hits, hits5, per_class = 0, 0, {}
    for row, label in zip(logits.tolist(), labels.tolist()):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        hits += order[0] == label
        hits5 += label in order[:5]
        per_class.setdefault(label, []).append(order[0] == label)
    mean = sum(sum(h) / len(h) for h in per_class.values()) / len(per_class)
    return {'top1': 100 * hits / len(labels), 'top5': 100 * hits5 / len(labels), 'mean_per_class': 100 * mean}


@pytest.mark.parametrize('classes', [2, 5, 8])
def test_scores_against_a_loop(classes):
    logits, labels = images(classes=classes)
    assert point_scores(logits, labels) == pytest.approx(by_loop(logits, labels), rel=1e-12)
    # A class of which there is no image: it can be predicted, and is no part of the mean.
    kept = labels != 1
    assert point_scores(logits[kept], labels[kept]) == pytest.approx(by_loop(logits[kept], labels[kept]), rel=1e-12)


def test_equal_scores_go_to_the_lower_class():
    assert ranks(torch.zeros(4, 4), torch.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize('classes', [3, 12])
def test_a_diverged_probe_scores_nothing(classes):
    labels = torch.arange(30) % classes
    assert set(point_scores(torch.full((30, classes), torch.nan), labels).values()) == {0.0}


def test_bootstrap_against_resampling_images_in_a_loop():
    logits, labels = images()
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
        assert scores[name].low == pytest.approx(low, abs=0.06 * widths[name]), name
        assert scores[name].high == pytest.approx(high, abs=0.06 * widths[name]), name
        assert scores[name].value == pytest.approx(by_loop(logits, labels)[name], rel=1e-12)
    assert widths['mean_per_class'] > 1.5 * widths['top1']  # so that the two can't be mistaken for each other


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    truth = np.array([0.5, 0.7, 0.9])
    trials, covered = 600, {'top1': 0, 'mean_per_class': 0}
    for trial in range(trials):
        labels = torch.arange(240) % 3
        right = torch.tensor(rng.random(240) < truth[labels])
        logits = torch.eye(3)[torch.where(right, labels, (labels + 1) % 3)]
        scores = bootstrap_scores(logits, labels, seed=trial)
        for name in covered:
            covered[name] += scores[name].low <= 70 <= scores[name].high
    for name, count in covered.items():
        assert 0.92 < count / trials < 0.98, (name, count)


def test_a_class_missing_from_resamples_gives_no_nan():
    logits = torch.eye(3)[[0, 1, 2, 0]]
    labels = torch.tensor([0, 1, 2, 1])  # one image each of classes 0 and 2, often not drawn
    scores = bootstrap_scores(logits, labels)
    assert scores['mean_per_class'].value == pytest.approx(100 * 2.5 / 3)
    assert all(np.isfinite(score).all() for score in scores.values())


def test_bootstrap_repeats_with_its_seed_and_is_a_point_where_nothing_varies():
    logits, labels = images()
    assert bootstrap_scores(logits, labels, seed=3) == bootstrap_scores(logits, labels, seed=3)
    assert bootstrap_scores(logits, labels, seed=3) != bootstrap_scores(logits, labels, seed=4)
    assert bootstrap_scores(torch.eye(4), torch.arange(4))['top1'] == Score(100.0, 100.0, 100.0)
