"""What every estimator of mutual information shares: how inputs are read, what an estimate holds, error bars.

Letters: N images, X coordinates of x, D coordinates of t, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import UserError, nearest

MIN_IMAGES = 32
Progress = Callable[[int, int], None]
Values = Tensor | np.ndarray
Settings = TypeVar('Settings')


@dataclass(frozen=True)
class Estimate:
    """One estimate of I(X;T).

    Attributes:
        nats: The estimate, in nats; for `renyi` in nats of its own entropy, see `renyi`.
        standard_error: Of `nats`, in nats: noise of the estimate on these images, neither bias nor the spread over
            trainings.
        curve: The bound while its critic was trained, in nats; empty for `renyi`.
        curve_every: Training steps between two points of the curve; the first point is that of step `curve_every`.
    """

    nats: float
    standard_error: float
    curve: list[float] = field(default_factory=list, repr=False)
    curve_every: int = 1


def paired(x: Values, t: Values) -> tuple[Tensor, Tensor]:
    """Both variables as tensors, checked.

    Args:
        x: [N, ...] numbers, or [N] class labels.
        t: Likewise, one row for the same image.

    Returns:
        For each a float tensor, [N, X] and [N, D], or for one-dimensional integers (labels) a long tensor, [N].
        A single real-valued coordinate is given as [N, 1] or as [N] floats.

    Raises:
        UserError: Different numbers of rows, fewer than 32, NaN or infinity, no coordinates.
    """
    x, t = _variable('x', x), _variable('t', t)
    if len(x) != len(t):
        raise UserError(f'x has {len(x)} rows and t has {len(t)}: one of each is needed for every image')
    if len(x) < MIN_IMAGES:
        raise UserError(f'mutual information was asked for from {len(x)} images: at least {MIN_IMAGES} are needed')
    return x, t


def _variable(name: str, values: Values) -> Tensor:
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim == 0 or tensor.is_complex():
        raise UserError(f'{name} must be real numbers [N, ...] or labels [N], got {tensor.dtype} {list(tensor.shape)}')
    if tensor.ndim == 1 and not tensor.is_floating_point():
        return tensor.long()
    tensor = tensor.reshape(len(tensor), -1) if len(tensor) else tensor.reshape(0, 1)
    if tensor.shape[1] == 0:
        raise UserError(f'{name} has no coordinates: its shape is {list(values.shape)}')
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    wrong = int((~tensor.isfinite().all(dim=1)).sum())
    if wrong:
        raise UserError(f'{name} has NaN or infinity in {wrong} of {len(tensor)} rows: leave those images out')
    return tensor


def labels_of(values: Tensor) -> Tensor | None:
    """The class of each image, [N] counted from 0, of labels [N] or one-hot rows [N, C]; None for other numbers."""
    if values.ndim == 2:
        if values.shape[1] < 2 or not bool(((values == 0) | (values == 1)).all() and (values.sum(dim=1) == 1).all()):
            return None
        values = values.argmax(dim=1)
    return torch.unique(values, return_inverse=True)[1]


def numbers_of(values: Tensor) -> Tensor:
    """Numbers [N, D] as they are, labels [N] as one-hot rows [N, C]; float32."""
    if values.ndim == 2:
        return values.float()
    return F.one_hot(torch.unique(values, return_inverse=True)[1]).float()


def standardized(values_ND: Tensor) -> Tensor:
    """Each coordinate with mean zero and deviation one; a constant one becomes zero. [N, D]"""
    centerd_ND = values_ND - values_ND.mean(dim=0)
    deviation_D = centerd_ND.square().mean(dim=0).sqrt()
    # What is left of a constant after rounding must not be blown up to a deviation of one.
    constant_D = deviation_D <= 1e-6 * values_ND.abs().amax(dim=0)
    return torch.where(constant_D, 0.0, centerd_ND / deviation_D.masked_fill(constant_D, 1.0))


def batch_means_error(values: Sequence[float], batches: int = 20) -> float:
    """Standard error of the mean of an autocorrelated series, by non-overlapping batch means.

    Neighboring values of a training curve resemble each other, so deviation / sqrt(number) would claim too much.
    The means of long enough stretches are nearly independent; their deviation over sqrt(stretches) is the error.

    Args:
        values: The series; a remainder that fills no stretch is left out at its start.
        batches: Number of stretches, fewer when the series is shorter than two values each.

    Returns:
        The error in the unit of the values; infinity for a series shorter than four values.
    """
    batches = min(batches, len(values) // 2)
    if batches < 2:
        return math.inf
    length = len(values) // batches
    means = np.asarray(values[len(values) - batches * length :], dtype=np.float64).reshape(batches, length).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(batches))


def settings_from(start: Settings, estimator: str, options: dict[str, Any]) -> Settings:
    """A settings dataclass with some fields replaced.

    Raises:
        UserError: An option that is no field.
    """
    known = [f.name for f in dataclasses.fields(start)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise UserError(f'estimator {estimator!r} has no option {name!r}{nearest(name, known)}')
    return dataclasses.replace(start, **options)  # type: ignore[type-var]
