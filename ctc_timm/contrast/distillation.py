"""Distillation of the features, the usual rival of the temporal contrast."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .losses import BankLoss


class FeatureDistillationLoss(BankLoss):
    """Hold features to the information bank's by their cosine.

    loss = mean_b(1 - cos(present_b, past_b)); it has no projector and no bank.
    """

    projector_names, bank_names = (), ()

    def forward(self, present_BD: Tensor, past_BD: Tensor, *_: Any) -> Tensor:
        """Compute a batch's loss, a scalar, of features of the same images; the other arguments are not used."""
        return (1 - F.cosine_similarity(present_BD.float(), past_BD.float(), dim=1)).mean()

    def sync_normalizer_flag(self) -> None:
        """Nothing: there are no normalizers."""
