"""The two losses of CTC, arXiv 2203.03871, with their projectors and banks, and the module that trains with them.

Letters: B batch, D feature size, E embedding size, K negatives an image, N instances in the training set, R rows that
a batch shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from ..models.backbones import features_and_logits
from ..utils.errors import UserError
from .banks import BANK_DTYPES, momentum_update, new_bank, unit
from .blockwise import log_exponential_sums, logistic_terms, logsumexp_scores
from .negatives import Negatives
from .projectors import PROJECTORS, Centered, make_projector
from .sharding import BankShard, gather_rows

EPS = 1e-7
_BLOCK_ROWS = 1 << 14
MIN_TEMPERATURE = 0.012  # exp(1 / temperature) overflows float32 below
NORMALIZERS = ('present_normalizer', 'past_normalizer')


def check_range(name: str, value: float, low: float, below: float = math.inf, *, above: bool = False) -> None:
    """Raise a UserError on a number outside [low, below), and on `low` itself where it must lie `above`."""
    if not low <= value < below or (above and value == low):
        limit = f'above {low:g}' if above else f'at least {low:g}'
        raise UserError(f'`{name}` {value}: must be {limit} and {"finite" if below == math.inf else f"below {below}"}')


class BankLoss(nn.Module):
    """A loss with banks, which the embeddings of a step update: at once, in training mode, or when the step is taken.

    With `defer_updates` they wait for `apply_updates`, so that a step of several batches is one step for the banks
    too; `discard_updates` leaves no trace of a step that was not taken.

    The arguments are those of `CTCTask`, with D, N and the source of the banks' first values. T is at least 0.012, so
    that exp(1 / T) fits in float32. Sharded banks are not in the module's state. Raises UserError on an argument of
    another size or kind.
    """

    projector_names: tuple[str, ...]
    bank_names: tuple[str, ...]

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
        super().__init__()
        for name, size in dict(feature_dim=feature_dim, num_instances=num_instances, embed_dim=embed_dim).items():
            check_range(name, size, 1)
        check_range('temperature', temperature, MIN_TEMPERATURE)
        check_range('momentum', momentum, 0, 1)
        if bank_dtype not in BANK_DTYPES:
            raise UserError(f'`bank_dtype` {bank_dtype}: must be one of {", ".join(map(str, BANK_DTYPES))}')
        self.num_instances, self.temperature, self.momentum = num_instances, temperature, momentum
        self.shard = BankShard.create(num_instances, split_banks)
        for name in self.projector_names:
            setattr(self, name, nn.Linear(feature_dim, embed_dim))
        for name in self.bank_names:
            self.register_buffer(name, new_bank(self.shard, embed_dim, generator, bank_dtype), not split_banks)
        self.defer_updates = False
        self._deferred: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def _update(self, bank: str, index_B: Tensor, embedding_BE: Tensor) -> None:
        self._deferred.setdefault(bank, []).append((index_B, embedding_BE.detach()))
        if not self.defer_updates:
            self.apply_updates()

    def apply_updates(self) -> None:
        """Update the banks by all that is deferred; on all ranks at once."""
        for bank, steps in self._deferred.items():
            index_B, embedding_BE = (torch.cat(parts) for parts in zip(*steps))
            momentum_update(getattr(self, bank), index_B, embedding_BE, self.momentum, self.shard)
        self._deferred = {}

    def discard_updates(self) -> None:
        """Forget all that is deferred."""
        self._deferred = {}

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, momentum={self.momentum}, instances={self.num_instances}'


class InstanceDiscriminationLoss(BankLoss):
    """Tell each training image from all others (first stage of CTC, arXiv 2203.03871); see `BankLoss` for arguments.

    loss = InstanceDiscriminationLoss(feature_dim=512, num_instances=50_000)
    value = loss(features_BD, index_B)     # cross_entropy(unit(projector(features)) @ bank.T / T, index)
    """

    projector_names, bank_names = ('projector',), ('bank',)
    projector: nn.Linear  # D -> E; in the published code, and by default in `CTCTask`, fixed and random
    bank: Tensor  # [N, E], unit rows

    def forward(self, features_BD: Tensor, index_B: Tensor, lam_B: Tensor | None = None) -> Tensor:
        """Compute a batch's loss, a scalar; in training mode the images' bank rows are updated afterwards.

        Features are pooled, [B, D]; `index_B` and `lam_B` are those of `CTCTask.forward`. No [B, N] tensor is stored.
        """
        with torch.autocast(features_BD.device.type, enabled=False):
            v_BE = embed(features_BD, self.projector)
            rows_BE = self.shard.fetch(self.bank, index_B)
            own_B = (v_BE * rows_BE).sum(dim=1)
            if lam_B is not None:
                own_B = mix(lam_B, own_B, (v_BE * rows_BE.flip(0)).sum(dim=1))
            spread_B = logsumexp_scores(v_BE, self.bank, self.temperature, self.shard)
            loss = (spread_B - own_B / self.temperature).mean()
        if self.training:
            self._update('bank', index_B, v_BE)
        return loss


class TemporalContrastLoss(BankLoss):
    """Keep features close to what the information bank made of the same images (second stage of CTC).

    The present embedding is contrasted with the bank of past embeddings and the past embedding with the bank
    of present ones, each by noise-contrastive estimation with K negatives an image, and both are added, see `task`.

        loss = TemporalContrastLoss(feature_dim=512, num_instances=50_000)
        loss.refresh(features_BD, index_B)                     # once, over the whole training set
        value = loss(present_BD, past_BD, index_B, sampler.draw(index_B))

    Arguments are those of `BankLoss`, with K.
    The projector of present and past: 'separate', one each, trained, as published; 'shared', one, trained; 'fixed', one
    with random orthonormal rows, never trained; 'centered', unit features less their mean, E = D; 'none', the features
    themselves, E = D. Two that are trained apart can agree on features that drift; one cannot.
    """

    projector_names, bank_names = ('present_projector', 'past_projector'), ('present_bank', 'past_bank')
    present_projector: nn.Module  # D -> E
    past_projector: nn.Module  # where it is another one
    present_bank: Tensor  # [N, E], unit rows
    past_bank: Tensor
    log_present_normalizer: Tensor  # scalars; the first step in training mode sets them to log(N * mean(out))
    log_past_normalizer: Tensor  # a normalizer itself overflows float32 at low temperatures

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
        projector: str = 'separate',
    ) -> None:
        if projector not in PROJECTORS:
            raise UserError(f'`temporal_projector` {projector!r}: must be one of {", ".join(PROJECTORS)}')
        if projector != 'separate':
            self.projector_names = ('present_projector', 'present_projector')
        embed_dim = feature_dim if projector in ('centered', 'none') else embed_dim
        super().__init__(
            feature_dim, num_instances, embed_dim, temperature, momentum, generator, bank_dtype, split_banks
        )
        if projector in ('fixed', 'centered', 'none'):
            self.present_projector = make_projector(projector, feature_dim, embed_dim, generator)
        check_range('num_negatives', num_negatives, 1)
        self.num_negatives = num_negatives
        for name in NORMALIZERS:
            self.register_buffer(f'log_{name}', torch.tensor(-math.inf))
        # Whether they are set is known on the host, so that no step waits for the device to say so.
        self._normalizers_set = False
        self._seen: tuple[tuple[Tensor, int], ...] = ()

    def forward(
        self,
        present_BD: Tensor,
        past_BD: Tensor | None,
        index_B: Tensor,
        negatives: Negatives | Tensor | None,
        lam_B: Tensor | None = None,
    ) -> Tensor:
        """Compute a batch's loss, a scalar; in training mode both banks' rows of the images are updated afterwards.

        Features of the model being trained and of the information bank are [B, D], of the same images. Without past
        ones the stored rows of the past bank serve as v2 and stay as they are: a departure from the paper. Negatives
        are what a `NegativeSampler` drew, or rows: [B, K], each image's; [R], those of the batch; None, the whole bank.
        """
        if not torch.compiler.is_compiling():
            self.sync_normalizer_flag()
        if not isinstance(negatives, Negatives):
            ones_B = torch.ones(len(index_B) * self.shard.world, device=index_B.device)
            negatives = Negatives.of_rows(negatives, ones_B, index_B, len(self.past_bank))
        with torch.autocast(present_BD.device.type, enabled=False):
            present, past = (getattr(self, name) for name in self.projector_names)
            present_BE = embed(present_BD, present)
            if past_BD is None:
                past_BE = self.shard.fetch(self.past_bank, index_B).to(present_BE.dtype)
            else:
                past_BE = embed(past_BD, past)
            loss = self._contrast(present_BE, self.past_bank, self.log_present_normalizer, negatives, lam_B)
            loss = loss + self._contrast(past_BE, self.present_bank, self.log_past_normalizer, negatives, lam_B)
        if self.training:
            self._normalizers_set = True
            self._update('present_bank', index_B, present_BE)
            if past_BD is not None:
                self._update('past_bank', index_B, past_BE)
        return loss

    def _contrast(
        self, v_BE: Tensor, bank: Tensor, log_normalizer: Tensor, negatives: Negatives, lam_B: Tensor | None
    ) -> Tensor:
        """Contrast embeddings of one model with the bank of the other.

        With c = q + eps and x = <row, v> / T - log(Z c), the positive's -log(p / (p + c)) is log(1 + exp(-x)),
        and a negative's log((n + c) / q) is log(1 + exp(x)) + log(c / q).
        """
        T, q = self.temperature, self.num_negatives / self.num_instances
        positive_BE = self.shard.fetch(bank, negatives.positives_B)
        score_B = (v_BE * positive_BE).sum(dim=1) / T
        if not self._normalizers_set:
            powers_B = log_exponential_sums(v_BE, bank, negatives, T, self.shard)
            total = torch.cat([negatives.scale_B.log() + powers_B, score_B.detach()]).logsumexp(dim=0)
            count = (negatives.scale_B * negatives.count_B).sum() + len(score_B)
            total_P, count_P = gather_rows(torch.stack([total, count])[None]).unbind(dim=1)
            first = total_P.logsumexp(dim=0) - count_P.sum().log() + math.log(self.num_instances)
            if self.training:  # a batch whose mean is not finite leaves it to the next one
                log_normalizer.copy_(torch.where(first.isfinite(), first, -math.inf))
            else:
                log_normalizer = first.to(v_BE.dtype)
        offset = log_normalizer + math.log(q + EPS)
        positive_B = F.softplus(offset - score_B, threshold=50)
        if lam_B is not None:
            partner_B = (v_BE * positive_BE.flip(0)).sum(dim=1) / T
            positive_B = mix(lam_B, positive_B, F.softplus(offset - partner_B, threshold=50))
        negative_B = logistic_terms(v_BE, bank, negatives, T, offset, math.log1p(EPS / q), self.shard)
        return (positive_B + negative_B).mean()

    @property
    def present_normalizer(self) -> Tensor:
        """Z of the present embeddings' contrast, a scalar; zero until it is set."""
        return self.log_present_normalizer.exp()

    @property
    def past_normalizer(self) -> Tensor:
        """Z of the past embeddings' contrast, likewise."""
        return self.log_past_normalizer.exp()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in NORMALIZERS:  # states before 0.2 hold no logarithms
            if prefix + name in state_dict:
                state_dict[f'{prefix}log_{name}'] = state_dict.pop(prefix + name).log()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.sync_normalizer_flag()

    def sync_normalizer_flag(self) -> None:
        """Read whether the normalizers are set; waits for the device only where they were written since last time."""
        now = tuple((n, n._version) for n in (self.log_present_normalizer, self.log_past_normalizer))
        if len(self._seen) != 2 or any(a is not b or x != y for (a, x), (b, y) in zip(now, self._seen)):
            self._normalizers_set = all(bool(log_normalizer.isfinite()) for log_normalizer, _ in now)
            self._seen = now

    @torch.no_grad()
    def refresh(self, features_BD: Tensor, index_B: Tensor) -> None:
        """Fill the rows of these images in both banks from the features of the model when the temporal stage starts."""
        with torch.autocast(features_BD.device.type, enabled=False):
            for projector, bank in zip(self.projector_names, self.bank_names):
                v_BE = embed(features_BD, getattr(self, projector))
                momentum_update(getattr(self, bank), index_B, v_BE, 0.0, self.shard)

    @torch.no_grad()
    def finish_refresh(self) -> None:
        """Center both banks, once all their rows are filled, where the projector does that to features."""
        if isinstance(self.present_projector, Centered):
            total_E = self.past_bank.sum(dim=0, dtype=self.present_projector.center.dtype)
            self.present_projector.center.copy_(self.shard.sum(total_E) / self.num_instances)
            for name in self.bank_names:
                for rows_RE in getattr(self, name).split(_BLOCK_ROWS):
                    rows_RE.copy_(unit(rows_RE - self.present_projector.center))


def embed(features_BD: Tensor, projector: nn.Module) -> Tensor:
    """Project features to unit embeddings, [B, E], in float32 or better: half precision is too coarse."""
    weight = next(projector.parameters(), features_BD)  # of none
    return unit(projector(features_BD.to(weight.dtype)))


def mix(lam_B: Tensor, own_B: Tensor, partner_B: Tensor) -> Tensor:
    lam_B = lam_B.to(own_B.dtype)
    return lam_B * own_B + (1 - lam_B) * partner_B


class Backbone(nn.Module):
    """A timm model whose forward gives features and logits, so that both can be compiled and wrapped as one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [B, D] and logits [B, C] of images [B, ...]."""
        return features_and_logits(self.model, images)


class CTCModule(nn.Module):
    """All that has gradients: the model and both losses' projectors, one module so that DDP sees one forward."""

    def __init__(self, model: nn.Module, instance: InstanceDiscriminationLoss, temporal: BankLoss) -> None:
        super().__init__()
        self.body, self.instance, self.temporal = Backbone(model), instance, temporal
        # DDP need not broadcast the banks: every rank holds the same ones, or its shard, see `banks`.
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in self.named_buffers() if not n.startswith('body.')]

    def forward(
        self,
        images: Tensor,
        index_B: Tensor | None = None,
        lam_B: Tensor | None = None,
        past_BD: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute logits [B, C] and the contrast: temporal with negatives, else instance; zero without index."""
        features_BD, logits_BC = self.body(images)
        if index_B is None:
            return logits_BC, logits_BC.new_zeros(())
        if negatives is None:
            return logits_BC, self.instance(features_BD, index_B, lam_B)
        return logits_BC, self.temporal(features_BD, past_BD, index_B, negatives, lam_B)

    def no_weight_decay(self) -> set[str]:
        """Name the model's own exceptions as this module does (read by timm's optimizer factory)."""
        return {f'body.model.{name}' for name in getattr(self.body.model, 'no_weight_decay', set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Number the model's layers, the projectors with its head (read by timm for layer-wise learning rates)."""
        model: Any = self.body.model
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('body.model.'), last)
