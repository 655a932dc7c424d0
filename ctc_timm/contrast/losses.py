"""The two losses of CTC, arXiv 2203.03871.

Both hold a projector from features to embeddings and the banks that the embeddings are contrasted with.

Letters: B batch, D feature size, E embedding size, N instances in the training set, K negatives an image,
R rows that a whole batch shares.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import blockwise as streaming
from .banks import BankUpdates, momentum_update, new_bank
from .embeddings import check_settings, embed, no_autocast
from .negatives import WHOLE_BANK_RATIO, OtherClasses
from .sharding import BankShard, across_processes, fetch_rows

EPS = 1e-7
_COUNTED_AT_ONCE = 4096


class InstanceDiscriminationLoss(BankUpdates):
    """Stage one: tell each training image from all others (first stage of CTC, arXiv 2203.03871).

        v = unit(projector(features))
        loss = mean_b cross_entropy(v @ bank.T / temperature, index)

    No [B, N] tensor is stored, see `streaming`.

        loss = InstanceDiscriminationLoss(feature_dim=512, num_instances=50_000)
        features_BD, logits_BC = features_and_logits(model, images)
        value = loss(features_BD, index_B)
        value.backward()

    Args:
        feature_dim: D.
        num_instances: N.
        embed_dim: E.
        temperature: Of the softmax.
        momentum: Share of the old bank row in the new one.
        generator: Source of the first bank.
        bank_dtype: float32 or bfloat16.
        split_banks: Hold only this process's share of the bank, see `sharding.Split`; the processes' group must be
            there already. The loss stays what it is with a whole bank.

    Attributes:
        projector: Linear, D -> E. The published code never hands it to the optimizer, so that it stays a fixed
            random projection; `CTCTask` does likewise by default.
        bank: [N, E], unit rows; of a split bank [N / P, E] and not in the module's state.
        split: The share, or None.

    Raises:
        ValueError: See `check_settings`.
    """

    bank: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_instances: int,
        embed_dim: int = 128,
        temperature: float = 0.1,
        momentum: float = 0.9,
        generator: torch.Generator | None = None,
        bank_dtype: torch.dtype = torch.float32,
        split_banks: bool = False,
    ) -> None:
        check_settings(feature_dim, num_instances, embed_dim, temperature, momentum, bank_dtype)
        super().__init__(momentum, BankShard.of_processes(num_instances) if split_banks else None)
        self.num_instances = num_instances
        self.temperature = temperature
        self.projector = nn.Linear(feature_dim, embed_dim)
        bank = new_bank(num_instances, embed_dim, generator, bank_dtype, self.split)
        self.register_buffer('bank', bank, persistent=not split_banks)

    def forward(self, features_BD: Tensor, index_B: Tensor, lam_B: Tensor | None = None) -> Tensor:
        """Loss of a batch; in training mode the images' bank rows are updated afterwards.

        Args:
            features_BD: Pooled features, [B, D].
            index_B: Position of each image in the training set, [B].
            lam_B: For Mixup and CutMix, the share of image b itself in the mixed image, [B]; the rest is
                image B - 1 - b, timm's partner. None when nothing is mixed.

        Returns:
            Scalar.
        """
        with no_autocast(features_BD):
            v_BE = embed(features_BD, self.projector)
            rows_BE = fetch_rows(self.bank, index_B, self.split)
            own_B = (v_BE * rows_BE).sum(dim=1)
            if lam_B is not None:
                partner_B = (v_BE * rows_BE.flip(0)).sum(dim=1)
                lam_B = lam_B.to(own_B.dtype)
                own_B = lam_B * own_B + (1 - lam_B) * partner_B
            spread_B = streaming.logsumexp_scores(v_BE, self.bank, self.temperature, self.split)
            loss = (spread_B - own_B / self.temperature).mean()
        if self.training:
            self._update('bank', index_B, v_BE)
        return loss

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, momentum={self.momentum}, instances={self.num_instances}'


class _Rows(NamedTuple):
    """A step's negatives: rows shared by the batch (all of the bank when None), or each image's own.

    `use_BR` weights the shared ones, `scale_B` an image's whole sum; `count_B` is the sum of an image's weights.
    With split banks the rows are this process's, and the images those of all processes.
    """

    shared_R: Tensor | None
    own_BK: Tensor | None
    use_BR: Tensor | OtherClasses | None
    scale_B: Tensor
    count_B: Tensor


class TemporalContrastLoss(BankUpdates):
    """Stage two: keep today's features close to what the information bank saw in the same images (second stage of CTC).

    The present embedding is contrasted with the bank of past embeddings and the past embedding with the bank
    of present ones, each by noise-contrastive estimation with K negatives an image:

        out = exp(<bank[rows], v> / temperature) / normalizer        with rows = [index, negatives]
        loss = -mean_b( log(p / (p + q + eps)) + sum_k log(q / (n_k + q + eps)) ),   q = K / N

    and the two directions are added. A normalizer is set once, by the first step, to N * mean(unnormalized out).

        loss = TemporalContrastLoss(feature_dim=512, num_instances=50_000)
        loss.refresh(features_BD, index_B)                     # once, over the whole training set
        value = loss(present_BD, past_BD, index_B, negatives_BK)

    Args:
        feature_dim: D.
        num_instances: N.
        embed_dim: E.
        num_negatives: K.
        temperature: Of the contrast, at least 0.012 so that exp(1 / temperature) fits in float32.
        momentum: Share of the old bank row in the new one.
        generator: Source of the first banks.
        bank_dtype: float32 or bfloat16.
        split_banks: As in `InstanceDiscriminationLoss`. Positives are fetched from the process that holds them;
            negatives are rows that each process holds, drawn by it for the images of all processes.

    Attributes:
        present_projector, past_projector: Linear, D -> E, both trained.
        present_bank, past_bank: [N, E], unit rows; of split banks [N / P, E] and not in the module's state.
        split: The share, or None.
        present_normalizer, past_normalizer: Scalars, zero until the first step in training mode sets them.

    Raises:
        ValueError: See `check_settings`; K below one; a temperature below 0.012.
    """

    present_bank: Tensor
    past_bank: Tensor
    present_normalizer: Tensor
    past_normalizer: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_instances: int,
        embed_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.1,
        momentum: float = 0.9,
        generator: torch.Generator | None = None,
        bank_dtype: torch.dtype = torch.float32,
        split_banks: bool = False,
    ) -> None:
        check_settings(feature_dim, num_instances, embed_dim, temperature, momentum, bank_dtype)
        if num_negatives < 1:
            raise ValueError(f'num_negatives must be at least 1, got {num_negatives}')
        if temperature < 0.012:
            raise ValueError(
                f'temperature must be at least 0.012 here, exp(1 / temperature) overflows; got {temperature}'
            )
        super().__init__(momentum, BankShard.of_processes(num_instances) if split_banks else None)
        self.num_instances = num_instances
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.present_projector = nn.Linear(feature_dim, embed_dim)
        self.past_projector = nn.Linear(feature_dim, embed_dim)
        for name in ('present_bank', 'past_bank'):
            bank = new_bank(num_instances, embed_dim, generator, bank_dtype, self.split)
            self.register_buffer(name, bank, persistent=not split_banks)
        self.register_buffer('present_normalizer', torch.zeros(()))
        self.register_buffer('past_normalizer', torch.zeros(()))
        # Whether they are set is known on the host, so that no step waits for the device to say so.
        self._normalizers_set = False
        self._seen: tuple[tuple[Tensor, int], ...] = ()
        self.register_load_state_dict_post_hook(_look_again)

    def forward(
        self,
        present_BD: Tensor,
        past_BD: Tensor | None,
        index_B: Tensor,
        negatives: Tensor | None,
        use_BR: Tensor | OtherClasses | None = None,
        scale_B: Tensor | None = None,
        positives_B: Tensor | None = None,
        lam_B: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch; in training mode both banks' rows of the images are updated afterwards.

        Args:
            present_BD: Features of the model being trained, [B, D].
            past_BD: Features of the information bank for the same images, [B, D]. None takes the stored rows of the
                past bank for its embeddings, which then stay as they are: a departure from the paper, which
                passes each augmented image through the information bank.
            index_B: Position of each image in the training set, [B].
            negatives: Rows of other classes: [B, K], each image's own; [R], the same for the whole batch; or
                None, the whole bank (R = N). With split banks the rows are places in this process's share, and
                B is the number of images of all processes here, in `use_BR` and in `scale_B`.
            use_BR: With the same rows for the whole batch, which of them are negatives of which image, [B, R]
                booleans, or how often each counts, or an `OtherClasses`. None counts every row once.
            scale_B: Factor of each image's sum over its negatives, [B]; one when None.
            positives_B: Row of each image's positive, [B]; the image itself when None.
            lam_B: For Mixup and CutMix, as in `InstanceDiscriminationLoss`.

        Returns:
            Scalar.

        Raises:
            ValueError: Negatives that are neither [B, K], [R] nor None.
        """
        if not torch.compiler.is_compiling():
            self.sync_normalizer_flag()
        positives_B = index_B if positives_B is None else positives_B
        with no_autocast(present_BD):
            present_BE = embed(present_BD, self.present_projector)
            if past_BD is None:
                past_BE = fetch_rows(self.past_bank, index_B, self.split).to(present_BE.dtype)
            else:
                past_BE = embed(past_BD, self.past_projector)
            rows = self._rows(negatives, use_BR, scale_B, present_BE)
            loss = self._direction(present_BE, self.past_bank, self.present_normalizer, rows, positives_B, lam_B)
            loss = loss + self._direction(past_BE, self.present_bank, self.past_normalizer, rows, positives_B, lam_B)
        if self.training:
            self._normalizers_set = True
            self._update('present_bank', index_B, present_BE)
            if past_BD is not None:
                self._update('past_bank', index_B, past_BE)
        return loss

    def sync_normalizer_flag(self) -> None:
        """Note whether the normalizers are set; waits for the device only where they were written since last time."""
        now = tuple((n, n._version) for n in (self.present_normalizer, self.past_normalizer))
        if len(self._seen) != 2 or any(a is not b or x != y for (a, x), (b, y) in zip(now, self._seen)):
            self._normalizers_set = all(bool(normalizer.any()) for normalizer, _ in now)
            self._seen = now

    @torch.no_grad()
    def refresh(self, features_BD: Tensor, index_B: Tensor) -> None:
        """Fill the rows of these images in both banks from one model's features, without momentum.

        Args:
            features_BD: Features of the model when the temporal stage starts, [B, D].
            index_B: Position of each image in the training set, [B].
        """
        with no_autocast(features_BD):
            present_BE = embed(features_BD, self.present_projector)
            past_BE = embed(features_BD, self.past_projector)
        momentum_update(self.present_bank, index_B, present_BE, 0.0, self.split)
        momentum_update(self.past_bank, index_B, past_BE, 0.0, self.split)

    def _rows(
        self, negatives: Tensor | None, use_BR: Tensor | OtherClasses | None, scale_B: Tensor | None, v_BE: Tensor
    ) -> _Rows:
        """The negatives in the form that is cheapest to visit, with the sum of their weights."""
        held = self.present_bank.shape[0]
        batch_size = v_BE.shape[0] * (1 if self.split is None else self.split.world)
        scale_B = v_BE.new_ones(batch_size) if scale_B is None else scale_B
        if negatives is not None and negatives.ndim == 2 and negatives.shape[0] == batch_size:
            count_B = v_BE.new_full((batch_size,), float(negatives.shape[1]))
            if WHOLE_BANK_RATIO * negatives.shape[1] < held:
                return _Rows(None, negatives, None, scale_B, count_B)
            return _Rows(None, None, _multiplicity(negatives, held), scale_B, count_B)
        if negatives is not None and negatives.ndim != 1:
            raise ValueError(f'negatives must be [B, K], [R] or None, got shape {tuple(negatives.shape)}')
        if use_BR is None:
            count_B = v_BE.new_full((batch_size,), float(held if negatives is None else negatives.shape[0]))
        elif isinstance(use_BR, OtherClasses):
            count_B = use_BR.sum(dim=1)
        else:  # in parts, as a sum of booleans makes eight bytes of each first
            count_B = torch.stack([part.sum(dim=1) for part in use_BR.split(_COUNTED_AT_ONCE, dim=1)]).sum(dim=0)
        return _Rows(negatives, None, use_BR, scale_B, count_B)

    def _direction(
        self,
        v_BE: Tensor,
        bank: Tensor,
        normalizer: Tensor,
        rows: _Rows,
        positives_B: Tensor,
        lam_B: Tensor | None,
    ) -> Tensor:
        """One direction: embeddings of one model against the bank of the other.

        With c = q + eps and x = <row, v> / T - log(Z c), the positive's -log(p / (p + c)) is log(1 + exp(-x)),
        and a negative's log((n + c) / q) is log(1 + exp(x)) + log(c / q).
        """
        rate = self.num_negatives / self.num_instances
        positive_BE = fetch_rows(bank, positives_B, self.split)
        score_B = (v_BE * positive_BE).sum(dim=1) / self.temperature
        queries_BE = streaming.queries(v_BE, self.split)
        if not self._normalizers_set:
            total = (rows.scale_B * self._powers(queries_BE, bank, rows)).sum() + score_B.detach().exp().sum()
            count = (rows.scale_B * rows.count_B).sum() + score_B.shape[0]
            first = _mean_density(total, count) * self.num_instances
            if self.training:  # a batch that gives no number leaves it to the next one
                normalizer.copy_(torch.where(first.isfinite(), first, 0.0))
            else:
                normalizer = first.to(v_BE.dtype)

        offset = normalizer.log() + math.log(rate + EPS)
        positive_B = F.softplus(offset - score_B, threshold=50)
        if lam_B is not None:
            partner_B = (v_BE * positive_BE.flip(0)).sum(dim=1) / self.temperature
            lam_B = lam_B.to(positive_B.dtype)
            positive_B = lam_B * positive_B + (1 - lam_B) * F.softplus(offset - partner_B, threshold=50)
        if rows.own_BK is not None:
            terms_B, slope_BE = streaming.logistic_terms_gathered(
                queries_BE, bank, rows.own_BK, self.temperature, offset
            )
        else:
            terms_B, slope_BE = streaming.logistic_terms(
                queries_BE, bank, rows.shared_R, rows.use_BR, self.temperature, offset
            )
        terms_B = rows.scale_B * (terms_B + rows.count_B * math.log1p(EPS / rate))
        negative_B = streaming.with_slope(v_BE, terms_B, rows.scale_B[:, None] * slope_BE, self.split)
        return (positive_B + negative_B).mean()

    def _powers(self, queries_BE: Tensor, bank: Tensor, rows: _Rows) -> Tensor:
        """Sum of the negatives' unnormalized densities, [B]."""
        if rows.own_BK is not None:
            return streaming.exponential_sums_gathered(queries_BE, bank, rows.own_BK, self.temperature)
        return streaming.exponential_sums(queries_BE, bank, rows.shared_R, rows.use_BR, self.temperature)

    def extra_repr(self) -> str:
        return (
            f'temperature={self.temperature}, momentum={self.momentum}, negatives={self.num_negatives}, '
            f'instances={self.num_instances}'
        )


def _look_again(loss: TemporalContrastLoss, _: Any) -> None:
    loss.sync_normalizer_flag()


def _multiplicity(negatives_BK: Tensor, num_instances: int) -> Tensor:
    """How often each row is a negative of each image, [B, N]; draws with repetition can name a row twice."""
    count_BN = torch.zeros(negatives_BK.shape[0], num_instances, device=negatives_BK.device)
    return count_BN.scatter_add_(1, negatives_BK, count_BN.new_ones(()).expand(negatives_BK.shape))


@torch.no_grad()
def _mean_density(total: Tensor, count: Tensor) -> Tensor:
    """Sum over number of densities of all processes; the same everywhere."""
    sums = torch.stack([total, count])
    sums = sums if sums.device.type == 'mps' else sums.double()
    if across_processes():
        dist.all_reduce(sums)
    return sums[0] / sums[1]
