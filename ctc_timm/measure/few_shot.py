"""Probes fitted on a few images a class.

Letters: N training images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import torch
from scipy import stats
from torch import Tensor

from ..utils.errors import UserError
from .probes import predict, score_columns
from .scores import METRICS, Score, point_scores
from .selection import cross_folds
from .sets import Labeled, check_sets, class_label

_MOST_FOLDS = 5


@dataclass(frozen=True)
class FewShotResult:
    """A probe's scores over several draws of its training images.

    Attributes:
        method: As `probes.Prediction` has it.
        shots: Images a class.
        seeds: Number of draws.
        scores: For each of `scores.METRICS`, percent, the mean over the draws with its 95% interval by Student's t,
            which one draw doesn't have.
    """

    method: str
    shots: int
    seeds: int
    scores: dict[str, Score]

    def row(self) -> dict[str, str | float | int | None]:
        """Plain values for JSON and CSV: method, shots, seeds, top1, top1_low, top1_high, ..."""
        return {'method': self.method, 'shots': self.shots, 'seeds': self.seeds, **score_columns(self.scores)}


def few_shot(
    method: str,
    train: Labeled,
    test: Labeled,
    num_classes: int,
    shots: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = 'cpu',
    what: str = 'the target',
    class_names: Sequence[str] | None = None,
) -> Iterator[FewShotResult]:
    """Score probes on draws of a few training images a class, one number of shots after the other.

    The draws of a seed are the same for every method, and nested: its five shots hold its one shot. Ridge and logistic
    regression choose their strength by cross-validation within the drawn images, in as many folds as there are shots
    and at most five; a single shot leaves nothing to hold out, and `DEFAULT_STRENGTH` of `ridge` or `logistic` is
    taken.

    A generator: nothing is checked or computed before the first result is asked for, and every result found is handed
    out before a number of shots that can't be drawn is refused, so none is lost. `check_shots` refuses one beforehand.

        for result in few_shot('ridge', train, test, 10, shots=[1, 5, 10, 25], seeds=range(5)):
            print(result.row())

    Args:
        method: One of `probes.METHODS`.
        train: What to draw from.
        test: What to score on, all of it each time.
        num_classes: C.
        shots: Images a class.
        seeds: One draw each, also the seed of the folds and of the SGD head.
        device: See `probes.probe`.
        what: Name of the data set, for messages.
        class_names: Name of each class, for messages.

    Yields:
        For each number of shots the results of the method's probes, three for `knn` and two for `sgd`.

    Raises:
        UserError: See `check_sets` and `check_shots`; no seeds.
        ValueError: An unknown method.
    """
    check_sets(train, test, num_classes, what, class_names)
    if not len(seeds):
        raise UserError('--seeds must be at least 1')
    for count in shots:
        check_shots(train, [count], what, class_names)
        found: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            drawn = train.take(draw_shots(train.labels_N, count, seed).to(train.labels_N.device))
            fold_N = cross_folds(drawn.labels_N, min(count, _MOST_FOLDS), seed)
            for prediction in predict(method, drawn, test, num_classes, fold_N, seed, device):
                labels_M = test.labels_N.to(prediction.logits_MC.device)
                found.setdefault(prediction.method, []).append(point_scores(prediction.logits_MC, labels_M))
        for name, draws in found.items():
            scores = {metric: mean_score([draw[metric] for draw in draws]) for metric in METRICS}
            yield FewShotResult(name, count, len(draws), scores)


def check_shots(
    train: Labeled, shots: Sequence[int], what: str = 'the target', class_names: Sequence[str] | None = None
) -> None:
    """Refuse numbers of shots that some class can't give.

    Args:
        train: What will be drawn from.
        shots: Images a class.
        what: Name of the data set.
        class_names: Name of each class.

    Raises:
        UserError: A number below one, or above a class's number of training images.
    """
    present_P, count_P = train.labels_N.unique(return_counts=True)
    fewest = int(count_P.argmin())
    for count in shots:
        if count < 1:
            raise UserError(f'--shots must be at least 1, got {count}')
        if count > count_P[fewest]:
            label = class_label(int(present_P[fewest]), class_names)
            most = int(count_P[fewest])
            raise UserError(f'{what}: --shots {count} is more than the {most} training images of {label}')


def draw_shots(labels_N: Tensor, shots: int, seed: int) -> Tensor:
    """Positions of `shots` images of each class, drawn without replacement.

    Args:
        labels_N: [N]. Every class has as many images.
        shots: How many of each class.
        seed: Of the draw.

    Returns:
        [classes * shots], in ascending order, on the CPU.
    """
    # Where an image comes in its class, when the images of each class are shuffled: one fold each.
    place_N = cross_folds(labels_N, len(labels_N), seed)
    return (place_N < shots).nonzero()[:, 0]


def mean_score(values: Sequence[float]) -> Score:
    """Mean with its 95% interval by Student's t; no interval for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return Score(mean, None, None)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return Score(mean, mean - half, mean + half)
