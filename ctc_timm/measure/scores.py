"""Scores of a classifier on test images, in percent, with their intervals.

Letters: N test images, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

METRICS = ('top1', 'top5', 'mean_per_class')


def ranks(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Count the classes that come before the true one, [N]: 0 is a top-1 hit, below 5 a top-5 hit.

    Equal scores are ordered by class number, the lower first. A true class with a score of NaN or -infinity is no hit
    of either kind: a diverged probe scores nothing, nor does a class that the probe does not predict.
    """
    true_N1 = logits_NC.gather(1, labels_N[:, None])
    lower_NC = torch.arange(logits_NC.shape[1], device=logits_NC.device) < labels_N[:, None]
    before_N = ((logits_NC > true_N1) | ((logits_NC == true_N1) & lower_NC)).sum(dim=1)
    never_N = true_N1[:, 0].isnan() | true_N1[:, 0].isneginf()
    return torch.where(never_N, max(logits_NC.shape[1], 5), before_N)


def point_scores(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Compute top-1, top-5 and mean per-class accuracy in percent, by the names of `METRICS`.

    Top-5 is 100 with at most five classes. The mean is over the classes that have images.
    """
    return {name: float(value) for name, value in _percent(_outcomes(logits_NC, labels_N)).items()}


def bootstrap_scores(logits_NC: Tensor, labels_N: Tensor, seed: int = 0, resamples: int = 1000) -> dict[str, float]:
    """Compute the scores with 95% percentile bootstrap intervals over images (Efron & Tibshirani 1993, section 13.3).

    Each of `METRICS` has three columns: name, name_low and name_high. Only the number of drawn images in each cell of
    class and outcome (top-1 hit, other top-5 hit, miss) matters, and those counts are multinomial: they are drawn
    directly, without an [R, N] table of draws. A class that a resample misses leaves that resample's mean per-class.
    """
    outcomes_C3 = _outcomes(logits_NC, labels_N)
    filled = np.flatnonzero(outcomes_C3)
    share = outcomes_C3.ravel()[filled] / outcomes_C3.sum()
    drawn = np.zeros((resamples, outcomes_C3.size), dtype=np.int64)
    drawn[:, filled] = np.random.default_rng(seed).multinomial(len(labels_N), share, size=resamples)
    resampled = _percent(drawn.reshape(resamples, *outcomes_C3.shape))
    columns: dict[str, float] = {}
    for name, value in _percent(outcomes_C3).items():
        low, high = np.percentile(resampled[name], [2.5, 97.5])
        columns |= {name: float(value), f'{name}_low': float(low), f'{name}_high': float(high)}
    return columns


def mean_scores(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Average the scores of several runs or draws, in the columns of `bootstrap_scores`.

    The interval is Student's 95% interval of the mean; of a single row None.
    """
    columns: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for row in rows if (value := row[name]) is not None]
        columns |= {name: fmean(values) if values else None, f'{name}_low': None, f'{name}_high': None}
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
            columns |= {f'{name}_low': fmean(values) - half, f'{name}_high': fmean(values) + half}
    return columns


def _outcomes(logits_NC: Tensor, labels_N: Tensor) -> NDArray[np.int64]:
    """Count the images of each class that are top-1 hits, other top-5 hits and misses, [C, 3]."""
    rank_N = ranks(logits_NC, labels_N)
    outcome_N = (rank_N >= 1).long() + (rank_N >= 5).long()
    classes = logits_NC.shape[1]
    return torch.bincount(labels_N * 3 + outcome_N, minlength=classes * 3).view(classes, 3).cpu().numpy()


def _percent(outcomes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Compute the scores of counts [..., C, 3], each [...]."""
    images, hits = outcomes.sum(axis=-1), outcomes[..., 0]
    top1 = 100 * hits.sum(axis=-1) / images.sum(axis=-1)
    top5 = 100 * outcomes[..., :2].sum(axis=(-2, -1)) / images.sum(axis=-1)
    per_class = 100 * (hits / np.maximum(images, 1)).sum(axis=-1) / (images > 0).sum(axis=-1)
    return dict(zip(METRICS, (top1, top5, per_class)))
