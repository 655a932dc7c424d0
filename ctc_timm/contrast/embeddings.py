"""From features to the unit vectors that are contrasted.

Letters: B batch, D feature size, E embedding size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .banks import BANK_DTYPES, NO_DIRECTION


def check_settings(
    feature_dim: int,
    num_instances: int,
    embed_dim: int,
    temperature: float,
    momentum: float,
    bank_dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse settings that no loss can work with.

    Raises:
        ValueError: A size below one, a temperature that is not a positive number, a momentum outside [0, 1),
            a bank that is neither float32 nor bfloat16.
    """
    sizes = {'feature_dim': feature_dim, 'num_instances': num_instances, 'embed_dim': embed_dim}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f'temperature must be a positive number, got {temperature}')
    if not 0 <= momentum < 1:
        raise ValueError(f'momentum must be in [0, 1), got {momentum}')
    if bank_dtype not in BANK_DTYPES:
        raise ValueError(f'bank_dtype must be one of {", ".join(map(str, BANK_DTYPES))}, got {bank_dtype}')


def unit(vectors_BE: Tensor) -> Tensor:
    """Each row over its length, [B, E], in float32 or better; a zero row has no direction and stays zero.

    `F.normalize` gives such a row a gradient of 1e12, which one dead image would send through the whole model.
    Here its gradient is zero. Squares of large values would overflow, hence the division by the largest first.
    """
    vectors_BE = vectors_BE.to(torch.promote_types(vectors_BE.dtype, torch.float32))
    largest_B1 = vectors_BE.detach().abs().amax(dim=1, keepdim=True)
    directed_B1 = largest_B1 > NO_DIRECTION
    vectors_BE = vectors_BE / torch.where(directed_B1, largest_B1, 1.0)
    length_B1 = vectors_BE.norm(dim=1, keepdim=True)
    return vectors_BE * torch.where(directed_B1, 1 / length_B1.clamp_min(NO_DIRECTION), 0.0)


def embed(features_BD: Tensor, projector: nn.Linear) -> Tensor:
    """Unit embeddings, [B, E], in float32 or better: half precision is not enough for such contrasts."""
    return unit(projector(features_BD.to(projector.weight.dtype)))


def no_autocast(features_BD: Tensor) -> torch.autocast:
    """The context in which a contrast is computed."""
    return torch.autocast(features_BD.device.type, enabled=False)
