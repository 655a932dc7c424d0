"""What all estimators of mutual information share: how inputs are read, and what an estimate holds.

Letters: N images, X coordinates of x, D coordinates of t, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import UserError

MIN_IMAGES = 32
SMALLEST = 1e-30
Progress = Callable[[int, int], None]
Values = Tensor | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """One estimate of I(X;T).

    Attributes:
        nats: The estimate, in nats; for `renyi` in nats of its own entropy, see `Renyi`.
        standard_error: Of `nats`, in nats: noise of the estimate on these images, neither bias nor the spread over
            trainings.
        curve: The bound while its critic was trained, in nats; empty for `renyi`.
        curve_every: Training steps between two points of the curve; the first point is that of step `curve_every`.
    """

    nats: float
    standard_error: float
    curve: list[float] = field(default_factory=list, repr=False)
    curve_every: int = 1


@dataclass(frozen=True)
class Estimator:
    """An estimator of mutual information with its settings.

    Attributes:
        seed: Of all random draws.
        device: Where to compute.

    Raises:
        UserError: A setting outside its limits.
    """

    seed: int = 0
    device: str | torch.device = 'cpu'
    limits: ClassVar[dict[str, tuple[float, float]]] = {}  # least and largest value of a setting

    def __post_init__(self) -> None:
        for name, (least, largest) in self.limits.items():
            value = getattr(self, name)
            if not least <= value <= largest:
                raise UserError(f'{name} must be at least {least:g} and at most {largest:g}, got {value}')

    @abstractmethod
    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate I(X;T).

        Args:
            x: [N, ...] numbers, flattened; class labels [N]; or one-hot rows [N, C].
            t: Likewise, for the same images.
            progress: Called as `progress(done, of)` after each part of the work.

        Raises:
            UserError: Inputs as in `paired`; see the estimator.
        """


def paired(x: Values, t: Values) -> tuple[Tensor, Tensor]:
    """Check both variables, and return them as tensors.

    Args:
        x: [N, ...] numbers, or [N] class labels. A single real-valued coordinate is [N, 1] or [N] floats.
        t: Likewise, one row for the same image.

    Returns:
        For each a float tensor, [N, X] and [N, D], or for one-dimensional integers (labels) a long tensor, [N].

    Raises:
        UserError: Different numbers of rows, fewer than 32, NaN or infinity, no coordinates.
    """
    x, t = _variable('x', x), _variable('t', t)
    if len(x) != len(t):
        raise UserError(f'x has {len(x)} rows and t has {len(t)}: one of each is needed for every image')
    if len(x) < MIN_IMAGES:
        raise UserError(f'mutual information of {len(x)} images: at least {MIN_IMAGES} are needed')
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
    """Return the class of each image, [N] from 0, of labels [N] or one-hot rows [N, C]; None for other numbers."""
    if values.ndim == 2:
        if values.shape[1] < 2 or not bool(((values == 0) | (values == 1)).all() and (values.sum(dim=1) == 1).all()):
            return None
        values = values.argmax(dim=1)
    return torch.unique(values, return_inverse=True)[1]


def numbers_of(values: Tensor) -> Tensor:
    """Return numbers [N, D] as they are and labels [N] as one-hot rows [N, C]; float32."""
    if values.ndim == 2:
        return values.float()
    return F.one_hot(torch.unique(values, return_inverse=True)[1]).float()
