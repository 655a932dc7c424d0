"""Mean intersection over union and pixel accuracy against loops over pixels, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from ctc_timm.dense.mask_metrics import confusion, scores


def drawn(seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (3, 9, 7), generator=generator, dtype=torch.uint8)
    predicted = torch.randint(classes, (3, 9, 7), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    return predicted, truth


@pytest.mark.parametrize('seed', range(3))
def test_a_loop_over_pixels_and_scikit_learn_agree(seed: int) -> None:
    """With ignored pixels, and images added up before anything is divided."""
    predicted, truth = drawn(seed, 5)
    matrix = sum((confusion(p, t, 5) for p, t in zip(predicted, truth)), torch.zeros(5, 5, dtype=torch.int64))
    inter, union, right, counted = [0] * 5, [0] * 5, 0, 0
    for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist()):
        if t == 255:
            continue
        counted, right = counted + 1, right + (p == t)
        for k in range(5):
            inter[k] += p == k and t == k
            union[k] += p == k or t == k
    found = scores(matrix, 'abcde')
    assert found['pixel_accuracy'] == pytest.approx(right / counted, abs=1e-12)
    assert [found[f'iou/{k}'] for k in 'abcde'] == pytest.approx([i / u for i, u in zip(inter, union)], abs=1e-12)
    assert found['miou'] == pytest.approx(np.mean([i / u for i, u in zip(inter, union)]), abs=1e-12)
    kept = (truth != 255).numpy()
    t, p = truth.numpy()[kept], predicted.numpy()[kept]
    assert np.array_equal(matrix.numpy(), confusion_matrix(t, p))
    assert found['miou'] == pytest.approx(jaccard_score(t, p, average='macro'))
    assert found['mean_accuracy'] == pytest.approx(balanced_accuracy_score(t, p))


def test_closed_forms() -> None:
    """Two squares of side n that overlap by half: a third; a perfect mask: one; swapped classes: zero."""
    truth = torch.zeros(20, 20, dtype=torch.uint8)
    said = torch.zeros(20, 20, dtype=torch.uint8)
    truth[4:14, 0:10], said[4:14, 5:15] = 1, 1
    found = scores(confusion(said, truth, 2), ['ground', 'square'])
    assert found['iou/square'] == pytest.approx(50 / 150)
    assert found['iou/ground'] == pytest.approx(250 / 350)
    assert found['pixel_accuracy'] == pytest.approx(300 / 400)
    assert scores(confusion(truth, truth, 2)) == {'miou': 1, 'pixel_accuracy': 1, 'mean_accuracy': 1}
    assert scores(confusion(1 - truth, truth, 2)) == {'miou': 0, 'pixel_accuracy': 0, 'mean_accuracy': 0}


def test_absent_classes() -> None:
    """A class that is nowhere has no part in the mean; one that is only predicted counts as 0 in it."""
    truth, said = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    found = scores(confusion(said, truth, 4), ['a', 'b', 'c', 'd'])
    assert found['miou'] == pytest.approx((1 + 0.5 + 0) / 3) and 'iou/d' not in found
    assert found['mean_accuracy'] == pytest.approx((1 + 0.5) / 2)
    nothing = confusion(said, torch.full((4,), 255), 4)
    assert nothing.sum() == 0
