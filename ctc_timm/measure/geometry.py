"""Shape of a cloud of features: how many directions it fills, how tight its classes are, how even it is on the sphere.

Over-compression shows as a falling effective rank and as classes that tighten. All in float64 but `uniformity`, whose
N^2 distances are computed in the features' precision. Letters: N images, D feature size, C classes, R directions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.errors import UserError
from .features import check_finite

BLOCK_ROWS = 8192
_EPS = torch.finfo(torch.float64).eps
_BLOCK_PAIRS = 1 << 23


class ClassSpread(NamedTuple):
    """Variance within and between classes."""

    within: float  # trace of the covariance within classes, in squared units of the features
    between: float  # trace of the covariance of the class means, each class weighing by its images
    spread: float  # within / between; infinite when all class means are the same
    # tr(within-class covariance @ pinv(between-class covariance)) / C; infinite likewise. It goes to zero in neural
    # collapse (Papyan, Han & Donoho 2020, NC1), and no rotation or scaling of the features changes it.
    collapse: float


def measure_geometry(features_ND: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Compute all measures by name. A UserError: features not finite; one class only; no two images of a class."""
    check_finite(features_ND, 'the features')
    measured = {'effective_rank': effective_rank(features_ND), **class_spread(features_ND, labels_N)._asdict()}
    return measured | {'alignment': alignment(features_ND, labels_N), 'uniformity': uniformity(features_ND)}


def effective_rank(features_ND: Tensor) -> float:
    """Compute exp of the entropy of the features' normalized singular values (Roy & Vetterli 2007, definition 1).

    Of the features less their mean; singular values at the level of rounding count as zero. From 1 to min(N - 1, D),
    or 0 when all images have the same features.
    """
    features_ND = features_ND.to(float64_device(features_ND.device))
    eigenvalues_R = torch.linalg.eigvalsh(gram(features_ND)[1])
    kept_R = eigenvalues_R[eigenvalues_R > eigenvalues_R[-1] * max(features_ND.shape) * _EPS]
    if not len(kept_R):
        return 0.0
    share_R = kept_R.sqrt() / kept_R.sqrt().sum()
    return math.exp(float(torch.special.entr(share_R).sum()))


def class_spread(features_ND: Tensor, labels_N: Tensor) -> ClassSpread:
    """Compare the variance within classes with that between them, of which there must be two (else UserError).

    With the class means less the mean of all images, each times the root of its share of the images, as the rows of
    M = U diag(s) V', the between-class covariance has the pseudo-inverse V diag(s^-2) V'. So the collapse measure is
    the within-class variance along each direction of V over s^2, and no [D, D] matrix is needed.
    """
    count_C, mean_CD, residual_ND, _ = _by_class(features_ND, labels_N)
    if len(count_C) < 2:
        raise UserError('every image is of one class, the spread between classes needs at least two')
    images = len(residual_ND)
    _, s_R, v_RD = torch.linalg.svd(mean_CD * (count_C / images).sqrt()[:, None], full_matrices=False)
    kept = s_R > s_R[0] * max(mean_CD.shape) * _EPS
    kept[len(count_C) - 1 :] = False  # the rows of M add up to zero, each times its root: C - 1 directions at most
    s_R, v_RD = s_R[kept], v_RD[kept]
    within, between = float(residual_ND.square().sum()) / images, float(s_R.square().sum())
    if between == 0:
        return ClassSpread(within, between, math.inf, math.inf)
    along_R = (residual_ND @ v_RD.T).square().sum(dim=0) / images
    return ClassSpread(within, between, within / between, float((along_R / s_R.square()).sum()) / len(count_C))


def alignment(features_ND: Tensor, labels_N: Tensor) -> float:
    """Average the squared distance between unit-length features of two images of a class, over all such pairs.

    Wang & Isola 2020 (arXiv 2005.10242, section 4.1, alpha 2), with the images of a class as positives. For n vectors
    with mean m the sum over ordered pairs is 2 n sum |u - m|^2, so no pair is ever formed. From 0, each class a
    point, to about 2, its images all over the sphere. Without two images of a class a UserError.
    """
    count_C, _, residual_ND, class_N = _by_class(unit_rows(features_ND), labels_N)
    pairs = float((count_C * (count_C - 1)).sum())
    if not pairs:
        raise UserError('every class has a single image, alignment needs two images of a class')
    return float((2 * count_C[class_N] * residual_ND.square().sum(dim=1)).sum()) / pairs


def uniformity(features_ND: Tensor) -> float:
    """Compute the log of the mean Gaussian potential exp(-2 |u - v|^2) of unit-length features over pairs of images.

    Wang & Isola 2020 (section 4.1, t 2), in blocks, to bound the memory. From 0, all images at one point, to about -4,
    even over a sphere of many dimensions. Fewer than two images: a UserError.
    """
    unit_ND = unit_rows(features_ND)
    if (count := len(unit_ND)) < 2:
        raise UserError(f'uniformity needs at least two images, got {count}')
    square_N, total, rows = unit_ND.square().sum(dim=1), 0.0, max(1, _BLOCK_PAIRS // count)
    for start in range(0, count, rows):
        # Columns begin at the block's first image, so that above the diagonal each pair comes once.
        inner_BN = unit_ND[start : start + rows] @ unit_ND[start:].T
        distance_BN = (square_N[start : start + rows, None] + square_N[start:] - 2 * inner_BN).clamp_min_(0)
        total += float(distance_BN.mul_(-2).exp_().triu_(diagonal=1).sum(dtype=torch.float64))
    return math.log(total / (count * (count - 1) / 2))


def _by_class(features_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split features into class means and what is left of each image, float64.

    Returns images of each class present [C], class means less the mean of all images [C, D], features less their class
    means [N, D], and each image's class among those present [N].
    """
    device = float64_device(features_ND.device)
    _, class_N, count_C = labels_N.to(device).unique(return_inverse=True, return_counts=True)
    features_ND, count_C = features_ND.to(device), count_C.double()
    centered_ND = features_ND.double() - exact_mean(features_ND)
    mean_CD = centered_ND.new_zeros(len(count_C), centered_ND.shape[1]).index_add_(0, class_N, centered_ND)
    mean_CD /= count_C[:, None]
    return count_C, mean_CD, centered_ND - mean_CD[class_N], class_N


def unit_rows(features_ND: Tensor) -> Tensor:
    """Normalize each row to unit length, in float32 or better; a zero row stays zero."""
    rows_ND = features_ND.to(torch.promote_types(features_ND.dtype, torch.float32))
    # A division by the largest entry first, so that no scale of the features over- or underflows.
    largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True)
    rows_ND = rows_ND / torch.where(largest_N1 > 0, largest_N1, 1.0)
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(1)


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device, or the CPU in place of one without float64 (Apple's)."""
    device = torch.device(device)
    return torch.device('cpu') if device.type == 'mps' else device


def exact_mean(features_ND: Tensor) -> Tensor:
    """Average over images, [D], float64, such that a constant feature differs from its mean by exactly zero.

    A plain mean leaves a rounding error in a dead feature, which a division by its variance would blow up.
    """
    origin_D = features_ND[0].double()
    return origin_D + sum((b.double() - origin_D).sum(dim=0) for b in features_ND.split(BLOCK_ROWS)) / len(features_ND)


def gram(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean of the features [D] and the smaller of their two second-moment matrices, float64.

    With X the features less their mean: the covariance X'X / N, [D, D], or when there are fewer images than features
    X X' / N, [N, N], which has the same eigenvalues but for zeros.
    """
    count, size = features_ND.shape
    mean_D = exact_mean(features_ND)
    if count < size:
        centered_ND = features_ND.double() - mean_D
        return mean_D, centered_ND @ centered_ND.T / count
    gram_DD = torch.zeros(size, size, dtype=torch.float64, device=features_ND.device)
    for block_BD in features_ND.split(BLOCK_ROWS):  # a float64 copy of all the features would be large
        centered_BD = block_BD.double() - mean_D
        gram_DD.addmm_(centered_BD.T, centered_BD)
    return mean_D, gram_DD / count
