"""Probes fitted on a few images a class. Letters: N training images, C classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError
from .features import LabeledFeatures
from .probes import cross_folds, predict, shuffled_places, unpredicted
from .scores import mean_scores, point_scores
from .transfer_sets import check_sets


def few_shot(
    method: str,
    train: LabeledFeatures,
    test: LabeledFeatures,
    num_classes: int,
    shots: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = 'cpu',
) -> Iterator[dict[str, Any]]:
    """Score probes on draws of a few training images a class, one number of shots after the other; see `probe`.

    The draws of a seed are the same for every method, and nested: its five shots hold its one shot. Ridge and logistic
    regression choose their strength by cross-validation within the drawn images, in as many folds as there are shots
    and at most five; a single shot leaves nothing to hold out.

    Each of `seeds` is a draw, also the seed of the folds and of the SGD head. Yields for each of `shots` a row a probe:
    method, shots, seeds, and the mean over the draws, see `mean_scores`. A UserError: see `check_sets`; a number of
    shots that some class doesn't have, after the rows of those before it.
    """
    check_sets(train, test, num_classes)
    class_P, count_P = train.labels_N.unique(return_counts=True)
    fewest, images = class_P[count_P.argmin()], count_P.min()
    for count in shots:
        if count > images:
            raise UserError(
                f'`shots` {count} is more than every class has: class {fewest} has {images} training images'
            )
        found: dict[str, list[dict[str, float | None]]] = {}
        for seed in seeds:
            drawn = train.select(sample_shots(train.labels_N, count, seed).to(train.labels_N.device))
            fold_N = cross_folds(drawn.labels_N, min(count, 5), seed)
            for prediction in predict(method, drawn, test, num_classes, fold_N, seed, device):
                scores = point_scores(prediction.logits_MC, test.labels_N.to(prediction.logits_MC.device))
                found.setdefault(prediction.method, []).append({**scores, **unpredicted(prediction)})
        for name, draws in found.items():
            yield {'method': name, 'shots': count, 'seeds': len(draws), **mean_scores(draws)}


def sample_shots(labels_N: Tensor, shots: int, seed: int) -> Tensor:
    """Draw `shots` images of each class: their positions in ascending order, [classes * shots], on the CPU."""
    return (shuffled_places(labels_N, seed) < shots).nonzero()[:, 0]
