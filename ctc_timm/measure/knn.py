"""k-nearest-neighbor classification by cosine similarity with weighted votes.

Each of a test image's k most similar training images votes for its class with weight exp(similarity / temperature),
as in Wu et al. 2018 (arXiv 1805.01978, section 3.4), whose temperature of 0.07 is used. A class without a vote is
predicted in no place, so with fewer than five neighbors there is no top-5 accuracy.

Letters: N training images, M test images, B of them in a block, D feature size, C classes, K neighbors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .features import LabeledFeatures
from .geometry import unit_rows

TEMPERATURE = 0.07
NEIGHBORS = (1, 5, 20)
BLOCK_SIMILARITIES = 1 << 23


def neighbor_votes(train: LabeledFeatures, features_MD: Tensor, num_classes: int) -> list[Tensor]:
    """Sum the votes of each class for each test image, in blocks, to bound the memory.

    Of training images equally similar, the first ones in the training set are the nearer. A feature vector of zero
    has similarity zero to everything.

    Returns:
        For each k of `NEIGHBORS`, [M, C], float64: the sums of exp((similarity - 1) / temperature), and -infinity for a
        class without a vote.
    """
    bank_ND = unit_rows(train.features_ND)
    votes: list[list[Tensor]] = [[] for _ in NEIGHBORS]
    for block_BD in unit_rows(features_MD).to(bank_ND.dtype).split(max(1, BLOCK_SIMILARITIES // len(train))):
        similarity_BK, nearest_BK = _nearest(block_BD @ bank_ND.T, min(max(NEIGHBORS), len(train)))
        weight_BK = ((similarity_BK.double() - 1) / TEMPERATURE).exp()
        class_BK = train.labels_N[nearest_BK]
        for k, blocks in zip(NEIGHBORS, votes):
            vote_BC = weight_BK.new_zeros(len(block_BD), num_classes)
            vote_BC.scatter_add_(1, class_BK[:, :k], weight_BK[:, :k])
            blocks.append(vote_BC.masked_fill_(vote_BC == 0, -math.inf))
    return [torch.cat(blocks) for blocks in votes]


def _nearest(similarity_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest similarities and their positions, [B, K] each; of equal ones the first."""
    images = similarity_BN.shape[1]
    value_BK, index_BK = similarity_BN.topk(min(count + 1, images), dim=1)
    # topk takes equal values in any order. They are rare, and only rows with some are sorted in full.
    tied_B = (value_BK[:, 1:] == value_BK[:, :-1]).any(dim=1).nonzero()[:, 0]
    for row_B in tied_B.split(max(1, BLOCK_SIMILARITIES // 8 // images)):
        ordered_BN = similarity_BN[row_B].sort(dim=1, descending=True, stable=True)
        value_BK[row_B] = ordered_BN.values[:, : value_BK.shape[1]]
        index_BK[row_B] = ordered_BN.indices[:, : value_BK.shape[1]]
    return value_BK[:, :count], index_BK[:, :count]
