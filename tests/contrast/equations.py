"""CTC's equations written out one number at a time, with autograd, as the truth for the losses and banks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-7


def unit(vector: Tensor) -> Tensor:
    """v / |v|."""
    return vector / vector.pow(2).sum().sqrt()


def embedding(projector: Any, feature_D: Tensor) -> Tensor:
    """normalize(W x + b), normalize(normalize(x) - c), or normalize(x) without a projector."""
    if hasattr(projector, 'center'):
        return unit(unit(feature_D) - projector.center)
    return unit(projector.weight @ feature_D + projector.bias if hasattr(projector, 'weight') else feature_D)


def instance_loss(loss: Any, features_BD: Tensor, index_B: Tensor, lam_B: Tensor | None = None) -> Tensor:
    """mean_b -log(exp(<v_b, bank_b> / T) / sum_n exp(<v_b, bank_n> / T)), the partner's share beside it."""
    terms = []
    for b, feature_D in enumerate(features_BD):
        scores = torch.stack([embedding(loss.projector, feature_D) @ row / loss.temperature for row in loss.bank])
        top = scores.max().detach()
        own = scores[index_B[b]]
        if lam_B is not None:
            own = lam_B[b] * own + (1 - lam_B[b]) * scores[index_B.flip(0)[b]]
        terms.append(top + (scores - top).exp().sum().log() - own)
    return torch.stack(terms).mean()


def temporal_loss(
    loss: Any,
    present_BD: Tensor,
    past_BD: Tensor,
    positives_B: Tensor,
    weight_BN: Tensor,
    lam_B: Tensor | None = None,
    embedded: bool = False,
) -> Tensor:
    """Both directions of the contrast, each row of the bank a negative of each image as often as its weight says.

    With `embedded` the past's features are embeddings already.
    """
    q, B = loss.num_negatives / loss.num_instances, len(present_BD)
    total = torch.zeros((), dtype=torch.float64)
    for features_BD, projector, bank, normalizer in (
        (present_BD, loss.present_projector, loss.past_bank, loss.present_normalizer),
        (past_BD, getattr(loss, 'past_projector', loss.present_projector), loss.present_bank, loss.past_normalizer),
    ):
        for b in range(B):
            done = embedded and features_BD is past_BD
            v_E = features_BD[b] if done else embedding(projector, features_BD[b])
            out_N = torch.stack([(row @ v_E / loss.temperature).exp() / normalizer for row in bank])
            positives = [(positives_B[b], 1.0)]
            if lam_B is not None:
                positives = [(positives_B[b], lam_B[b]), (positives_B[B - 1 - b], 1 - lam_B[b])]
            for row, share in positives:
                total = total - share * (out_N[row] / (out_N[row] + q + EPS)).log() / B
            total = total - (weight_BN[b] * (q / (out_N + q + EPS)).log()).sum() / B
    return total


def updated_bank(bank: Tensor, index_B: Tensor, embedding_BE: Tensor, momentum: float) -> Tensor:
    """bank[index] <- normalize(momentum * bank[index] + (1 - momentum) * embedding); an image's first one counts."""
    after, seen = bank.clone(), set()
    for index, embedding_E in zip(index_B.tolist(), embedding_BE):
        if index not in seen:
            after[index] = unit(momentum * bank[index] + (1 - momentum) * embedding_E)
            seen.add(index)
    return after


def weights_of(negatives: Any, num_rows: int) -> Tensor:
    """How often each row of the bank, or of a shard, is a negative of each image, before scaling, [B, N]."""
    rows, weights = negatives.rows, negatives.weights_BR
    weight_BN = torch.zeros(len(negatives.scale_B), num_rows, dtype=torch.float64)
    if rows is not None and rows.ndim == 2:
        return weight_BN.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
    rows = torch.arange(num_rows) if rows is None else rows
    if negatives.classes_BP is not None:
        weights = (negatives.classes_BP[:, :, None] != negatives.labels_R).all(dim=1)
    elif weights is None:
        weights = torch.ones(len(weight_BN), len(rows))
    return weight_BN.index_add_(1, rows, weights.double())


def same_value_and_slopes(value: Tensor, expected: Tensor, of: list[Tensor]) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, of), torch.autograd.grad(expected, of)):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * max(1.0, float(theirs.abs().max())))
