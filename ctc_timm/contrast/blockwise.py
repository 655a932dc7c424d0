"""Sums over many bank rows in one pass, with their gradient, in memory that does not grow with the bank.

Both losses need a sum of f(<v_b, row_n>) over thousands of rows n for every image b of a batch. Written
naively, autograd keeps several [B, N] tensors between forward and backward. Here rows are visited in blocks
small enough to stay in the processor's cache; each block gives its part of the sum and, while its scores are
still at hand, its part of the gradient with respect to v, the slope. What is kept is one [B, E] tensor. Banks
are never differentiated: their rows change by momentum alone.

The passes are operators of their own for torch: a compiler takes each as one step and need not unroll
its blocks, whose number depends on N.

Letters: B batch (of all processes together where banks are split), E embedding size, N rows of a bank, R rows
visited, K rows of an image's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .negatives import OtherClasses, own_class
from .sharding import BankShard, gather_rows

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


def queries(v_BE: Tensor, split: BankShard | None) -> Tensor:
    """What is scored against the rows held here: this process's embeddings, or with a split bank everyone's."""
    return v_BE.detach() if split is None else gather_rows(v_BE.detach())


def with_slope(v_BE: Tensor, value: Tensor, slope: Tensor, split: BankShard | None) -> Tensor:
    """A sum over rows as a function of v, from its value and slope over the rows held here.

    Args:
        v_BE: Embeddings of this process, [B, E].
        value: Sum over the rows held here for each of `queries`.
        slope: Its gradient with respect to them.
        split: Of a split bank, whose processes' parts are added.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    if split is not None:
        parts = split.own(split.add(torch.cat([value[:, None], slope], dim=1)))
        value, slope = parts[:, 0], parts[:, 1:]
    return _Streamed.apply(v_BE, value, slope)


def logsumexp_scores(v_BE: Tensor, bank: Tensor, temperature: float, split: BankShard | None = None) -> Tensor:
    """log sum_n exp(<v_b, bank_n> / temperature), the partition function of instance discrimination.

    Its gradient is softmax attention over the bank, divided by the temperature; both come from the same pass,
    with a running maximum in place of a [B, N] softmax.

    Args:
        v_BE: Embeddings, [B, E].
        bank: Bank, [N, E], or this process's rows of a split one; not differentiated.
        temperature: Positive scalar.
        split: Of a split bank.

    Returns:
        [B], differentiable once with respect to `v_BE`.
    """
    peak_B, mass_B, attended_BE = _attention_op(queries(v_BE, split), bank, temperature)
    if split is not None:
        all_peak_B = split.highest(peak_B.clone())
        shrink_B1 = (peak_B - all_peak_B).exp()[:, None]
        parts = split.add(torch.cat([mass_B[:, None], attended_BE], dim=1) * shrink_B1)
        peak_B, parts = split.own(all_peak_B), split.own(parts)
        mass_B, attended_BE = parts[:, 0], parts[:, 1:]
    return _Streamed.apply(v_BE, mass_B.log() + peak_B, attended_BE / (mass_B * temperature)[:, None])


def _attention(queries_BE: Tensor, bank_NE: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """With x = <query, row> / T: max_n x, [B]; sum_n exp(x - max x), [B]; sum_n exp(x - max x) row_n, [B, E]."""
    queries_EB = (queries_BE / temperature).T.contiguous()
    batch_size = queries_EB.shape[1]
    peak_1B = queries_EB.new_full((1, batch_size), -torch.inf)
    mass_1B = queries_EB.new_zeros(1, batch_size)
    attended_EB = torch.zeros_like(queries_EB)
    step = min(rows_per_block(batch_size, queries_EB.device), bank_NE.shape[0])
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
    return peak_1B[0], mass_1B[0], attended_EB.T.contiguous()


def logistic_terms(
    queries_BE: Tensor,
    bank_NE: Tensor,
    rows_R: Tensor | None,
    use_BR: Tensor | OtherClasses | None,
    temperature: float,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """sum_r w_br * log(1 + exp(<v_b, row_r> / temperature - offset)) over rows that a whole batch shares.

    With offset = log(Z (q + eps)) this is the negatives' part of noise-contrastive estimation, see `losses`.

    Args:
        queries_BE: Embeddings, [B, E].
        bank_NE: Bank, [N, E].
        rows_R: Which rows to visit, [R]; all when None.
        use_BR: Which of them count for which image, [B, R] booleans, whole or made block by block, or how
            much each counts; None for all, once.
        temperature: Positive scalar.
        offset: Scalar tensor.

    Returns:
        The sum, [B], and its slope with respect to the embeddings, [B, E].
    """
    return _logistic_op(queries_BE, bank_NE, rows_R, *_parts(use_BR), temperature, offset)


def exponential_sums(
    queries_BE: Tensor,
    bank_NE: Tensor,
    rows_R: Tensor | None,
    use_BR: Tensor | OtherClasses | None,
    temperature: float,
) -> Tensor:
    """sum_r w_br * exp(<v_b, row_r> / temperature), [B]; arguments as in `logistic_terms`."""
    return _exponential_op(queries_BE, bank_NE, rows_R, *_parts(use_BR), temperature)


def _parts(use: Tensor | OtherClasses | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weights as tensors, which is all that an operator takes."""
    if isinstance(use, OtherClasses):
        return None, use.labels_B, use.partners_B, use.labels_R
    return use, None, None, None


class _Blocks:
    """Blocks of rows in the queries' precision, with each one's own-class mask or weights [B, rows], if any.

    `weights` are those of `_parts`.
    """

    def __init__(
        self,
        queries_BE: Tensor,
        bank_NE: Tensor,
        rows_R: Tensor | None,
        weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        self.queries_BE, self.bank_NE, self.rows_R = queries_BE, bank_NE, rows_R
        self.use_BR, self.labels_B, self.partners_B, self.labels_R = weights
        self.count = bank_NE.shape[0] if rows_R is None else rows_R.shape[0]
        self.step = max(1, min(rows_per_block(queries_BE.shape[0], queries_BE.device), self.count))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        for start in range(0, self.count, self.step):
            block = slice(start, start + self.step)
            rows_RE = self.bank_NE[block] if self.rows_R is None else self.bank_NE[self.rows_R[block]]
            own_BR = weight_BR = None
            if self.labels_R is not None:
                assert self.labels_B is not None
                own_BR = own_class(self.labels_B, self.partners_B, self.labels_R[block])
            elif self.use_BR is not None and self.use_BR.dtype == torch.bool:
                own_BR = ~self.use_BR[:, block]
            elif self.use_BR is not None:
                weight_BR = self.use_BR[:, block]
            yield rows_RE.to(self.queries_BE.dtype), own_BR, weight_BR


def _logistic(
    queries_BE: Tensor,
    bank_NE: Tensor,
    rows_R: Tensor | None,
    use_BR: Tensor | None,
    labels_B: Tensor | None,
    partners_B: Tensor | None,
    labels_R: Tensor | None,
    temperature: float,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    queries_BE = queries_BE / temperature
    batch_size = queries_BE.shape[0]
    total_B = queries_BE.new_zeros(batch_size)
    slope_BE = torch.zeros_like(queries_BE)
    blocks = _Blocks(queries_BE, bank_NE, rows_R, (use_BR, labels_B, partners_B, labels_R))
    # Two blocks are written over and over: fresh ones would cost more in page faults than the sums themselves.
    first, second = (queries_BE.new_empty(batch_size * blocks.step) for _ in range(2))
    for rows_RE, own_BR, weight_BR in blocks:
        shape = batch_size, rows_RE.shape[0]
        first_BR, second_BR = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (first, second))
        odds_BR = torch.mm(queries_BE, rows_RE.T, out=first_BR).sub_(offset).exp_()
        if own_BR is not None:
            odds_BR.masked_fill_(own_BR, 0)  # odds of zero add nothing, neither to the sum nor to the slope
        value_BR = torch.log1p(odds_BR, out=second_BR)
        if weight_BR is not None:
            value_BR.mul_(weight_BR)
        total_B += value_BR.sum(dim=1)
        pull_BR = odds_BR.div_(torch.add(odds_BR, 1, out=second_BR))
        if weight_BR is not None:
            pull_BR.mul_(weight_BR)
        slope_BE.addmm_(pull_BR, rows_RE)
    return total_B, slope_BE.div_(temperature)


def _exponential(
    queries_BE: Tensor,
    bank_NE: Tensor,
    rows_R: Tensor | None,
    use_BR: Tensor | None,
    labels_B: Tensor | None,
    partners_B: Tensor | None,
    labels_R: Tensor | None,
    temperature: float,
) -> Tensor:
    queries_BE = queries_BE / temperature
    total_B = queries_BE.new_zeros(queries_BE.shape[0])
    for rows_RE, own_BR, weight_BR in _Blocks(queries_BE, bank_NE, rows_R, (use_BR, labels_B, partners_B, labels_R)):
        power_BR = (queries_BE @ rows_RE.T).exp_()
        if own_BR is not None:
            power_BR.masked_fill_(own_BR, 0)
        if weight_BR is not None:
            power_BR.mul_(weight_BR)
        total_B += power_BR.sum(dim=1)
    return total_B


def _logistic_gathered(
    queries_BE: Tensor, bank_NE: Tensor, rows_BK: Tensor, temperature: float, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """`logistic_terms` over K rows of each image's own, gathered one image at a time.

    The way to go when N is so much larger than K that visiting the whole bank would cost more than gathering.
    """
    queries_BE = queries_BE / temperature
    totals, slopes = [], []
    for query_E, rows_K in zip(queries_BE, rows_BK):
        rows_KE = bank_NE.index_select(0, rows_K).to(queries_BE.dtype)
        odds_K = (rows_KE @ query_E).sub_(offset).exp_()
        totals.append(odds_K.log1p().sum())
        slopes.append(odds_K.div_(odds_K + 1) @ rows_KE)
    return torch.stack(totals), torch.stack(slopes).div_(temperature)


def _exponential_gathered(queries_BE: Tensor, bank_NE: Tensor, rows_BK: Tensor, temperature: float) -> Tensor:
    """`exponential_sums` over K rows of each image's own, [B]."""
    queries_BE = queries_BE / temperature
    sums = [(bank_NE[rows_K].to(query_E.dtype) @ query_E).exp_().sum() for query_E, rows_K in zip(queries_BE, rows_BK)]
    return torch.stack(sums)


def _operator(name: str, function: Callable[..., Any], arguments: str, results: tuple[str, ...]) -> Callable[..., Any]:
    """A pass as an operator of torch; its results are sums, one an image, and a 'slope', of the queries' shape."""

    def fake(queries_BE: Tensor, *_: Any) -> Any:
        shapes = [queries_BE.shape if result == 'slope' else queries_BE.shape[:1] for result in results]
        empty = tuple(queries_BE.new_empty(shape) for shape in shapes)
        return empty if len(empty) > 1 else empty[0]

    schema = f'(Tensor queries, Tensor bank, {arguments}) -> ({", ".join("Tensor" for _ in results)})'
    operator = torch.library.custom_op(f'ctc_timm::{name}', function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_WEIGHTED = 'Tensor? rows, Tensor? use, Tensor? labels, Tensor? partners, Tensor? row_labels, float temperature'
_attention_op = _operator('attention', _attention, 'float temperature', ('sum', 'sum', 'slope'))
_logistic_op = _operator('logistic', _logistic, f'{_WEIGHTED}, Tensor offset', ('sum', 'slope'))
_exponential_op = _operator('exponential', _exponential, _WEIGHTED, ('sum',))
logistic_terms_gathered = _operator(
    'logistic_gathered', _logistic_gathered, 'Tensor rows, float temperature, Tensor offset', ('sum', 'slope')
)
exponential_sums_gathered = _operator(
    'exponential_gathered', _exponential_gathered, 'Tensor rows, float temperature', ('sum',)
)
