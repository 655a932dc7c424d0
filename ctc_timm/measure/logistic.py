"""Multinomial logistic regression with an L2 penalty, by L-BFGS along a path of strengths.

The features are centered and divided by one number, the root of their mean variance u: scaling each feature by itself
would blow up nearly dead ones. With x the features so scaled, W and b minimize

    mean_i cross_entropy(x_i W + b, y_i) + strength / 2 |W|^2,

the bias unpenalized: scikit-learn's `LogisticRegression` with C = 1 / (N strength), for two classes 2 / (N strength).

L-BFGS slows down with the ratio of the largest to the smallest curvature. So it works in the features' principal axes,
in which the curvature is nearly diagonal: about e_r v_c for axis r and class c, with e_r the variance along the axis
and v_c the mean of p_c (1 - p_c). Dividing by the root of that plus the strength makes all curvatures about one.

Letters: N images, D feature size, C classes, R axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .features import LabeledFeatures
from .geometry import gram

STRENGTHS = tuple(10 ** (power / 2) for power in range(2, -11, -1))  # 10 down to 1e-5
DEFAULT_STRENGTH = 1.0  # the best or near it with one image a class, on digits and on CIFAR-10


def solve(
    train: LabeledFeatures, num_classes: int, strengths: Sequence[float], exact: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fit logistic regression along strengths, each started from the last; best the strongest first.

    A class without images gets a bias of minus infinity: the objective has no minimum for it, only that limit.

    Args:
        exact: To a gradient of 1e-7, weights to about 1e-5 of the largest; else to 1e-3, enough to rank strengths.

    Yields:
        weights [D, C] and bias [C] for the features as given, float64.
    """
    present_P, labels_N = train.labels_N.unique(return_inverse=True)
    mean_D, axes_DR, scaled_RN, variance_R = _principal(train.features_ND)
    weights_PR = scaled_RN.new_zeros(len(present_P), len(variance_R))
    bias_P = scaled_RN.new_zeros(len(present_P))
    for strength in strengths:
        # The tolerance is for the largest entry of the gradient, in coordinates of curvature about one.
        _minimize(weights_PR, bias_P, (scaled_RN, labels_N, variance_R), strength, 1e-7 if exact else 1e-3)
        weights_DC = scaled_RN.new_zeros(len(mean_D), num_classes)
        bias_C = scaled_RN.new_full((num_classes,), -torch.inf)
        weights_DC[:, present_P] = axes_DR @ weights_PR.T
        bias_C[present_P] = bias_P - mean_D @ weights_DC[:, present_P]
        yield weights_DC, bias_C


def _principal(features_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute mean [D], scaled axes [D, R], and in these axes the features [R, N] and their variances [R].

    Classes and axes come before images throughout: products and softmax run two to ten times faster that way round.
    """
    count, size = features_ND.shape
    mean_D, gram_RR = gram(features_ND)
    eigenvalues_R, vectors_RR = torch.linalg.eigh(gram_RR)
    unit = float(eigenvalues_R.sum()) / size or 1.0
    if count < size:
        # No weight ever leaves the span of the images, so N axes do; those without variance are rounding.
        kept = eigenvalues_R > eigenvalues_R[-1] * size * torch.finfo(torch.float64).eps
        eigenvalues_R, vectors_NR = eigenvalues_R[kept], vectors_RR[:, kept]
        axes_DR = (features_ND.double() - mean_D).T @ (vectors_NR / (count * eigenvalues_R).sqrt())
        scaled_RN = (vectors_NR * (count * eigenvalues_R / unit).sqrt()).T.contiguous()
    else:
        axes_DR = vectors_RR
        scaled_RN = axes_DR.T @ (features_ND.double() - mean_D).T / unit**0.5
    return mean_D, axes_DR / unit**0.5, scaled_RN, eigenvalues_R.clamp_min(0) / unit


@torch.no_grad()
def _minimize(
    weights_PR: Tensor, bias_P: Tensor, features: tuple[Tensor, Tensor, Tensor], strength: float, tolerance: float
) -> None:
    """Move weights and bias to the minimum, in place; `features` are scaled [R, N], labels [N] and variances [R]."""
    (scaled_RN, labels_N, variance_R), count = features, features[0].shape[1]
    chance_PN = torch.addmm(bias_P[:, None], weights_PR, scaled_RN).softmax(dim=0)
    spread_P = (chance_PN * (1 - chance_PN)).mean(dim=1).clamp_min(1e-6)
    step_PR, step_P = (spread_P[:, None] * variance_R + strength).rsqrt(), spread_P.rsqrt()
    w_PR, b_P = torch.nn.Parameter(weights_PR / step_PR), torch.nn.Parameter(bias_P / step_P)
    minus_one_1N = scaled_RN.new_full((1, count), -1.0)
    options: dict[str, Any] = {'tolerance_change': 1e-14, 'history_size': 10, 'line_search_fn': 'strong_wolfe'}
    optimizer = torch.optim.LBFGS([w_PR, b_P], max_iter=1000, tolerance_grad=tolerance, **options)

    @torch.no_grad()
    def objective() -> Tensor:
        weights_PR.copy_(step_PR * w_PR)
        bias_P.copy_(step_P * b_P)
        log_PN = torch.addmm(bias_P[:, None], weights_PR, scaled_RN).log_softmax(dim=0)
        loss = strength / 2 * weights_PR.square().sum() - log_PN.gather(0, labels_N[None]).mean()
        error_PN = log_PN.exp_().scatter_add_(0, labels_N[None], minus_one_1N)
        w_PR.grad = step_PR * (error_PN @ scaled_RN.T / count + strength * weights_PR)
        b_P.grad = step_P * error_PN.mean(dim=1)
        return loss

    optimizer.step(objective)
    weights_PR.copy_(step_PR * w_PR)
    bias_P.copy_(step_P * b_P)
