"""Estimators of the mutual information I(X;T) and I(T;Y), by name.

    estimator = create_estimator('renyi')
    estimate = estimator.estimate(images_N3HW, features_ND)      # I(X;T)
    estimate = estimator.estimate(features_ND, labels_N)         # I(T;Y)
    estimate.nats, estimate.standard_error, estimate.curve

Which one to trust where: docs/information.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..utils.errors import UserError, nearest
from .estimates import Estimate, Estimator
from .neural import MINE_PRESETS, InfoNCE, Smile
from .renyi import Renyi

__all__ = ['ESTIMATORS', 'MINE_PRESETS', 'Estimate', 'Estimator', 'create_estimator']

ESTIMATORS: dict[str, Estimator] = {
    'mine': MINE_PRESETS['small'],
    'infonce': InfoNCE(),
    'smile': Smile(),
    'renyi': Renyi(),
}


def create_estimator(name: str, preset: str = 'small', **options: Any) -> Estimator:
    """Create an estimator of mutual information.

    Args:
        name: One of `ESTIMATORS`.
        preset: One of `MINE_PRESETS`, for 'mine'.
        **options: Fields of `neural.NeuralEstimator` or `renyi.Renyi` to change. All take `seed` and `device`.

    Raises:
        UserError: An unknown name, preset or option; a value that can't work.
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
