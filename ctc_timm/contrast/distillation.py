"""Distillation of the features, the usual rival of the temporal contrast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .banks import momentum_update, unit
from .losses import BankLoss, mix


class FeatureDistillationLoss(BankLoss):
    """Hold features to the information bank's by their cosine.

    loss = mean_b(1 - cos(present_b, past_b)); it has no projector. With `stored` the past features of the training
    images are a bank, [N, D], which is filled once; the other arguments are those of `BankLoss`.
    """

    projector_names = ()
    past_bank: Tensor  # [N, D], unit rows, with `stored`

    def __init__(self, feature_dim: int, num_instances: int, *banks: Any, stored: bool = False) -> None:
        self.bank_names = ('past_bank',) if stored else ()
        super().__init__(feature_dim, num_instances, feature_dim, 0.1, 0.9, *banks)

    def forward(
        self, present_BD: Tensor, past_BD: Tensor | None, index_B: Tensor, _: Any, lam_B: Tensor | None = None
    ) -> Tensor:
        """Compute a batch's loss, a scalar, from features of the same images; None takes the stored ones.

        Negatives are not used. `lam_B` is that of `CTCTask.forward`, and counts where the past did not see the mixed
        images.
        """
        stored_BD = self.shard.fetch(self.past_bank, index_B) if past_BD is None else past_BD
        cosine_B = F.cosine_similarity(present_BD.float(), stored_BD.float(), dim=1)
        if past_BD is None and lam_B is not None:
            partner_B = F.cosine_similarity(present_BD.float(), stored_BD.flip(0).float(), dim=1)
            cosine_B = mix(lam_B, cosine_B, partner_B)
        return (1 - cosine_B).mean()

    @torch.no_grad()
    def refresh(self, features_BD: Tensor, index_B: Tensor) -> None:
        """Store the features of these images."""
        momentum_update(self.past_bank, index_B, unit(features_BD), 0.0, self.shard)

    def finish_refresh(self) -> None:
        """Nothing: rows stay as they are."""

    def sync_normalizer_flag(self) -> None:
        """Nothing: there are no normalizers."""
