"""Estimators of the mutual information I(X;T) and I(T;Y), by name.

    estimator = create_estimator('renyi')
    estimate = estimator.estimate(images_N3HW, features_ND)      # I(X;T)
    estimate = estimator.estimate(features_ND, labels_N)         # I(T;Y)
    estimate.nats, estimate.standard_error, estimate.curve

Which one to trust where: docs/information.md. Letters: N images, D coordinates.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError, nearest
from .neural import MINE_PRESETS, Estimate, InfoNCE, Mine, Progress, Smile, Values, labels_of, paired

NEIGHBORS = 10


@dataclass(frozen=True)
class Renyi:
    """Matrix-based Renyi mutual information (Sanchez Giraldo et al., arXiv 1211.2459; Yu et al., arXiv 1808.07912).

        A = K / trace(K),  K_ij = exp(-|x_i - x_j|^2 / (2 width^2));  B likewise from t
        S(A) = log(sum of eigenvalues of A to the alpha) / (1 - alpha)
        I = S(A) + S(B) - S(A o B / trace(A o B)),  o entry by entry

    The width is the mean distance of an image to its 10 nearest others. Labels have the equality kernel, for which S is
    the entropy of the class shares. The value lies between 0 and log N and depends on N and the widths: compare it
    between checkpoints on the same images, do not read it as Shannon's information. The standard error is the grouped
    jackknife's, sqrt((G - 1) / G * sum (value - mean)^2) with G random groups, each left out in turn. Disjoint parts
    would claim less: small samples resolve less structure, so their values vary less.
    """

    seed: int = 0  # of all random draws
    device: str | torch.device = 'cpu'
    alpha: float = 1.01  # order of the entropy; near 1 it is close to Shannon's
    # Subtract the mean value with t shuffled this many times: in high dimension independent variables show a value
    # well above zero. 0 is the published definition.
    shuffles: int = 0
    max_images: int = 2000  # a random subset of this size is drawn: the cost grows with the cube
    groups: int = 4  # left out in turn for the standard error; 0 or 1 for an infinite error

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T), see `InfoNCE`; without a curve and without progress."""
        rng = np.random.default_rng(self.seed)
        device = 'cpu' if torch.device(self.device).type == 'mps' else self.device  # Apple's has no float64
        # Rounding noise in the eigenvalues comes out times 1 / (1 - alpha): single precision is too coarse.
        x, t = (v.to(device) if v.ndim == 1 else v.to(device).double() for v in paired(x, t))
        if len(x) > self.max_images:
            subset = torch.from_numpy(rng.permutation(len(x))[: self.max_images]).to(device)
            x, t = x[subset], t[subset]
        first, second = _Variable.of(x), _Variable.of(t)
        values = [self._value(first, second, rng)]
        group_N = rng.permutation(len(x)) % max(1, self.groups)
        for group in range(self.groups):
            rows = torch.from_numpy(np.flatnonzero(group_N != group)).to(device)
            values.append(self._value(first.select(rows), second.select(rows), rng))
        return Estimate(values[0], math.sqrt((self.groups - 1) * np.var(values[1:])) if self.groups > 1 else math.inf)

    def _value(self, first: _Variable, second: _Variable, rng: np.random.Generator) -> float:
        marginal = _entropy(first.spectrum(), self.alpha) + _entropy(second.spectrum(), self.alpha)
        value = marginal - _entropy(first.joint_spectrum(second), self.alpha)
        for _ in range(self.shuffles):
            shuffled = second.select(torch.from_numpy(rng.permutation(len(second.gram_NN))))
            value -= (marginal - _entropy(first.joint_spectrum(shuffled), self.alpha)) / self.shuffles
        return value


class _Variable:
    """One of x and t with its Gram matrix: of labels [N] one for equal labels and zero else, or of distances [N, N]."""

    def __init__(self, labels_N: Tensor | None, squared_NN: Tensor) -> None:
        self.labels_N, self.squared_NN = labels_N, squared_NN  # of labels the Gram matrix
        self.gram_NN = _gaussian_kernel(squared_NN) if labels_N is None else squared_NN

    @classmethod
    def of(cls, values: Tensor) -> _Variable:
        labels_N = labels_of(values)
        if labels_N is None:
            return cls(None, _squared_distances(values))
        return cls(labels_N, (labels_N[:, None] == labels_N).double())

    def select(self, rows: Tensor) -> _Variable:
        """Return some of the images, or all in another order; the width is that of their distances."""
        return _Variable(None if self.labels_N is None else self.labels_N[rows], self.squared_NN[rows][:, rows])

    def spectrum(self) -> Tensor:
        if self.labels_N is not None:  # the equality kernel's eigenvalues are the sizes of the classes
            return self.labels_N.bincount().double()
        return torch.linalg.eigvalsh(self.gram_NN)

    def joint_spectrum(self, other: _Variable) -> Tensor:
        """Compute the eigenvalues of the product, entry by entry, of both Gram matrices."""
        if self.labels_N is None:
            if other.labels_N is not None:
                return other.joint_spectrum(self)
            return torch.linalg.eigvalsh(self.gram_NN * other.gram_NN)
        # A product with an equality kernel falls into one block a class.
        blocks = (torch.nonzero(self.labels_N == c).flatten() for c in self.labels_N.unique())
        return torch.cat([torch.linalg.eigvalsh(other.gram_NN[rows][:, rows]) for rows in blocks])


def _squared_distances(values_ND: Tensor) -> Tensor:
    """Compute the squared Euclidean distances of all rows, [N, N]; exactly zero for equal rows."""
    centered_ND = values_ND - values_ND.mean(dim=0)
    square_N = centered_ND.square().sum(dim=1)
    squared_NN = square_N[:, None] + square_N - 2 * centered_ND @ centered_ND.T
    # Equal rows come out as rounding noise of either sign.
    return squared_NN.masked_fill(squared_NN <= 1e-12 * square_N.max(), 0.0).fill_diagonal_(0.0)


def _gaussian_kernel(squared_NN: Tensor) -> Tensor:
    """Compute exp(-distance^2 / (2 width^2)), [N, N]; at width zero its limit, one for equal rows and zero else."""
    nearest_NK = squared_NN.topk(min(NEIGHBORS + 1, len(squared_NN)), dim=1, largest=False).values[:, 1:]
    width = float(nearest_NK.sqrt().mean())
    return (squared_NN / (-2 * width**2)).exp() if width else (squared_NN == 0).to(squared_NN.dtype)


def _entropy(spectrum: Tensor, alpha: float) -> float:
    """Compute log(sum p^alpha) / (1 - alpha) of eigenvalues made to sum to one; Shannon's at alpha = 1. In nats."""
    shares = spectrum.clamp_min(0)
    shares = shares / shares.sum()
    if alpha == 1:
        return -float(torch.xlogy(shares, shares).sum())
    return float(shares.pow(alpha).sum().log()) / (1 - alpha)


Estimator = InfoNCE | Renyi
ESTIMATORS: dict[str, Estimator] = {'mine': Mine(), 'infonce': InfoNCE(), 'smile': Smile(), 'renyi': Renyi()}


def create_estimator(name: str, preset: str = 'small', **options: Any) -> Estimator:
    """Create an estimator of mutual information.

    Args:
        name: One of `ESTIMATORS`.
        preset: One of `MINE_PRESETS`, for 'mine'.
        **options: Fields of `neural.InfoNCE` or `Renyi` to change. All take `seed` and `device`.

    Raises:
        UserError: An unknown name, preset or option.
    """
    for what, value, known in (('estimator', name, ESTIMATORS), ('preset', preset, MINE_PRESETS)):
        if value not in known:
            near = nearest(value, known) or f'; there are {", ".join(known)}'
            raise UserError(f'there is no {what} {value!r}{near}')
    start = MINE_PRESETS[preset] if name == 'mine' else ESTIMATORS[name]
    fields = [field.name for field in dataclasses.fields(start)]
    for option in options:
        if option not in fields:
            raise UserError(f'estimator {name!r} has no option {option!r}{nearest(option, fields)}')
    return dataclasses.replace(start, **options)
