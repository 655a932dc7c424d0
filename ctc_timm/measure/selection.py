"""Choosing a regularisation strength on held-out training images, never on the test set.

Letters: N training images, M other images, D feature size, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .scores import ranks
from .sets import Labeled

NEVER = -1


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of frozen features.

    Attributes:
        weights_DC: float64, [D, C].
        bias_C: float64, [C].
        strength: Of the regularisation, in the solver's own scale-free unit.
        selection_accuracy: Percent of the held-out training images; None when none were held out.
    """

    weights_DC: Tensor
    bias_C: Tensor
    strength: float
    selection_accuracy: float | None

    def logits(self, features_MD: Tensor) -> Tensor:
        """Class scores, [M, C], float64."""
        return _logits(features_MD, self.weights_DC, self.bias_C)


class PathSolver(Protocol):
    """Linear classifiers along a path of strengths, given and solved in that order."""

    def __call__(
        self, train: Labeled, num_classes: int, strengths: Sequence[float], exact: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights [D, C] and bias [C] for each strength; `exact` or just well enough to rank strengths."""
        ...


def one_split(labels_N: Tensor, seed: int) -> Tensor:
    """Hold out a fifth of each class, rounded up, once.

    Args:
        labels_N: [N].
        seed: Of the draw.

    Returns:
        [N], 0 for the images held out and `NEVER` for the others. A class of one image is never held out.
    """
    return torch.where(cross_folds(labels_N, 5, seed) == 0, 0, NEVER)


def cross_folds(labels_N: Tensor, folds: int, seed: int) -> Tensor:
    """Deal the images of each class out over folds, in random order.

    Args:
        labels_N: [N].
        folds: How many.
        seed: Of the draw.

    Returns:
        The fold in which each image is held out, [N], on the CPU; `NEVER` for a class of one image.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N = labels_N.cpu()
    shuffled_N = torch.randperm(len(labels_N), generator=generator)
    order_N = shuffled_N[labels_N[shuffled_N].argsort(stable=True)]  # class by class, random within each
    size_C = torch.bincount(labels_N)
    start_C = size_C.cumsum(0) - size_C
    place_N = torch.arange(len(labels_N)) - start_C[labels_N[order_N]]
    fold_N = torch.empty_like(labels_N)
    fold_N[order_N] = place_N % folds
    return torch.where(size_C[labels_N] > 1, fold_N, NEVER)


def fit(
    solve: PathSolver,
    train: Labeled,
    num_classes: int,
    fold_N: Tensor,
    strengths: Sequence[float],
    default: float,
) -> LinearProbe:
    """The strength of the highest accuracy over the held-out images, the strongest if several; refitted on all.

    Args:
        solve: The solver.
        train: The whole training set.
        num_classes: C.
        fold_N: From `one_split` or `cross_folds`. With no image held out the default strength is taken.
        strengths: What to choose from, the strongest first.
        default: A strength.
    """
    fold_N = fold_N.to(train.labels_N.device)
    held_out = int((fold_N != NEVER).sum())
    strength, accuracy = default, None
    if held_out:
        hits = [0] * len(strengths)
        for fold in range(int(fold_N.max()) + 1):
            rest, held = train.take(fold_N != fold), train.take(fold_N == fold)
            for i, (weights_DC, bias_C) in enumerate(solve(rest, num_classes, strengths, exact=False)):
                rank_M = ranks(_logits(held.features_ND, weights_DC, bias_C), held.labels_N)
                hits[i] += int((rank_M == 0).sum())
        strength, accuracy = strengths[hits.index(max(hits))], 100 * max(hits) / held_out
    weights_DC, bias_C = next(solve(train, num_classes, [strength], exact=True))
    return LinearProbe(weights_DC, bias_C, strength, accuracy)


def _logits(features_MD: Tensor, weights_DC: Tensor, bias_C: Tensor) -> Tensor:
    return torch.addmm(bias_C, features_MD.double(), weights_DC)
