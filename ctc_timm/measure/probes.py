"""Probes: how much a simple classifier gets out of frozen features. Four methods behind one interface.

`ridge` and `logistic` choose their regularisation on a fifth of the training set and are refitted on all of it; `knn`
and `sgd` have nothing to choose, except that the published protocol, `sgd-best`, takes the best epoch on the test set.

Letters: N images, M test images, D feature size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import logistic, ridge
from .knn import NEIGHBORS, neighbor_votes
from .scores import Score, bootstrap_scores, point_scores
from .selection import fit, one_split
from .sets import Labeled, check_sets, with_float64
from .sgd import train_head

METHODS = ('ridge', 'logistic', 'knn', 'sgd')


@dataclass(frozen=True)
class Prediction:
    """What one probe says about the test images.

    Attributes:
        method: `ridge`, `logistic`, `knn-1`, `knn-5`, `knn-20`, `sgd-last` or `sgd-best`.
        logits_MC: Class scores, for `knn` the votes, [M, C], where they were computed.
        settings: What was chosen: `strength` and `selection_accuracy` (percent, None when the training set was too
            small to hold images out), `neighbors` (fewer than asked for when there are fewer training images), or
            `epoch`.
        curve: For `sgd`, test top-1 after each epoch, percent.
    """

    method: str
    logits_MC: Tensor
    settings: dict[str, float | int | None]
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class ProbeResult(Prediction):
    """A prediction with its scores.

    Attributes:
        scores: For each of `scores.METRICS`, percent with the 95% bootstrap interval over test images.
    """

    scores: dict[str, Score] = field(default_factory=dict)

    def row(self) -> dict[str, str | float | int | None]:
        """Plain values for JSON and CSV: method, top1, top1_low, top1_high, ..., and the settings."""
        return {'method': self.method, **score_columns(self.scores), **self.settings}


def score_columns(scores: dict[str, Score]) -> dict[str, float | None]:
    """Scores as flat columns: name, name_low and name_high of each."""
    return {name + end: value for name, score in scores.items() for end, value in zip(('', '_low', '_high'), score)}


def probe(
    method: str,
    train: Labeled,
    test: Labeled,
    num_classes: int,
    seed: int = 0,
    device: torch.device | str = 'cpu',
    what: str = 'the target',
    class_names: Sequence[str] | None = None,
) -> list[ProbeResult]:
    """Fit a probe on frozen features and score it on test images.

        for result in probe('ridge', Labeled(train_ND, labels_N), Labeled(test_MD, labels_M), num_classes=10):
            print(result.row())

    Args:
        method: One of `METHODS`.
        train: Features and labels to fit on.
        test: Features and labels to score on; no setting is chosen on them but the epoch of `sgd-best`.
        num_classes: C.
        seed: Of the training split, the SGD head and the bootstrap.
        device: Where to compute. Ridge and logistic regression need float64 and take the CPU in place of a device
            without it.
        what: Name of the data set, for messages.
        class_names: Name of each class, for messages.

    Returns:
        One result; three for `knn`, one a number of neighbors; two for `sgd`, the last and the best epoch.

    Raises:
        UserError: See `check_sets`.
        ValueError: An unknown method.
    """
    check_sets(train, test, num_classes, what, class_names)
    return [
        ProbeResult(
            **vars(found), scores=bootstrap_scores(found.logits_MC, test.labels_N.to(found.logits_MC.device), seed)
        )
        for found in predict(method, train, test, num_classes, one_split(train.labels_N, seed), seed, device)
    ]


def ridge_scores(
    train: Labeled, test: Labeled, num_classes: int, seed: int = 0, device: torch.device | str = 'cpu'
) -> dict[str, float]:
    """The ridge probe's top-1, top-5 and mean per-class accuracy without intervals, cheap enough during training.

    Args:
        train: Features and labels to fit on.
        test: Features and labels to score on.
        num_classes: C.
        seed: Of the training split.
        device: See `probe`.

    Returns:
        For each of `scores.METRICS`, percent, the same as `probe('ridge', ...)` gives.

    Raises:
        UserError: See `check_sets`.
    """
    check_sets(train, test, num_classes, 'the target')
    (found,) = predict('ridge', train, test, num_classes, one_split(train.labels_N, seed), seed, device)
    return point_scores(found.logits_MC, test.labels_N.to(found.logits_MC.device))


def predict(
    method: str,
    train: Labeled,
    test: Labeled,
    num_classes: int,
    fold_N: Tensor,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> list[Prediction]:
    """A probe's predictions for sets that have been checked.

    Args:
        method: One of `METHODS`.
        train: Features and labels to fit on.
        test: Features and labels to predict.
        num_classes: C.
        fold_N: Training images to hold out while a strength is chosen, from `selection`.
        seed: Of the SGD head.
        device: See `probe`.

    Raises:
        ValueError: An unknown method.
    """
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}')
    device = torch.device(device) if method in ('knn', 'sgd') else with_float64(device)
    train, test = train.to(device), test.to(device)
    if method == 'knn':
        votes = neighbor_votes(train, test.features_ND, num_classes)
        return [
            Prediction(f'knn-{k}', votes_MC, {'neighbors': min(k, len(train))}) for k, votes_MC in zip(NEIGHBORS, votes)
        ]
    if method == 'sgd':
        run = train_head(train, test, num_classes, seed)
        return [
            Prediction('sgd-last', run.last_MC, {'epoch': len(run.curve)}, run.curve),
            Prediction('sgd-best', run.best_MC, {'epoch': run.best_epoch}, run.curve),
        ]
    solver = ridge if method == 'ridge' else logistic
    linear = fit(solver.solve, train, num_classes, fold_N, solver.STRENGTHS, solver.DEFAULT_STRENGTH)
    settings = {'strength': linear.strength, 'selection_accuracy': linear.selection_accuracy}
    return [Prediction(method, linear.logits(test.features_ND), settings)]
