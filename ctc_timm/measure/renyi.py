"""Matrix-based Renyi entropy: information from the eigenvalues of Gram matrices, with nothing to train.

Letters: N images, D coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from .estimates import MIN_IMAGES, SMALLEST, Estimate, Estimator, Progress, Values, labels_of, paired

NEIGHBORS = 10


@dataclass(frozen=True)
class Renyi(Estimator):
    """Matrix-based Renyi mutual information (Sanchez Giraldo et al., arXiv 1211.2459; Yu et al., arXiv 1808.07912).

        A = K / trace(K),  K_ij = exp(-|x_i - x_j|^2 / (2 width^2));  B likewise from t
        S(A) = log(sum of eigenvalues of A to the alpha) / (1 - alpha)
        I = S(A) + S(B) - S(A o B / trace(A o B)),  o entry by entry

    The width is the mean distance of an image to its 10 nearest others. Labels [N] and one-hot rows [N, C] have the
    equality kernel, for which S is the entropy of the class shares. The value lies between 0 and log N and depends on
    N and the widths: compare it between checkpoints on the same images, do not read it as Shannon's information. The
    standard error is the grouped jackknife's: with G random groups, each left out in turn,
    sqrt((G - 1) / G * sum (value - mean)^2). Disjoint parts would claim less: small samples resolve less structure, so
    their values vary less.

    Attributes:
        alpha: Order of the entropy; near 1 it is close to Shannon's.
        shuffles: Subtract the mean value with t shuffled this many times, each at the cost of one more spectrum: in
            high dimension independent variables show a value well above zero. 0 is the published definition.
        max_images: A random subset of this size is drawn from more images: the cost grows with the cube.
        groups: Random groups of images, each left out in turn for the standard error; 0 for an infinite error.
        device: Apple's has no float64, there the CPU is used.
    """

    alpha: float = 1.01
    shuffles: int = 0
    max_images: int = 2000
    groups: int = 4
    limits: ClassVar[dict[str, tuple[float, float]]] = {
        'alpha': (SMALLEST, 1e6),
        'shuffles': (0, 1e6),
        'max_images': (MIN_IMAGES, 1e6),
        'groups': (0, 1e6),
    }

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T), see `Estimator.estimate`; the curve is empty."""
        if self.groups == 1:
            raise UserError('groups must be 0 or at least 2, got 1')
        rng = np.random.default_rng(self.seed)
        x, t = (self._on_device(values) for values in paired(x, t))
        if len(x) > self.max_images:
            subset = torch.from_numpy(rng.permutation(len(x))[: self.max_images]).to(x.device)
            x, t = x[subset], t[subset]
        first, second = _Variable.of(x), _Variable.of(t)
        nats = self._value(first, second, rng)
        group_N = rng.permutation(len(x)) % max(1, self.groups)
        left_out = []
        for group in range(self.groups):
            if progress:
                progress(1 + group, 1 + self.groups)
            rows = torch.from_numpy(np.flatnonzero(group_N != group)).to(x.device)
            left_out.append(self._value(first.select(rows), second.select(rows), rng))
        if progress:
            progress(1 + self.groups, 1 + self.groups)
        return Estimate(nats, math.sqrt((self.groups - 1) * np.var(left_out)) if left_out else math.inf)

    def _on_device(self, values: Tensor) -> Tensor:
        device = torch.device(self.device)
        values = values.to('cpu' if device.type == 'mps' else device)
        # Rounding noise in the eigenvalues comes out times 1 / (1 - alpha): single precision is too coarse.
        return values if values.ndim == 1 else values.double()

    def _value(self, first: _Variable, second: _Variable, rng: np.random.Generator) -> float:
        marginal = _entropy(first.spectrum(), self.alpha) + _entropy(second.spectrum(), self.alpha)
        value = marginal - _entropy(first.joint_spectrum(second), self.alpha)
        for _ in range(self.shuffles):
            shuffled = second.select(torch.from_numpy(rng.permutation(second.images)))
            value -= (marginal - _entropy(first.joint_spectrum(shuffled), self.alpha)) / self.shuffles
        return value


class _Variable:
    """One of x and t: labels [N], whose kernel is one for equal labels and zero else, or distances [N, N]."""

    def __init__(self, labels_N: Tensor | None, squared_NN: Tensor) -> None:
        self.labels_N = labels_N
        self.squared_NN = squared_NN  # empty where there are labels
        self.gram_NN = squared_NN if labels_N is not None else _gaussian_kernel(squared_NN)
        self.images = len(squared_NN if labels_N is None else labels_N)

    @classmethod
    def of(cls, values: Tensor) -> _Variable:
        labels_N = labels_of(values)
        return cls(labels_N, _squared_distances(values) if labels_N is None else torch.empty(0, 0))

    def select(self, rows: Tensor) -> _Variable:
        """Return some of the images, or all in another order; the width is that of their distances."""
        if self.labels_N is not None:
            return _Variable(self.labels_N[rows], self.squared_NN)
        return _Variable(None, self.squared_NN[rows][:, rows])

    def spectrum(self) -> Tensor:
        if self.labels_N is not None:  # the equality kernel's eigenvalues are the sizes of the classes
            return self.labels_N.bincount().double()
        return torch.linalg.eigvalsh(self.gram_NN)

    def joint_spectrum(self, other: _Variable) -> Tensor:
        """Compute the eigenvalues of the product, entry by entry, of both Gram matrices."""
        if self.labels_N is None and other.labels_N is None:
            return torch.linalg.eigvalsh(self.gram_NN * other.gram_NN)
        if self.labels_N is None:
            return other.joint_spectrum(self)
        # A product with an equality kernel falls into one block a class.
        classes = [torch.nonzero(self.labels_N == c).flatten() for c in self.labels_N.unique()]
        if other.labels_N is not None:
            return torch.cat([other.labels_N[rows].bincount().double() for rows in classes])
        return torch.cat([torch.linalg.eigvalsh(other.gram_NN[rows][:, rows]) for rows in classes])


def _squared_distances(values_ND: Tensor) -> Tensor:
    """Compute the squared Euclidean distances of all rows, [N, N]; exactly zero for equal rows."""
    centered_ND = values_ND - values_ND.mean(dim=0)
    square_N = centered_ND.square().sum(dim=1)
    squared_NN = square_N[:, None] + square_N - 2 * centered_ND @ centered_ND.T
    # Equal rows come out as rounding noise of either sign.
    return squared_NN.masked_fill(squared_NN <= 1e-12 * square_N.max(), 0.0).fill_diagonal_(0.0)


def _gaussian_kernel(squared_NN: Tensor) -> Tensor:
    """Compute exp(-distance^2 / (2 width^2)), [N, N]; at width zero its limit, one for equal rows and zero else."""
    nearest = squared_NN.topk(min(NEIGHBORS + 1, len(squared_NN)), dim=1, largest=False).values[:, 1:]
    width = float(nearest.sqrt().mean())
    return (squared_NN / (-2 * width**2)).exp() if width else (squared_NN == 0).to(squared_NN.dtype)


def _entropy(spectrum: Tensor, alpha: float) -> float:
    """Compute log(sum p^alpha) / (1 - alpha) of eigenvalues made to sum to one; Shannon's at alpha = 1. In nats."""
    shares = spectrum.clamp_min(0)
    shares = shares / shares.sum()
    if alpha == 1:
        return -float(torch.xlogy(shares, shares).sum())
    return float(shares.pow(alpha).sum().log()) / (1 - alpha)
