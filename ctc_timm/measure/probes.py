"""Probes: how much a simple classifier gets out of frozen features. Four methods behind one interface.

    for row in probe('ridge', LabeledFeatures(train_ND, labels_N), LabeledFeatures(test_MD, labels_M), num_classes=10):
        print(row['method'], row['top1'])

`ridge` and `logistic` choose their regularization on a fifth of the training set and are refitted on all of it. Only
the published protocol, `sgd-best`, chooses on the test set: its best epoch.

Letters: N training images, M test images, H held-out images, D feature size, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import logistic, ridge
from .features import LabeledFeatures
from .geometry import float64_device
from .knn import NEIGHBORS, neighbor_votes
from .scores import bootstrap_scores, point_scores, ranks
from .sgd import EPOCHS, train_head
from .transfer_sets import check_sets

METHODS = ('ridge', 'logistic', 'knn', 'sgd')
NEVER = -1
Device = torch.device | str


class Prediction(NamedTuple):
    """A probe's class scores of the test images."""

    method: str  # ridge, logistic, knn-1, knn-5, knn-20, sgd-last or sgd-best
    logits_MC: Tensor  # for knn the votes, on the device where they were computed
    # What was chosen: `strength` and `selection_accuracy` (percent, None when the training set was too small to hold
    # images out), `neighbors` (fewer when there are fewer training images), or `epoch`.
    settings: dict[str, float | int | None]


def probe(
    method: str, train: LabeledFeatures, test: LabeledFeatures, num_classes: int, seed: int = 0, device: Device = 'cpu'
) -> list[dict[str, Any]]:
    """Fit a probe, one of `METHODS`, on frozen features and score it on test images.

    Returns:
        Rows of plain values: method, top1, top1_low, top1_high, ... (see `bootstrap_scores`), and what was chosen. One
        row; three for `knn`, one a number of neighbors; two for `sgd`, the last and the best epoch.

    Raises:
        UserError: See `check_sets`.
        ValueError: An unknown method.
    """
    check_sets(train, test, num_classes)
    rows = []
    for p in predict(method, train, test, num_classes, hold_out(train.labels_N, seed), seed, device):
        scores = bootstrap_scores(p.logits_MC, test.labels_N.to(p.logits_MC.device), seed)
        rows.append({'method': p.method, **scores, **unpredicted(p), **p.settings})
    return rows


def unpredicted(prediction: Prediction) -> dict[str, None]:
    """The columns that a prediction has no numbers for: top-5 of a vote of fewer than five neighbors."""
    few = (prediction.settings.get('neighbors') or 5) < 5
    return dict.fromkeys(('top5', 'top5_low', 'top5_high')) if few else {}


def ridge_scores(train: LabeledFeatures, test: LabeledFeatures, num_classes: int) -> dict[str, float]:
    """Score `probe('ridge', ...)` on the CPU without intervals, cheap enough during training; see `point_scores`."""
    check_sets(train, test, num_classes)
    (prediction,) = predict('ridge', train, test, num_classes, hold_out(train.labels_N, 0))
    return point_scores(prediction.logits_MC, test.labels_N.to(prediction.logits_MC.device))


def predict(
    method: str,
    train: LabeledFeatures,
    test: LabeledFeatures,
    num_classes: int,
    fold_N: Tensor,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> list[Prediction]:
    """Fit a probe and predict, for sets that have been checked; see `probe`.

    The strength of `ridge` and `logistic` is that of the highest accuracy over the held-out images, the strongest if
    several; their `DEFAULT_STRENGTH` where no image is held out. `fold_N` is the fold in which each training image is
    held out, of `hold_out` or `cross_folds`.
    """
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}')
    device = torch.device(device) if method in ('knn', 'sgd') else float64_device(device)
    train, test, fold_N = train.to(device), test.to(device), fold_N.to(device)
    if method == 'knn':
        votes = neighbor_votes(train, test.features_ND, num_classes)
        return [Prediction(f'knn-{k}', v_MC, {'neighbors': min(k, len(train))}) for k, v_MC in zip(NEIGHBORS, votes)]
    if method == 'sgd':
        last_MC, best_MC, epoch = train_head(train, test, num_classes, seed)
        return [Prediction('sgd-last', last_MC, {'epoch': EPOCHS}), Prediction('sgd-best', best_MC, {'epoch': epoch})]
    weights_DC, bias_C, settings = fit_linear(method, train, num_classes, fold_N)
    return [Prediction(method, torch.addmm(bias_C, test.features_ND.double(), weights_DC), settings)]


def fit_linear(
    method: str, train: LabeledFeatures, num_classes: int, fold_N: Tensor
) -> tuple[Tensor, Tensor, dict[str, float | int | None]]:
    """Fit `ridge` or `logistic` as `predict` does: weights [D, C] and bias [C], float64, and what was chosen."""
    solver = ridge if method == 'ridge' else logistic
    strength, accuracy, hits = solver.DEFAULT_STRENGTH, None, [0] * len(solver.STRENGTHS)
    for fold in range(int(fold_N.max()) + 1):
        rest, held = train.select(fold_N != fold), train.select(fold_N == fold)
        for i, (weights_DC, bias_C) in enumerate(solver.solve(rest, num_classes, solver.STRENGTHS, exact=False)):
            logits_HC = torch.addmm(bias_C, held.features_ND.double(), weights_DC)
            hits[i] += int((ranks(logits_HC, held.labels_N) == 0).sum())
    if (fold_N != NEVER).any():
        strength, accuracy = solver.STRENGTHS[hits.index(max(hits))], 100 * max(hits) / int((fold_N != NEVER).sum())
    weights_DC, bias_C = next(solver.solve(train, num_classes, [strength]))
    return weights_DC, bias_C, {'strength': strength, 'selection_accuracy': accuracy}


def hold_out(labels_N: Tensor, seed: int) -> Tensor:
    """Draw a fifth of each class, rounded up: [N], 0 for these images and `NEVER` for the others."""
    return torch.where(cross_folds(labels_N, 5, seed) == 0, 0, NEVER)


def cross_folds(labels_N: Tensor, folds: int, seed: int) -> Tensor:
    """Deal the images of each class out over folds: [N], on the CPU; `NEVER` for the only image of a class.

    scikit-learn's `StratifiedKFold` would hold out a class's only image, and leave none to train on.
    """
    labels_N = labels_N.cpu()
    return torch.where(torch.bincount(labels_N)[labels_N] > 1, shuffled_places(labels_N, seed) % folds, NEVER)


def shuffled_places(labels_N: Tensor, seed: int) -> Tensor:
    """Shuffle the images of each class, and number them from 0 within it: [N], on the CPU."""
    labels_N = labels_N.cpu()
    shuffled_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    order_N = shuffled_N[labels_N[shuffled_N].argsort(stable=True)]  # class by class, random within each
    counts_C = torch.bincount(labels_N)
    place_N = torch.empty_like(labels_N)
    place_N[order_N] = torch.arange(len(labels_N)) - (counts_C.cumsum(0) - counts_C)[labels_N[order_N]]
    return place_N
