"""Ridge regression onto one-hot classes: a linear probe in closed form, the whole path from one eigendecomposition.

With the N images' features X and one-hot classes Y, both less their means, ridge regression minimizes

    |Y - X W|^2 / N + p |W|^2,    solved by    (X'X / N + p I) W = X'Y / N,

and the bias, which is not penalized, is b = mean(Y) - mean(X) W. With X'X / N = V diag(e) V' every penalty p
shares the costly part:

    W = V diag(1 / (e + p)) V' X'Y / N.

With fewer images than features the other product is the small one, X X' / N = U diag(e) U', and from
(X'X / N + p I)^-1 X' = X' (X X' / N + p I)^-1 follows

    W = X'U diag(1 / (e + p)) U' Y / N.

Both read W = basis diag(1 / (e + p)) projected. A strength is p over the mean eigenvalue of X'X / N, so that it means
the same at every scale of the features. All in float64.

Letters: N images, D feature size, C classes, R directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .features import LabeledFeatures
from .geometry import BLOCK_ROWS, gram

STRENGTHS = tuple(10 ** (power / 2) for power in range(8, -13, -1))  # 1e4 down to 1e-6
DEFAULT_STRENGTH = 10.0  # the best or near it with one image a class, on digits and on CIFAR-10


def solve(
    train: LabeledFeatures, num_classes: int, strengths: Sequence[float], exact: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fit ridge classifiers along strengths, in mean eigenvalues of the features' covariance; all are exact.

    Yields:
        weights [D, C] and bias [C], float64, for each strength; one pair is held at a time.
    """
    features_ND = train.features_ND
    count, size = features_ND.shape
    targets_NC = torch.eye(num_classes, device=train.labels_N.device)[train.labels_N]
    mean_D, gram_RR = gram(features_ND)
    mean_C = targets_NC.double().mean(dim=0)
    eigenvalues_R, vectors_RR = torch.linalg.eigh(gram_RR)
    eigenvalues_R = eigenvalues_R.clamp_min(0)  # zeros come out as small numbers of either sign
    if count < size:
        basis_DR = (features_ND.double() - mean_D).T @ vectors_RR
        projected_RC = vectors_RR.T @ (targets_NC.double() - mean_C) / count
    else:
        cross_DC = torch.zeros(size, num_classes, dtype=torch.float64, device=features_ND.device)
        for block_BD, block_BC in zip(features_ND.split(BLOCK_ROWS), targets_NC.split(BLOCK_ROWS)):
            cross_DC.addmm_((block_BD.double() - mean_D).T, block_BC.double() - mean_C)
        basis_DR, projected_RC = vectors_RR, vectors_RR.T @ cross_DC / count
    # Features that are all constant have no scale; any penalty then gives the right answer, weights of zero.
    unit = float(eigenvalues_R.sum()) / size or 1.0
    for strength in strengths:
        weights_DC = basis_DR @ (projected_RC / (eigenvalues_R + strength * unit)[:, None])
        yield weights_DC, mean_C - mean_D @ weights_DC
