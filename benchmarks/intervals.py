"""Means over seeds with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% interval by Student's t; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def show(values: Sequence[float], digits: int = 1, sign: str = '') -> str:
    """A mean with its interval."""
    if not values:
        return ''
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # never "-0.0"
    return f'{mean:{sign}.{digits}f}' + ('' if half is None else f' ± {half:.{digits}f}')
