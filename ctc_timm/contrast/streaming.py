"""Sums over many bank rows in one pass, with their gradient, in memory that does not grow with the bank.

Both losses need a sum of f(<v_b, row_n>) over thousands of rows n for every image b of a batch. Written
naively, autograd keeps several [B, N] tensors between forward and backward. Here rows are visited in blocks
small enough to stay in the processor's cache; each block gives its part of the sum and, while its scores are
still at hand, its part of the gradient with respect to v. What is kept is one [B, E] tensor. Banks are never
differentiated: their rows change by momentum alone.

Letters: B batch, E embedding size, N rows of a bank, R rows visited, K negatives an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# About 2 MiB of float32 scores a block: it fits the second-level cache of a CPU core, and it is large enough
# to keep a GPU's matrix units busy.
BLOCK_SCORES = 1 << 19


def rows_per_block(batch_size: int) -> int:
    """How many bank rows one block of scores spans, so that a block holds about `BLOCK_SCORES` numbers."""
    return max(256, BLOCK_SCORES // max(batch_size, 1))


class _Streamed(torch.autograd.Function):
    """A sum [B] whose gradient with respect to v [B, E] was computed together with it."""

    @staticmethod
    def forward(ctx: Any, v_BE: Tensor, value_B: Tensor, slope_BE: Tensor) -> Tensor:
        ctx.save_for_backward(slope_BE)
        return value_B.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        (slope_BE,) = ctx.saved_tensors
        return grad_B.unsqueeze(1) * slope_BE, None, None


def logsumexp_scores(v_BE: Tensor, bank_NE: Tensor, temperature: float) -> Tensor:
    """log sum_n exp(<v_b, bank_n> / temperature), the partition function of instance discrimination.

    Its gradient is softmax attention over the bank, divided by the temperature; both come from the same pass,
    with a running maximum in place of a [B, N] softmax.

    Args:
        v_BE: Embeddings, [B, E].
        bank_NE: Bank, [N, E]; not differentiated.
        temperature: Positive scalar.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    queries_BE = v_BE.detach() / temperature
    batch_size = queries_BE.shape[0]
    peak_B = queries_BE.new_full((batch_size, 1), -torch.inf)
    mass_B = queries_BE.new_zeros(batch_size, 1)
    attended_BE = torch.zeros_like(queries_BE)
    for rows_RE in bank_NE.split(rows_per_block(batch_size)):
        rows_RE = rows_RE.to(queries_BE.dtype)
        scores_BR = queries_BE @ rows_RE.T
        new_peak_B = torch.maximum(peak_B, scores_BR.amax(dim=1, keepdim=True))
        shrink_B = (peak_B - new_peak_B).exp_()
        weights_BR = scores_BR.sub_(new_peak_B).exp_()
        mass_B.mul_(shrink_B).add_(weights_BR.sum(dim=1, keepdim=True))
        attended_BE.mul_(shrink_B).addmm_(weights_BR, rows_RE)
        peak_B = new_peak_B
    value_B = (mass_B.log() + peak_B).squeeze(1)
    return _Streamed.apply(v_BE, value_B, attended_BE.div_(mass_B * temperature))


def negative_terms(
    v_BE: Tensor,
    rows_RE: Tensor,
    weights_BR: Tensor,
    temperature: float,
    normalizer: Tensor,
    rate: float,
    eps: float,
) -> Tensor:
    """The negatives' part of noise-contrastive estimation, over rows that all images of the batch share.

    For each image sum_r w_br * log((n_br + q + eps) / q) with n_br = exp(<v_b, row_r> / T) / Z and q = `rate`.

    Args:
        v_BE: Embeddings, [B, E].
        rows_RE: Rows, [R, E]; not differentiated.
        weights_BR: How often each row counts as a negative of each image, [B, R], any real or boolean type;
            zero leaves the row out.
        temperature: T.
        normalizer: Z, a scalar tensor.
        rate: q = K / N.
        eps: Guards the logarithm, 1e-7 in the paper's code.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    queries_BE = v_BE.detach() / temperature
    batch_size = queries_BE.shape[0]
    total_B = queries_BE.new_zeros(batch_size)
    slope_BE = torch.zeros_like(queries_BE)
    log_normalizer = normalizer.to(queries_BE.dtype).log()
    step = rows_per_block(batch_size)
    for start in range(0, rows_RE.shape[0], step):
        block_RE = rows_RE[start : start + step].to(queries_BE.dtype)
        use_BR = weights_BR[:, start : start + step].to(queries_BE.dtype)
        density_BR = (queries_BE @ block_RE.T).sub_(log_normalizer).exp_()
        pull_BR, loss_BR = _negative_part(density_BR, use_BR, rate, eps)
        total_B += loss_BR.sum(dim=1)
        slope_BE.addmm_(pull_BR, block_RE)
    return _Streamed.apply(v_BE, total_B, slope_BE.div_(temperature))


def negative_terms_gathered(
    v_BE: Tensor,
    bank_NE: Tensor,
    negatives_BK: Tensor,
    temperature: float,
    normalizer: Tensor,
    rate: float,
    eps: float,
) -> Tensor:
    """`negative_terms` for K rows of each image's own, gathered one image at a time.

    The way to go when N is so much larger than K that visiting the whole bank would cost more than gathering.

    Args:
        v_BE: Embeddings, [B, E].
        bank_NE: Bank, [N, E]; not differentiated.
        negatives_BK: Row numbers, [B, K]; a row named twice counts twice.
        temperature: T.
        normalizer: Z, a scalar tensor.
        rate: q = K / N.
        eps: Guards the logarithm.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    queries_BE = v_BE.detach() / temperature
    log_normalizer = normalizer.to(queries_BE.dtype).log()
    totals, slopes = [], []
    for query_E, negatives_K in zip(queries_BE, negatives_BK):
        rows_KE = bank_NE.index_select(0, negatives_K).to(queries_BE.dtype)
        density_K = (rows_KE @ query_E).sub_(log_normalizer).exp_()
        pull_K, loss_K = _negative_part(density_K, None, rate, eps)
        totals.append(loss_K.sum())
        slopes.append(pull_K @ rows_KE)
    return _Streamed.apply(v_BE, torch.stack(totals), torch.stack(slopes).div_(temperature))


def _negative_part(density: Tensor, use: Tensor | None, rate: float, eps: float) -> tuple[Tensor, Tensor]:
    """Slope n / (n + q + eps) and value log((n + q + eps) / q) of each negative, both times its weight."""
    pull = density / (density + (rate + eps))
    # log1p of the excess over q keeps the digits that n + q would round away in float32 when n is tiny.
    loss = density.add_(eps).div_(rate).log1p_()
    if use is not None:
        pull, loss = pull.mul_(use), loss.mul_(use)
    return pull, loss


def mean_density(v_BE: Tensor, rows_RE: Tensor, weights_BR: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weighted sum of exp(<v_b, row_r> / T) over all images and rows, and the sum of the weights.

    Args:
        v_BE: Embeddings, [B, E].
        rows_RE: Rows, [R, E].
        weights_BR: Weights, [B, R].
        temperature: T.

    Returns:
        Two scalars; the first over the second is a mean.
    """
    queries_BE = v_BE.detach() / temperature
    total, count = queries_BE.new_zeros(()), queries_BE.new_zeros(())
    step = rows_per_block(queries_BE.shape[0])
    for start in range(0, rows_RE.shape[0], step):
        block_RE = rows_RE[start : start + step].to(queries_BE.dtype)
        use_BR = weights_BR[:, start : start + step].to(queries_BE.dtype)
        total += (queries_BE @ block_RE.T).exp_().mul_(use_BR).sum()
        count += use_BR.sum()
    return total, count
