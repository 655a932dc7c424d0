"""The two losses of CTC, arXiv 2203.03871.

Both hold a projector from features to embeddings and the banks that the embeddings are contrasted with.

Letters: B batch, D feature size, E embedding size, N instances in the training set, K negatives an image,
R rows that a whole batch shares.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import streaming
from .banks import across_processes, momentum_update, new_bank
from .negatives import WHOLE_BANK_RATIO, OtherClasses

EPS = 1e-7
_NO_DIRECTION = 1e-8


def check_settings(feature_dim: int, num_instances: int, embed_dim: int, temperature: float, momentum: float) -> None:
    """Refuse settings that no loss can work with.

    Raises:
        ValueError: A size below one, a temperature that is not a positive number, a momentum outside [0, 1).
    """
    sizes = {'feature_dim': feature_dim, 'num_instances': num_instances, 'embed_dim': embed_dim}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f'temperature must be a positive number, got {temperature}')
    if not 0 <= momentum < 1:
        raise ValueError(f'momentum must be in [0, 1), got {momentum}')


def _working(features: Tensor, projector: nn.Linear) -> Tensor:
    """Features in the projector's precision: half-precision bodies must not make half-precision contrasts."""
    return features.to(projector.weight.dtype)


def unit(vectors_BE: Tensor) -> Tensor:
    """Each row over its length, [B, E]; a zero row has no direction and stays zero, in its gradient too.

    `F.normalize` gives such a row a gradient of 1e12, which one dead image would send through the whole model.
    """
    length_B1 = vectors_BE.norm(dim=1, keepdim=True)
    return vectors_BE * torch.where(length_B1 > _NO_DIRECTION, 1 / length_B1.clamp_min(_NO_DIRECTION), 0.0)


def _no_autocast(features: Tensor) -> torch.autocast:
    return torch.autocast(features.device.type, enabled=False)


class InstanceDiscriminationLoss(nn.Module):
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

    Attributes:
        projector: Linear, D -> E. The published code never hands it to the optimiser, so that it stays a fixed
            random projection; `CTCTask` does likewise by default.
        bank: [N, E], unit rows.

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
    ) -> None:
        super().__init__()
        check_settings(feature_dim, num_instances, embed_dim, temperature, momentum)
        self.temperature = temperature
        self.momentum = momentum
        self.projector = nn.Linear(feature_dim, embed_dim)
        self.register_buffer('bank', new_bank(num_instances, embed_dim, generator))

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
        with _no_autocast(features_BD):
            v_BE = unit(self.projector(_working(features_BD, self.projector)))
            own_B = (v_BE * self.bank[index_B]).sum(dim=1)
            if lam_B is not None:
                partner_B = (v_BE * self.bank[index_B.flip(0)]).sum(dim=1)
                lam_B = lam_B.to(own_B.dtype)
                own_B = lam_B * own_B + (1 - lam_B) * partner_B
            spread_B = streaming.logsumexp_scores(v_BE, self.bank, self.temperature)
            loss = (spread_B - own_B / self.temperature).mean()
        if self.training:
            momentum_update(self.bank, index_B, v_BE, self.momentum)
        return loss

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, momentum={self.momentum}, instances={self.bank.shape[0]}'


class _Rows(NamedTuple):
    """A step's negatives: rows shared by the batch (all of the bank when None), or each image's own.

    `use_BR` weights the shared ones, `scale_B` an image's whole sum; `count_B` is the sum of an image's weights.
    """

    shared_R: Tensor | None
    own_BK: Tensor | None
    use_BR: Tensor | OtherClasses | None
    scale_B: Tensor | None
    count_B: Tensor


class TemporalContrastLoss(nn.Module):
    """Stage two: keep today's features close to what the information bank saw in the same images (second stage of CTC).

    The present embedding is contrasted with the bank of past embeddings and the past embedding with the bank
    of present ones, each by noise-contrastive estimation with K negatives an image:

        out = exp(<bank[rows], v> / temperature) / normalizer        with rows = [index, negatives]
        loss = -mean_b( log(p / (p + q + eps)) + sum_k log(q / (n_k + q + eps)) ),   q = K / N

    and the two directions are added. A normalizer is set once, by the first step, to N * mean(unnormalised out).

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

    Attributes:
        present_projector, past_projector: Linear, D -> E, both trained.
        present_bank, past_bank: [N, E], unit rows.
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
    ) -> None:
        super().__init__()
        check_settings(feature_dim, num_instances, embed_dim, temperature, momentum)
        if num_negatives < 1:
            raise ValueError(f'num_negatives must be at least 1, got {num_negatives}')
        if temperature < 0.012:
            raise ValueError(
                f'temperature must be at least 0.012 here, exp(1 / temperature) overflows; got {temperature}'
            )
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        self.present_projector = nn.Linear(feature_dim, embed_dim)
        self.past_projector = nn.Linear(feature_dim, embed_dim)
        self.register_buffer('present_bank', new_bank(num_instances, embed_dim, generator))
        self.register_buffer('past_bank', new_bank(num_instances, embed_dim, generator))
        self.register_buffer('present_normalizer', torch.zeros(()))
        self.register_buffer('past_normalizer', torch.zeros(()))

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
                None, the whole bank (R = N).
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
        rows = self._rows(index_B.shape[0], negatives, use_BR, scale_B, present_BD.device)
        positives_B = index_B if positives_B is None else positives_B
        with _no_autocast(present_BD):
            present_BE = self._embed(present_BD, self.present_projector)
            past_BE = self.past_bank[index_B] if past_BD is None else self._embed(past_BD, self.past_projector)
            loss = self._direction(present_BE, self.past_bank, self.present_normalizer, rows, positives_B, lam_B)
            loss = loss + self._direction(past_BE, self.present_bank, self.past_normalizer, rows, positives_B, lam_B)
        if self.training:
            momentum_update(self.present_bank, index_B, present_BE, self.momentum)
            if past_BD is not None:
                momentum_update(self.past_bank, index_B, past_BE, self.momentum)
        return loss

    @torch.no_grad()
    def refresh(self, features_BD: Tensor, index_B: Tensor) -> None:
        """Fill the rows of these images in both banks from one model's features, without momentum.

        Args:
            features_BD: Features of the model when the temporal stage starts, [B, D].
            index_B: Position of each image in the training set, [B].
        """
        with _no_autocast(features_BD):
            present_BE = self._embed(features_BD, self.present_projector)
            past_BE = self._embed(features_BD, self.past_projector)
        momentum_update(self.present_bank, index_B, present_BE, momentum=0.0)
        momentum_update(self.past_bank, index_B, past_BE, momentum=0.0)

    @staticmethod
    def _embed(features_BD: Tensor, projector: nn.Linear) -> Tensor:
        return unit(projector(_working(features_BD, projector)))

    def _rows(
        self,
        batch_size: int,
        negatives: Tensor | None,
        use_BR: Tensor | OtherClasses | None,
        scale_B: Tensor | None,
        device: torch.device,
    ) -> _Rows:
        """The negatives in the form that is cheapest to visit, with the sum of their weights."""
        N = self.present_bank.shape[0]
        if negatives is not None and negatives.ndim == 2 and negatives.shape[0] == batch_size:
            count_B = torch.full((batch_size,), float(negatives.shape[1]), device=device)
            if WHOLE_BANK_RATIO * negatives.shape[1] < N:
                return _Rows(None, negatives, None, scale_B, count_B)
            return _Rows(None, None, _multiplicity(negatives, N), scale_B, count_B)
        if negatives is not None and negatives.ndim != 1:
            raise ValueError(f'negatives must be [B, K], [R] or None, got shape {tuple(negatives.shape)}')
        if use_BR is None:
            count_B = torch.full((batch_size,), float(N if negatives is None else len(negatives)), device=device)
        else:
            count_B = use_BR.sum(dim=1)
        return _Rows(negatives, None, use_BR, scale_B, count_B)

    def _direction(
        self,
        v_BE: Tensor,
        bank_NE: Tensor,
        normalizer: Tensor,
        rows: _Rows,
        positives_B: Tensor,
        lam_B: Tensor | None,
    ) -> Tensor:
        """One direction: embeddings of one model against the bank of the other.

        With c = q + eps and x = <row, v> / T - log(Z c), the positive's -log(p / (p + c)) is log(1 + exp(-x)),
        and a negative's log((n + c) / q) is log(1 + exp(x)) + log(c / q).
        """
        rate = self.num_negatives / bank_NE.shape[0]
        score_B = (v_BE * bank_NE[positives_B]).sum(dim=1) / self.temperature
        batch_RE = bank_NE if rows.shared_R is None else bank_NE[rows.shared_R]
        scale_B = rows.scale_B if rows.scale_B is not None else torch.ones_like(score_B)
        if not normalizer.any():
            if rows.own_BK is not None:
                sums_B = streaming.exponential_sums_gathered(v_BE, bank_NE, rows.own_BK, self.temperature)
            else:
                sums_B = streaming.exponential_sums(v_BE, batch_RE, rows.use_BR, self.temperature)
            total = (scale_B * sums_B + score_B.detach().exp()).sum()
            first = _mean_density(total, (scale_B * rows.count_B + 1).sum()) * bank_NE.shape[0]
            if self.training:
                normalizer.copy_(first)
            else:
                normalizer = first.to(v_BE.dtype)

        offset = normalizer.log() + math.log(rate + EPS)
        positive_B = F.softplus(offset - score_B, threshold=50)
        if lam_B is not None:
            partner_B = (v_BE * bank_NE[positives_B.flip(0)]).sum(dim=1) / self.temperature
            lam_B = lam_B.to(positive_B.dtype)
            positive_B = lam_B * positive_B + (1 - lam_B) * F.softplus(offset - partner_B, threshold=50)
        if rows.own_BK is not None:
            negative_B = streaming.logistic_terms_gathered(v_BE, bank_NE, rows.own_BK, self.temperature, offset)
        else:
            negative_B = streaming.logistic_terms(v_BE, batch_RE, rows.use_BR, self.temperature, offset)
        negative_B = negative_B + rows.count_B * math.log1p(EPS / rate)
        return (positive_B + scale_B * negative_B).mean()

    def extra_repr(self) -> str:
        return (
            f'temperature={self.temperature}, momentum={self.momentum}, negatives={self.num_negatives}, '
            f'instances={self.present_bank.shape[0]}'
        )


def _multiplicity(negatives_BK: Tensor, num_instances: int) -> Tensor:
    """How often each row is a negative of each image, [B, N]; draws with repetition can name a row twice."""
    count_BN = torch.zeros(negatives_BK.shape[0], num_instances, device=negatives_BK.device)
    return count_BN.scatter_add_(1, negatives_BK, count_BN.new_ones(()).expand(negatives_BK.shape))


@torch.no_grad()
def _mean_density(total: Tensor, count: Tensor) -> Tensor:
    """Sum over number of densities in the batches of all processes; the same everywhere."""
    sums = torch.stack([total, count])
    sums = sums if sums.device.type == 'mps' else sums.double()
    if across_processes():
        dist.all_reduce(sums)
    return sums[0] / sums[1]
