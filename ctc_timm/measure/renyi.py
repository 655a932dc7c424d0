"""Matrix-based Renyi entropy: information from the eigenvalues of Gram matrices, with nothing to train.

Letters: N images, D coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from .estimates import Estimate, Progress, Values, labels_of, paired, settings_from, standardized

WIDTHS = ('neighbors', 'median')


@dataclass(frozen=True)
class RenyiSettings:
    """Settings of `Renyi`.

    Attributes:
        alpha: Order of the entropy; near 1 it is close to Shannon's.
        width: Rule for the kernel's width, for x and t each from its own distances: 'neighbors', the mean distance
            of an image to its 10 nearest others; 'median', the median distance of two images.
        width_factor: What the rule's width is multiplied by.
        standardize: Give each coordinate mean zero and deviation one first. Without, coordinates count by their scale,
            as they do for a linear classifier.
        shuffles: Subtract the mean value with t shuffled this many times, each at the cost of one more spectrum: in
            high dimension independent variables show a value well above zero. 0 is the published definition.
        max_images: A random subset of this size is taken from more images: the cost grows with the cube.
        groups: Random groups of images, each left out in turn for the standard error; 0 for none.
        seed: Of subset, shuffles and groups.
        device: Where the spectra are computed; Apple's has no float64, there the processor is used.
    """

    alpha: float = 1.01
    width: str = 'neighbors'
    width_factor: float = 1.0
    standardize: bool = False
    shuffles: int = 0
    max_images: int = 2000
    groups: int = 4
    seed: int = 0
    device: str | torch.device = 'cpu'

    def __post_init__(self) -> None:
        for name in ('alpha', 'width_factor'):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f'{name} must be a positive number, got {getattr(self, name)}')
        if self.groups == 1:
            raise UserError('groups must be 0 or at least 2, got 1')
        if self.width not in WIDTHS:
            raise UserError(f'width must be one of {", ".join(WIDTHS)}, got {self.width!r}')
        for name, least in {'shuffles': 0, 'groups': 0, 'max_images': 32}.items():
            if getattr(self, name) < least:
                raise UserError(f'{name} must be at least {least}, got {getattr(self, name)}')


def squared_distances(values_ND: Tensor) -> Tensor:
    """Squared Euclidean distances of all rows, [N, N]; exactly zero for equal rows."""
    centerd_ND = values_ND - values_ND.mean(dim=0)
    square_N = centerd_ND.square().sum(dim=1)
    squared_NN = square_N[:, None] + square_N - 2 * centerd_ND @ centerd_ND.T
    # Equal rows come out as rounding noise of either sign.
    return squared_NN.masked_fill(squared_NN <= 1e-12 * square_N.max(), 0.0).fill_diagonal_(0.0)


def kernel_width(squared_NN: Tensor, rule: str) -> float:
    """Width of the Gaussian kernel by one of `WIDTHS`, in the unit of the distances; zero if most rows are equal."""
    N = len(squared_NN)
    if rule == 'median':
        above = torch.triu_indices(N, N, offset=1, device=squared_NN.device)
        return float(squared_NN[above[0], above[1]].median().sqrt())
    nearest = squared_NN.topk(min(11, N), dim=1, largest=False).values[:, 1:]
    return float(nearest.sqrt().mean())


def gram(squared_NN: Tensor, rule: str, factor: float = 1.0) -> Tensor:
    """exp(-distance^2 / (2 width^2)), [N, N]; at width zero its limit, one for equal rows and zero for others."""
    width = factor * kernel_width(squared_NN, rule)
    if width == 0:
        return (squared_NN == 0).to(squared_NN.dtype)
    return (squared_NN / (-2 * width**2)).exp()


def entropy(spectrum: Tensor, alpha: float) -> float:
    """log(sum p^alpha) / (1 - alpha) of eigenvalues made to sum to one; Shannon's at alpha = 1. In nats."""
    shares = spectrum.clamp_min(0)
    shares = shares / shares.sum()
    if alpha == 1:
        return -float(torch.xlogy(shares, shares).sum())
    return float(shares.pow(alpha).sum().log()) / (1 - alpha)


class _Variable:
    """One of x and t: labels [N], whose kernel is one for equal labels and zero else, or a Gaussian kernel [N, N]."""

    def __init__(self, labels_N: Tensor | None, squared_NN: Tensor, settings: RenyiSettings) -> None:
        self.settings = settings
        self.labels_N = labels_N
        self.squared_NN = squared_NN  # empty where there are labels
        labeled = labels_N is not None
        self.gram_NN = squared_NN if labeled else gram(squared_NN, settings.width, settings.width_factor)

    @classmethod
    def of(cls, values: Tensor, settings: RenyiSettings) -> _Variable:
        labels_N = labels_of(values)
        if labels_N is not None:
            return cls(labels_N, torch.empty(0, 0), settings)
        return cls(None, squared_distances(standardized(values) if settings.standardize else values), settings)

    def taken(self, rows: Tensor) -> _Variable:
        """The same for some of the images, or in another order; the width is found anew."""
        if self.labels_N is not None:
            return _Variable(self.labels_N[rows], self.squared_NN, self.settings)
        return _Variable(None, self.squared_NN[rows][:, rows], self.settings)

    @property
    def images(self) -> int:
        """N."""
        return len(self.squared_NN if self.labels_N is None else self.labels_N)

    def spectrum(self) -> Tensor:
        if self.labels_N is not None:  # the equality kernel's eigenvalues are the sizes of the classes
            return self.labels_N.bincount().double()
        return torch.linalg.eigvalsh(self.gram_NN)

    def joint_spectrum(self, other: _Variable) -> Tensor:
        """Eigenvalues of the product, entry by entry, of both Gram matrices."""
        if self.labels_N is None and other.labels_N is None:
            return torch.linalg.eigvalsh(self.gram_NN * other.gram_NN)
        if self.labels_N is None:
            return other.joint_spectrum(self)
        # A product with an equality kernel falls into one block a class.
        classes = [torch.nonzero(self.labels_N == c).flatten() for c in self.labels_N.unique()]
        if other.labels_N is not None:
            return torch.cat([other.labels_N[rows].bincount().double() for rows in classes])
        return torch.cat([torch.linalg.eigvalsh(other.gram_NN[rows][:, rows]) for rows in classes])


class Renyi:
    """Matrix-based Renyi mutual information (Sanchez Giraldo et al., arXiv 1211.2459; Yu et al., arXiv 1808.07912).

        A = K / trace(K),  K_ij = exp(-|x_i - x_j|^2 / (2 width^2));  B likewise from t
        S(A) = log(sum of eigenvalues of A to the alpha) / (1 - alpha)
        I = S(A) + S(B) - S(A o B / trace(A o B)),  o entry by entry

    Labels [N] and one-hot rows [N, C] have the equality kernel, for which S is the entropy of the class shares. The
    value lies between 0 and log N and depends on N and the widths: compare it between checkpoints on the same images,
    do not read it as Shannon's information. The standard error is the grouped jackknife's: with G random groups, each
    left out in turn, sqrt((G - 1) / G * sum (value - mean)^2). Disjoint parts would claim less: small samples resolve
    less structure, so their values vary less.

    Args:
        options: Fields of `RenyiSettings` to change.

    Raises:
        UserError: An unknown option, a setting that can't work.
    """

    def __init__(self, **options: Any) -> None:
        self.settings = settings_from(RenyiSettings(), 'renyi', options)

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T).

        Args:
            x: [N, ...] numbers, flattened; class labels [N]; or one-hot rows [N, C].
            t: Likewise, for the same images.
            progress: Called as `progress(done, of)` after all images and after each group left out.

        Returns:
            The estimate, with an empty curve; its error is infinite for `groups=0`.

        Raises:
            UserError: Inputs as in `paired`.
        """
        s = self.settings
        rng = np.random.default_rng(s.seed)
        x, t = (self._placed(values) for values in paired(x, t))
        if len(x) > s.max_images:
            subset = torch.from_numpy(rng.permutation(len(x))[: s.max_images]).to(x.device)
            x, t = x[subset], t[subset]
        first, second = _Variable.of(x, s), _Variable.of(t, s)
        nats = self._value(first, second, rng)
        if progress:
            progress(1, 1 + s.groups)
        group_N = rng.permutation(len(x)) % max(1, s.groups)
        values = []
        for group in range(s.groups):
            rows = torch.from_numpy(np.flatnonzero(group_N != group)).to(x.device)
            values.append(self._value(first.taken(rows), second.taken(rows), rng))
            if progress:
                progress(2 + group, 1 + s.groups)
        return Estimate(nats, math.sqrt((s.groups - 1) * np.var(values)) if values else math.inf)

    def _placed(self, values: Tensor) -> Tensor:
        device = torch.device(self.settings.device)
        values = values.to('cpu' if device.type == 'mps' else device)
        # Rounding noise in the eigenvalues comes out times 1 / (1 - alpha): single precision is too coarse.
        return values if values.ndim == 1 else values.double()

    def _value(self, first: _Variable, second: _Variable, rng: np.random.Generator) -> float:
        s = self.settings
        own = entropy(first.spectrum(), s.alpha) + entropy(second.spectrum(), s.alpha)
        value = own - entropy(first.joint_spectrum(second), s.alpha)
        for _ in range(s.shuffles):
            shuffled = second.taken(torch.from_numpy(rng.permutation(second.images)))
            value -= (own - entropy(first.joint_spectrum(shuffled), s.alpha)) / s.shuffles
        return value
