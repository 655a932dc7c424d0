"""k-nearest-neighbor classification by cosine similarity with weighted votes.

Each of a test image's k most similar training images votes for its class with weight exp(similarity / temperature),
as in Wu et al. 2018 (arXiv 1805.01978, section 3.4), whose temperature of 0.07 is the default. Classes without a vote
tie, and ties go by class number: with one neighbor, top-5 is top-1 and four arbitrary classes.

Letters: N training images, M test images, B of them in a block, D feature size, C classes, K neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sets import Labeled, unit_rows

TEMPERATURE = 0.07
NEIGHBORS = (1, 5, 20)
BLOCK_SIMILARITIES = 1 << 23


def neighbor_votes(
    train: Labeled,
    features_MD: Tensor,
    num_classes: int,
    neighbors: Sequence[int] = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> list[Tensor]:
    """Votes of each class for each test image.

    Of training images equally similar, the first ones in the training set are the nearer. A feature vector of zero
    has similarity zero to everything. Memory is bounded: similarities are taken in blocks of test images.

    Args:
        train: [N, D] and [N].
        features_MD: Of the test images.
        num_classes: C.
        neighbors: Numbers of neighbors k; all N are taken where k is more.
        temperature: Of the weights.

    Returns:
        For each k, [M, C], float64, the sums of exp((similarity - 1) / temperature): the factor common to all keeps
        any temperature from overflowing. Zero for a class none of the neighbors is of.
    """
    bank_ND = unit_rows(train.features_ND)
    most = min(max(neighbors), len(train))
    votes: list[list[Tensor]] = [[] for _ in neighbors]
    for block_BD in unit_rows(features_MD).to(bank_ND.dtype).split(max(1, BLOCK_SIMILARITIES // len(train))):
        similarity_BK, nearest_BK = _nearest(block_BD @ bank_ND.T, most)
        weight_BK = ((similarity_BK.double() - 1) / temperature).exp()
        class_BK = train.labels_N[nearest_BK]
        for k, parts in zip(neighbors, votes):
            vote_BC = weight_BK.new_zeros(len(block_BD), num_classes)
            parts.append(vote_BC.scatter_add_(1, class_BK[:, :k], weight_BK[:, :k]))
    return [torch.cat(parts) for parts in votes]


def _nearest(similarity_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest similarities and where they are, [B, K] each; of equal ones the first."""
    images = similarity_BN.shape[1]
    value_BK, index_BK = similarity_BN.topk(min(count + 1, images), dim=1)
    # topk takes equal values in any order. They are rare, and only rows with some are sorted in full.
    tied_B = (value_BK[:, 1:] == value_BK[:, :-1]).any(dim=1).nonzero()[:, 0]
    for row_B in tied_B.split(max(1, BLOCK_SIMILARITIES // 8 // images)):
        ordered_BN = similarity_BN[row_B].sort(dim=1, descending=True, stable=True)
        value_BK[row_B] = ordered_BN.values[:, : value_BK.shape[1]]
        index_BK[row_B] = ordered_BN.indices[:, : value_BK.shape[1]]
    return value_BK[:, :count], index_BK[:, :count]
