"""The temporal term's projectors, from features to embeddings that are not normalized yet.

Letters: B batch, D feature size, E embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .banks import unit

PROJECTORS = ('separate', 'shared', 'fixed', 'centered', 'none')


class Centered(nn.Module):
    """Unit features less their mean over the training set, [B, D].

    Features behind a rectifier have a large mean in common. Without it angles tell images apart.
    """

    center: Tensor  # [D]; zero until all banks are filled

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer('center', torch.zeros(feature_dim))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Normalize features, and subtract the mean."""
        return unit(features_BD) - self.center


def make_projector(kind: str, feature_dim: int, embed_dim: int, generator: torch.Generator | None) -> nn.Module:
    """Make a projector D -> E, trained but for those of 'fixed', 'centered' and 'none'."""
    if kind == 'none':
        return nn.Identity()
    if kind == 'centered':
        return Centered(feature_dim)
    projector = nn.Linear(feature_dim, embed_dim)
    if kind == 'fixed':
        projector.requires_grad_(False)
        nn.init.orthogonal_(projector.weight, generator=generator)
        nn.init.zeros_(projector.bias)
    return projector
