"""Estimators of the mutual information I(X;T) and I(T;Y), by name.

    estimator = create_estimator('renyi')
    estimate = estimator.estimate(images_N3HW, features_ND)      # I(X;T)
    estimate = estimator.estimate(features_ND, labels_N)         # I(T;Y)
    estimate.nats, estimate.standard_error, estimate.curve

Which one to trust where: docs/information.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..utils.errors import UserError, nearest
from .estimates import Estimate, Progress, Values
from .neural import MINE_PRESETS, infonce, mine, smile
from .renyi import Renyi

__all__ = ['ESTIMATORS', 'MINE_PRESETS', 'Estimate', 'Estimator', 'create_estimator']


class Estimator(Protocol):
    """What every estimator can do."""

    def estimate(self, x: Values, t: Values, progress: Progress | None = None) -> Estimate:
        """Estimate the mutual information of x [N, ...] and t [N, D], either of which may be labels [N]."""
        ...


ESTIMATORS: dict[str, Callable[..., Estimator]] = {'mine': mine, 'infonce': infonce, 'smile': smile, 'renyi': Renyi}


def create_estimator(name: str, **options: Any) -> Estimator:
    """An estimator of mutual information.

    Args:
        name: One of `ESTIMATORS`.
        options: For 'mine' a preset and fields of `neural.Training`, for 'infonce' and 'smile' such fields,
            for 'renyi' fields of `renyi.RenyiSettings`. All take `seed` and `device`.

    Raises:
        UserError: An unknown name or option, a setting that can't work.
    """
    if name not in ESTIMATORS:
        known = ', '.join(ESTIMATORS)
        raise UserError(f'there is no estimator {name!r}{nearest(name, ESTIMATORS) or f"; there are {known}"}')
    return ESTIMATORS[name](**options)
