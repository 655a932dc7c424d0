"""Instance banks: one unit vector per training image, [N, E].

A bank row is updated with the embedding of the step that used it, after that step's loss is computed. With
several processes every process holds the whole bank and applies every process's updates in the same order,
so that the copies stay bitwise equal.

Letters: B batch of one process, G batch of all processes together, E embedding size, N instances.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def new_bank(num_instances: int, embed_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Random unit vectors, one per training image.

    Uniform in a cube before normalisation, as the paper's code starts its banks.

    Args:
        num_instances: N.
        embed_dim: E.
        generator: Where the numbers come from; torch's default when None.

    Returns:
        [N, E], each row of length one.
    """
    return F.normalize(torch.rand(num_instances, embed_dim, generator=generator) * 2 - 1, dim=1)


def across_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes one after the other, [B, ...] -> [G, ...]; every process gives B rows.

    Args:
        rows: This process's rows.

    Returns:
        All rows, in rank order, the same tensor everywhere. Not differentiable.
    """
    if not across_processes():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def momentum_update(bank_NE: Tensor, index_B: Tensor, embedding_BE: Tensor, momentum: float) -> None:
    """bank[index] <- normalize(momentum * bank[index] + (1 - momentum) * embedding), in place.

    An image that appears more than once among the processes' batches (a sampler that pads, repeated
    augmentation) is updated once, with its first appearance, so that the result does not depend on the order
    in which a device happens to write.

    Args:
        bank_NE: Bank, [N, E], changed in place.
        index_B: Rows to update, [B].
        embedding_BE: Unit vectors of this step, [B, E].
        momentum: In [0, 1); zero replaces the row.
    """
    index_G = gather_rows(index_B)
    embedding_GE = gather_rows(embedding_BE.detach()).to(bank_NE.dtype)
    if momentum:
        embedding_GE = torch.lerp(embedding_GE, bank_NE[index_G], momentum)
    rows_GE = F.normalize(embedding_GE, dim=1)
    first_G = (index_G[:, None] == index_G[None, :]).byte().argmax(dim=1)
    bank_NE[index_G] = rows_GE[first_G]
