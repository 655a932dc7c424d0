"""Sums over many bank rows in one pass, with their gradient, in memory that does not grow with the bank.

Both losses need a sum of f(<v_b, row_n>) over thousands of rows n for every image b of a batch. Written
naively, autograd keeps several [B, N] tensors between forward and backward. Here rows are visited in blocks
small enough to stay in the processor's cache; each block gives its part of the sum and, while its scores are
still at hand, its part of the gradient with respect to v. What is kept is one [B, E] tensor. Banks are never
differentiated: their rows change by momentum alone.

Letters: B batch, E embedding size, N rows of a bank, R rows visited, K rows of an image's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .negatives import OtherClasses

# About a MiB of float32 scores a block, which a CPU core's second-level cache holds. A GPU wants
# blocks that fill its matrix units.
BLOCK_SCORES = 1 << 18
BLOCK_SCORES_GPU = 1 << 23


def rows_per_block(batch_size: int, device: torch.device) -> int:
    """How many bank rows one block of scores spans."""
    scores = BLOCK_SCORES if device.type == 'cpu' else BLOCK_SCORES_GPU
    return max(256, scores // max(batch_size, 1))


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
    queries_EB = (v_BE.detach() / temperature).T.contiguous()
    batch_size = queries_EB.shape[1]
    peak_1B = queries_EB.new_full((1, batch_size), -torch.inf)
    mass_1B = queries_EB.new_zeros(1, batch_size)
    attended_EB = torch.zeros_like(queries_EB)
    step = min(rows_per_block(batch_size, v_BE.device), bank_NE.shape[0])
    # Rows first: the products are faster that way round, and so are maxima and sums along the rows.
    scratch_RB = queries_EB.new_empty(step, batch_size)
    for rows_RE in bank_NE.split(step):
        rows_RE = rows_RE.to(queries_EB.dtype)
        scores_RB = torch.mm(rows_RE, queries_EB, out=scratch_RB[: rows_RE.shape[0]])
        new_peak_1B = torch.maximum(peak_1B, scores_RB.amax(dim=0, keepdim=True))
        shrink_1B = (peak_1B - new_peak_1B).exp_()
        weights_RB = scores_RB.sub_(new_peak_1B).exp_()
        mass_1B.mul_(shrink_1B).add_(weights_RB.sum(dim=0, keepdim=True))
        attended_EB.mul_(shrink_1B).addmm_(rows_RE.T, weights_RB)
        peak_1B = new_peak_1B
    value_B = (mass_1B.log() + peak_1B).squeeze(0)
    return _Streamed.apply(v_BE, value_B, attended_EB.div_(mass_1B * temperature).T)


def logistic_terms(
    v_BE: Tensor, rows_RE: Tensor, use_BR: Tensor | OtherClasses | None, temperature: float, offset: Tensor
) -> Tensor:
    """sum_r w_br * log(1 + exp(<v_b, row_r> / temperature - offset)) over rows that a whole batch shares.

    With offset = log(Z (q + eps)) this is the negatives' part of noise-contrastive estimation, see `losses`.

    Args:
        v_BE: Embeddings, [B, E].
        rows_RE: Rows, [R, E]; not differentiated.
        use_BR: Which rows count for which image, [B, R] booleans, whole or made block by block, or how
            much each counts; None for all, once.
        temperature: Positive scalar.
        offset: Scalar tensor.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    queries_BE = v_BE.detach() / temperature
    batch_size = queries_BE.shape[0]
    total_B = queries_BE.new_zeros(batch_size)
    slope_BE = torch.zeros_like(queries_BE)
    step = min(rows_per_block(batch_size, v_BE.device), rows_RE.shape[0])
    # Two blocks are written over and over: fresh ones would cost more in page faults than the sums themselves.
    first_BR, second_BR = queries_BE.new_empty(batch_size, step), queries_BE.new_empty(batch_size, step)
    for start in range(0, rows_RE.shape[0], step):
        block_RE = rows_RE[start : start + step].to(queries_BE.dtype)
        if block_RE.shape[0] < step:
            first_BR, second_BR = first_BR[:, : block_RE.shape[0]], second_BR[:, : block_RE.shape[0]]
        use = None if use_BR is None else use_BR[:, start : start + step]
        odds_BR = torch.mm(queries_BE, block_RE.T, out=first_BR).sub_(offset).exp_()
        if use is not None and use.dtype == torch.bool:
            odds_BR.mul_(use)  # odds of zero add nothing, neither to the sum nor to the slope
        value_BR = torch.log1p(odds_BR, out=second_BR)
        if use is not None and use.dtype != torch.bool:
            value_BR.mul_(use)
        total_B += value_BR.sum(dim=1)
        pull_BR = odds_BR.div_(torch.add(odds_BR, 1, out=second_BR))
        if use is not None and use.dtype != torch.bool:
            pull_BR.mul_(use)
        slope_BE.addmm_(pull_BR, block_RE)
    return _Streamed.apply(v_BE, total_B, slope_BE.div_(temperature))


def logistic_terms_gathered(
    v_BE: Tensor, bank_NE: Tensor, rows_BK: Tensor, temperature: float, offset: Tensor
) -> Tensor:
    """`logistic_terms` over K rows of each image's own, gathered one image at a time.

    The way to go when N is so much larger than K that visiting the whole bank would cost more than gathering.

    Args:
        v_BE: Embeddings, [B, E].
        bank_NE: Bank, [N, E]; not differentiated.
        rows_BK: Row numbers, [B, K]; a row named twice counts twice.
        temperature: Positive scalar.
        offset: Scalar tensor.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    queries_BE = v_BE.detach() / temperature
    totals, slopes = [], []
    for query_E, rows_K in zip(queries_BE, rows_BK):
        rows_KE = bank_NE.index_select(0, rows_K).to(queries_BE.dtype)
        odds_K = (rows_KE @ query_E).sub_(offset).exp_()
        totals.append(odds_K.log1p().sum())
        slopes.append(odds_K.div_(odds_K + 1) @ rows_KE)
    return _Streamed.apply(v_BE, torch.stack(totals), torch.stack(slopes).div_(temperature))


def exponential_sums(v_BE: Tensor, rows_RE: Tensor, use_BR: Tensor | OtherClasses | None, temperature: float) -> Tensor:
    """sum_r w_br * exp(<v_b, row_r> / temperature), not differentiable.

    Args:
        v_BE: Embeddings, [B, E].
        rows_RE: Rows, [R, E].
        use_BR: As in `logistic_terms`.
        temperature: Positive scalar.

    Returns:
        [B].
    """
    queries_BE = v_BE.detach() / temperature
    total_B = queries_BE.new_zeros(queries_BE.shape[0])
    step = rows_per_block(queries_BE.shape[0], v_BE.device)
    for start in range(0, rows_RE.shape[0], step):
        block_RE = rows_RE[start : start + step].to(queries_BE.dtype)
        power_BR = (queries_BE @ block_RE.T).exp_()
        total_B += (power_BR if use_BR is None else power_BR.mul_(use_BR[:, start : start + step])).sum(dim=1)
    return total_B


def exponential_sums_gathered(v_BE: Tensor, bank_NE: Tensor, rows_BK: Tensor, temperature: float) -> Tensor:
    """`exponential_sums` over K rows of each image's own, [B]."""
    queries_BE = v_BE.detach() / temperature
    sums = [(bank_NE[rows_K].to(query_E.dtype) @ query_E).exp_().sum() for query_E, rows_K in zip(queries_BE, rows_BK)]
    return torch.stack(sums)
