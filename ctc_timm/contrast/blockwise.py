"""Sums over many bank rows in one pass, with their gradient, in memory that does not grow with the bank.

Both losses need a sum of f(<v_b, row_n>) over thousands of rows n for every image b of a batch. Written naively,
autograd keeps several [B, N] tensors between forward and backward. Here rows are visited in blocks small enough to
stay in the processor's cache; each block gives its part of the sum and, while its scores are still at hand, its part of
the gradient with respect to v, [B, E], the slope. That is all that is kept: sums are differentiable once, and banks not
at all. The passes are custom operators of torch, as a compiler would unroll their blocks.

Letters: B batch (of all ranks where banks are sharded), E embedding size, K rows of an image, N of a bank, R visited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .negatives import Negatives, is_own_class
from .sharding import BankShard

# A quarter of a MiB of float32 scores, which a CPU core's second-level cache holds beside their rows. A GPU wants to
# fill its matrix units.
BLOCK_SCORES = 1 << 16
BLOCK_SCORES_GPU = 1 << 23


def rows_per_block(batch_size: int, device: torch.device) -> int:
    """How many bank rows one block of scores spans."""
    scores = BLOCK_SCORES if device.type == 'cpu' else BLOCK_SCORES_GPU
    return max(256, scores // max(batch_size, 1))


def logsumexp_scores(v_BE: Tensor, bank: Tensor, T: float, shard: BankShard) -> Tensor:
    """Compute log sum_n exp(<v_b, bank_n> / T), [B], the partition function of instance discrimination.

    Its gradient is softmax attention over the bank, divided by T; both come from the same pass. Of unit vectors no
    score is above 1 / T, so that no maximum need be taken off.
    """
    mass_B, attended_BE = _attention(shard.gather(v_BE), bank, T)
    if shard.world > 1:
        parts = shard.local(shard.sum(torch.cat([mass_B[:, None], attended_BE], dim=1)))
        mass_B, attended_BE = parts[:, 0], parts[:, 1:]
    return _with_slope(v_BE, mass_B.log().to(v_BE.dtype), (attended_BE / (mass_B * T)[:, None]).to(v_BE.dtype))


def logistic_terms(
    v_BE: Tensor, bank: Tensor, negatives: Negatives, T: float, offset: Tensor, constant: float, shard: BankShard
) -> Tensor:
    """Compute scale_b * sum_r w_br * (log(1 + exp(<v_b, row_r> / T - offset)) + constant), [B].

    With offset = log(Z (q + eps)) this is the negatives' part of noise-contrastive estimation, see `losses`.
    """
    value_B, slope_BE = _logistic(shard.gather(v_BE), bank, *negatives[3:], T, offset)
    value_B = negatives.scale_B * (value_B + negatives.count_B * constant)
    parts = shard.local(shard.sum(torch.cat([value_B[:, None], negatives.scale_B[:, None] * slope_BE], dim=1)))
    return _with_slope(v_BE, parts[:, 0], parts[:, 1:])


def log_exponential_sums(v_BE: Tensor, bank: Tensor, negatives: Negatives, T: float, shard: BankShard) -> Tensor:
    """Compute log sum_r w_br exp(<v_b, row_r> / T), [B], over the rows held here, for all ranks' images."""
    return _logistic(shard.gather(v_BE), bank, *negatives[3:], T, None)[0]


def _divided(queries_BE: Tensor, temperature: float) -> Tensor:
    """Divide unit vectors by T; in float64 where exp(2 / T) would overflow float32, but on devices that have none."""
    precise = temperature < 0.03 and queries_BE.device.type != 'mps'
    return (queries_BE.double() if precise else queries_BE) / temperature


def _with_slope(v_BE: Tensor, value_B: Tensor, slope_BE: Tensor) -> Tensor:
    """Make a value the function of v that has this slope; a second derivative would come out as zero."""
    return value_B + ((v_BE - v_BE.detach()) * slope_BE).sum(dim=1)


@torch.library.custom_op('ctc_timm::attention', mutates_args=())
def _attention(queries_BE: Tensor, bank_NE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute, with x = <query, row_n> / T: sum exp(x), [B]; sum exp(x) row_n, [B, E]."""
    queries_EB = _divided(queries_BE, temperature).T.contiguous()
    batch_size = queries_EB.shape[1]
    mass_B = queries_EB.new_zeros(batch_size)
    attended_EB = torch.zeros_like(queries_EB)
    step = min(rows_per_block(batch_size, queries_EB.device), bank_NE.shape[0])
    # Rows first: the products are faster that way round, and so are sums along the rows.
    scratch_RB = queries_EB.new_empty(step, batch_size)
    for rows_RE in bank_NE.split(step):
        rows_RE = rows_RE.to(queries_EB.dtype)
        weights_RB = torch.mm(rows_RE, queries_EB, out=scratch_RB[: rows_RE.shape[0]]).exp_()
        mass_B += weights_RB.sum(dim=0)
        attended_EB.addmm_(rows_RE.T, weights_RB)
    return mass_B, attended_EB.T.contiguous()


@torch.library.custom_op('ctc_timm::logistic', mutates_args=())
def _logistic(
    queries_BE: Tensor,
    bank_NE: Tensor,
    rows: Tensor | None,
    weights_BR: Tensor | None,
    classes_BP: Tensor | None,
    labels_R: Tensor | None,
    temperature: float,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute, with o = exp(<query, row_r> / T - offset): sum_r w_br log(1 + o), [B], and its slope, [B, E].

    Without an offset it computes log sum_r w_br exp(<query, row_r> / T), and the slope is of no use. Rows and weights
    are those of `Negatives`.
    """
    dtype, device = queries_BE.dtype, queries_BE.device
    queries_BE = _divided(queries_BE, temperature)
    subtracted = 1 / temperature if offset is None else offset  # scores are at most 1 / T: no term is above one
    if rows is not None and rows.ndim == 2:  # one image at a time: the rows of all would take B K E
        values, slopes = [], []
        for query_E, rows_K in zip(queries_BE, rows):
            rows_KE = bank_NE.index_select(0, rows_K).to(query_E.dtype)
            odds_K = (rows_KE @ query_E).sub_(subtracted).exp_()
            values.append((odds_K if offset is None else odds_K.log1p()).sum())
            slopes.append(odds_K.div_(odds_K + 1) @ rows_KE)
        value_B, slope_BE = torch.stack(values), torch.stack(slopes)
        value_B = value_B.log() + subtracted if offset is None else value_B
        return value_B.to(dtype), slope_BE.div_(temperature).to(dtype)
    batch_size, count = len(queries_BE), bank_NE.shape[0] if rows is None else rows.shape[0]
    value_B, slope_BE = queries_BE.new_zeros(batch_size), torch.zeros_like(queries_BE)
    step = min(rows_per_block(batch_size, device), count)
    # Two blocks are written over and over: fresh ones would cost more in page faults than the sums themselves.
    scratch = queries_BE.new_empty(2, batch_size * step)
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        rows_RE = (bank_NE[block] if rows is None else bank_NE.index_select(0, rows[block])).to(queries_BE.dtype)
        odds_BR, terms_BR = (flat[: batch_size * len(rows_RE)].view(batch_size, len(rows_RE)) for flat in scratch)
        torch.mm(queries_BE, rows_RE.T, out=odds_BR)
        odds_BR.sub_(subtracted).exp_()
        weight_BR = None if weights_BR is None else weights_BR[:, block]
        if classes_BP is not None and labels_R is not None:
            odds_BR.masked_fill_(is_own_class(classes_BP, labels_R[block]), 0)  # adds nothing to sum and slope
        elif weight_BR is not None and weight_BR.dtype == torch.bool:
            odds_BR.masked_fill_(~weight_BR, 0)
            weight_BR = None
        terms_BR = terms_BR.copy_(odds_BR) if offset is None else torch.log1p(odds_BR, out=terms_BR)
        value_B += (terms_BR if weight_BR is None else terms_BR.mul_(weight_BR)).sum(dim=1)
        if offset is not None:
            pull_BR = odds_BR.div_(torch.add(odds_BR, 1, out=terms_BR))
            slope_BE.addmm_(pull_BR if weight_BR is None else pull_BR.mul_(weight_BR), rows_RE)
    value_B = value_B.log() + subtracted if offset is None else value_B
    return value_B.to(dtype), slope_BE.div_(temperature).to(dtype)


@_attention.register_fake
def _(queries_BE: Tensor, bank_NE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    attended_BE = torch.empty_like(_divided(queries_BE, temperature))
    return attended_BE.new_empty(len(queries_BE)), attended_BE


_logistic.register_fake(lambda q, *_: (q.new_empty(q.shape[0]), torch.empty_like(q)))
