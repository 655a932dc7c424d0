"""Estimators of the mutual information I(X;T) and I(T;Y), by name.

    estimator = create_estimator('renyi')
    i_xt = estimator.estimate(images_N3HW, features_ND).nats
    i_ty = estimator.estimate(features_ND, labels_N).nats

Which one to trust where: docs/information.md. Letters: N images, D coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError, nearest
from .neural import Estimate, Mine, Values, paired

NEIGHBORS = 10


@dataclass(frozen=True)
class Renyi:
    """Matrix-based Renyi mutual information (Sanchez Giraldo et al., arXiv 1211.2459; Yu et al., arXiv 1808.07912).

        A = K / trace(K),  K_ij = exp(-|x_i - x_j|^2 / (2 width^2));  B likewise from t
        S(A) = log(sum of eigenvalues of A to the alpha) / (1 - alpha)
        I = S(A) + S(B) - S(A o B / trace(A o B)),  o entry by entry

    The width is the mean distance of an image to its 10 nearest others. Labels [N] and one-hot rows [N, C] have the
    equality kernel, for which S is the entropy of the class shares. The value lies between 0 and log N and depends on
    N and the widths: compare it between checkpoints on the same images, do not read it as Shannon's information. The
    standard error is the grouped jackknife's: sqrt((G - 1) / G * sum (value - mean)^2) with each of G random groups
    left out in turn.
    """

    seed: int = 0  # of all random draws
    device: str | torch.device = 'cpu'
    alpha: float = 1.01  # order of the entropy; near 1 it is close to Shannon's
    # Subtract the mean value with t shuffled this many times: in high dimension independent variables show a value
    # well above zero. 0 is the published definition.
    shuffles: int = 0
    max_images: int = 2000  # a random subset of this size is drawn: the cost grows with the cube
    groups: int = 4  # left out in turn for the standard error; 0 or 1 for an infinite error

    def estimate(self, x: Values, t: Values) -> Estimate:
        """Estimate I(X;T) of numbers [N, ...], class labels [N] or one-hot rows [N, C]; UserError: see `paired`."""
        rng = np.random.default_rng(self.seed)
        device = 'cpu' if torch.device(self.device).type == 'mps' else self.device  # Apple's has no float64
        # Rounding noise in the eigenvalues comes out times 1 / (1 - alpha): single precision is too coarse.
        x, t = (v.to(device) if v.ndim == 1 else v.to(device).double() for v in paired(x, t))
        if len(x) > self.max_images:
            subset = torch.from_numpy(rng.permutation(len(x))[: self.max_images]).to(device)
            x, t = x[subset], t[subset]
        first, second = _variable(x), _variable(t)
        values = [self._value(first, second, rng)]
        group_N = rng.permutation(len(x)) % max(1, self.groups)
        for group in range(self.groups):
            rows = torch.from_numpy(np.flatnonzero(group_N != group)).to(device)
            values.append(self._value(_select(first, rows), _select(second, rows), rng))
        return Estimate(values[0], math.sqrt((self.groups - 1) * np.var(values[1:])) if self.groups > 1 else math.inf)

    def _value(self, first: Tensor, second: Tensor, rng: np.random.Generator) -> float:
        marginal = _entropy(_spectrum(first), self.alpha) + _entropy(_spectrum(second), self.alpha)
        value = marginal - _entropy(_joint_spectrum(first, second), self.alpha)
        for _ in range(self.shuffles):
            shuffled = _select(second, torch.from_numpy(rng.permutation(len(second))))
            value -= (marginal - _entropy(_joint_spectrum(first, shuffled), self.alpha)) / self.shuffles
        return value


def _variable(values: Tensor) -> Tensor:
    """Return labels from 0, [N], of labels or one-hot rows; of other numbers the squared distances of rows, [N, N]."""
    if values.ndim == 2:
        one_hot = ((values == 0) | (values == 1)).all() and (values.sum(dim=1) == 1).all()
        if values.shape[1] < 2 or not one_hot:
            centered_ND = values - values.mean(dim=0)
            square_N = centered_ND.square().sum(dim=1)
            squared_NN = square_N[:, None] + square_N - 2 * centered_ND @ centered_ND.T
            # Equal rows come out as rounding noise of either sign.
            return squared_NN.masked_fill(squared_NN <= 1e-12 * square_N.max(), 0.0).fill_diagonal_(0.0)
        values = values.argmax(dim=1)
    return torch.unique(values, return_inverse=True)[1]


def _select(variable: Tensor, rows: Tensor) -> Tensor:
    """Return some of the images, or all in another order; the width is that of their distances."""
    return variable[rows] if variable.ndim == 1 else variable[rows][:, rows]


def _gram(variable: Tensor) -> Tensor:
    """Compute the kernel of all pairs, [N, N]; at width zero its limit, one for equal rows and zero else."""
    if variable.ndim == 1:
        return (variable[:, None] == variable).double()
    nearest_NK = variable.topk(min(NEIGHBORS + 1, len(variable)), dim=1, largest=False).values[:, 1:]
    width = float(nearest_NK.sqrt().mean())
    return (variable / (-2 * width**2)).exp() if width else (variable == 0).to(variable.dtype)


def _spectrum(variable: Tensor) -> Tensor:
    """Compute the eigenvalues of the Gram matrix; the equality kernel's are the sizes of the classes."""
    return variable.bincount().double() if variable.ndim == 1 else torch.linalg.eigvalsh(_gram(variable))


def _joint_spectrum(first: Tensor, second: Tensor) -> Tensor:
    """Compute the eigenvalues of the product, entry by entry, of both Gram matrices."""
    if first.ndim == 2:
        return (
            torch.linalg.eigvalsh(_gram(first) * _gram(second)) if second.ndim == 2 else _joint_spectrum(second, first)
        )
    # A product with an equality kernel falls into one block a class.
    blocks, gram_NN = (torch.nonzero(first == c).flatten() for c in first.unique()), _gram(second)
    return torch.cat([torch.linalg.eigvalsh(gram_NN[rows][:, rows]) for rows in blocks])


def _entropy(spectrum: Tensor, alpha: float) -> float:
    """Compute log(sum p^alpha) / (1 - alpha) of eigenvalues made to sum to one; Shannon's at alpha = 1. In nats."""
    shares = spectrum.clamp_min(0)
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum() if alpha == 1 else shares.pow(alpha).sum().log() / (1 - alpha))


Estimator = Mine | Renyi
# 'mine' is for processors, calibrated in docs/information.md. What the CTC paper (arXiv 2203.03871) used, on raw pixels
# and pooled features for I(X;T), and on pooled features and one-hot labels for I(T;Y), takes hours there.
PUBLISHED = Mine(
    hidden=1024, layers=4, learning_rate=8e-5, decay=False, steps=10_000, batch_size=5000, average_rate=0.01,
    shift_marginals=False, standardize=False, held_out=0.0, window=500,
)  # fmt: skip
ESTIMATORS: dict[str, Estimator] = {'renyi': Renyi(), 'mine': Mine(), 'mine-published': PUBLISHED}


def create_estimator(name: str, of_labels: bool = False, **options: Any) -> Estimator:
    """Create an estimator, one of `ESTIMATORS` with some fields changed; an unknown name is a UserError.

    Args:
        of_labels: Whether it is for I(T;Y), on which the published MINE trains longer and slower.
    """
    if name not in ESTIMATORS:
        near = nearest(name, ESTIMATORS) or f'; there are {", ".join(ESTIMATORS)}'
        raise UserError(f'there is no estimator {name!r}{near}')
    if name == 'mine-published' and of_labels:
        options = {'learning_rate': 1e-5, 'steps': 20_000, **options}
    return replace(ESTIMATORS[name], **options)
