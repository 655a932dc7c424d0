"""Lower bounds of mutual information, as formulas on a critic's scores.

A critic scores pairs. Joint pairs are an image's own x and t, marginal pairs the x of one image and the t of another.
Each bound says how much information is needed to tell the two kinds apart as well as the critic does.

Letters: B batch, M marginal pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_mean_exp(values: Tensor) -> Tensor:
    """log(mean(exp(values))), without overflow."""
    return torch.logsumexp(values.flatten(), dim=0) - math.log(values.numel())


def donsker_varadhan(joint_B: Tensor, marginal_M: Tensor) -> Tensor:
    """mean(joint) - log mean exp(marginal), the bound of Donsker and Varadhan (MINE, arXiv 1801.04062, eq. 5)."""
    return joint_B.mean() - log_mean_exp(marginal_M)


def infonce_bound(scores_BB: Tensor) -> Tensor:
    """mean_i(s_ii - log mean_j exp s_ij), never above log B (arXiv 1807.03748; 1905.06922, eq. 10)."""
    return (scores_BB.diagonal() - scores_BB.logsumexp(dim=1)).mean() + math.log(len(scores_BB))


def smile_bound(joint_B: Tensor, marginal_M: Tensor, clip: float) -> Tensor:
    """Donsker and Varadhan's bound with marginal scores clipped to [-clip, clip] (arXiv 1910.06222, eq. 16)."""
    return donsker_varadhan(joint_B, marginal_M.clamp(-clip, clip))


def jensen_shannon(joint_B: Tensor, marginal_M: Tensor) -> Tensor:
    """-mean softplus(-joint) - mean softplus(marginal); its best critic is the log density ratio."""
    return -F.softplus(-joint_B).mean() - F.softplus(marginal_M).mean()


def off_diagonal(scores_BB: Tensor) -> Tensor:
    """All scores of pairs from different images, [B * (B - 1)]."""
    B = len(scores_BB)
    return scores_BB.flatten()[1:].view(B - 1, B + 1)[:, :-1].flatten()


class MovingAverage:
    """Exponential moving average of exp(value), kept as its logarithm; it starts at the first value."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.log: Tensor | None = None

    def update(self, log_value: Tensor) -> Tensor:
        """Take in a value's logarithm and return the logarithm of the average."""
        new = log_value.detach()
        if self.log is None or self.rate == 1:
            self.log = new
        else:
            self.log = torch.logaddexp(self.log + math.log1p(-self.rate), new + math.log(self.rate))
        return self.log


def mine_loss(joint_B: Tensor, marginal_M: Tensor, average: MovingAverage) -> Tensor:
    """MINE's loss, whose gradient is that of the bound with its denominator averaged over steps (1801.04062, eq. 12).

    The gradient of the log of a batch mean is biased, grad(E) / E with a noisy E below; so E below is the moving
    average, the present batch taken in first: -(mean(joint) - E / average), the average held constant.
    """
    log_mean = log_mean_exp(marginal_M)
    return -(joint_B.mean() - (log_mean - average.update(log_mean)).exp())
