"""Instance banks: one unit vector per training image, [N, E].

With several ranks every rank holds the whole bank and applies every rank's updates in the same order, so that the
copies stay bitwise equal; or each holds a shard of the bank and updates that, see `sharding`. A bank in bfloat16 takes
half the memory: its rows are updated in the precision of the embeddings and rounded when they are written.

Letters: B batch of one rank, G batch of all ranks together, E embedding size, N instances, R rows of one rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sharding import BankShard, gather_rows

BANK_DTYPES = (torch.float32, torch.bfloat16)
NO_DIRECTION = 1e-8  # a vector of this length or less has no direction
_BLOCK_ROWS = 1 << 16


def unit(vectors_BE: Tensor) -> Tensor:
    """Divide each row by its length, [B, E], in float32 or better; a zero row stays zero.

    `F.normalize` gives a zero row a gradient of 1e12, which one dead image would send through the whole model. Here
    its gradient is zero. Squares of large values would overflow, hence the division by the largest first.
    """
    vectors_BE = vectors_BE.to(torch.promote_types(vectors_BE.dtype, torch.float32))
    largest_B1 = vectors_BE.detach().abs().amax(dim=1, keepdim=True)
    directed_B1 = largest_B1 > NO_DIRECTION
    vectors_BE = vectors_BE / torch.where(directed_B1, largest_B1, 1.0)
    length_B1 = vectors_BE.norm(dim=1, keepdim=True)
    return vectors_BE * torch.where(directed_B1, 1 / length_B1.clamp_min(NO_DIRECTION), 0.0)


def new_bank(
    shard: BankShard, embed_dim: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw random unit vectors, [R, E]: uniform in a cube, then normalized, as the paper's code does.

    The rows of a shard are the same numbers as in a whole bank.
    """
    bank_RE = torch.empty(shard.num_rows, embed_dim, dtype=dtype)
    for index_B in torch.arange(shard.num_instances).split(_BLOCK_ROWS):  # a whole bank may not fit in memory
        block_BE = F.normalize(torch.rand(len(index_B), embed_dim, generator=generator) * 2 - 1, dim=1)
        mine_B, place_B = shard.find(index_B)
        bank_RE[place_B[mine_B]] = block_BE[mine_B].to(dtype)
    return bank_RE


@torch.no_grad()
def momentum_update(
    bank: Tensor, index_B: Tensor, embedding_BE: Tensor, momentum: float, shard: BankShard | None = None
) -> None:
    """Set bank[index] <- normalize(momentum * bank[index] + (1 - momentum) * embedding), in place.

    An image that appears more than once among the ranks' batches (a sampler that pads, repeated augmentation) is
    updated once, with its first appearance, so that the result does not depend on the order in which a device
    happens to write. A row stays as it is where the new one would have no direction or not be finite.
    The bank is [N, E], or [R, E] of a shard; rows are named by their number in the whole bank, [B]. Embeddings are unit
    vectors, [B, E], and a momentum of zero replaces the row.
    """
    index_G = gather_rows(index_B).contiguous()
    embedding_GE = gather_rows(embedding_BE.detach())
    embedding_GE = embedding_GE.to(torch.promote_types(bank.dtype, torch.float32))
    ordered_G, order_G = index_G.sort(stable=True)
    source_G = order_G[torch.searchsorted(ordered_G, index_G)]  # where each image appears first
    place_G = index_G
    if shard is not None and shard.world > 1:
        mine_G, place_G = shard.find(index_G)
        # Picking out the images that lie here would wait for the device. So every image writes something: the others
        # repeat what the first image that lies here writes. Its number stays a [1]: a scalar index waits, too.
        first_1 = mine_G.byte().argmax(keepdim=True)
        place_G = torch.where(mine_G, place_G, place_G[first_1])
        source_G = torch.where(mine_G, source_G, source_G[first_1])
    old_GE = bank[place_G].to(embedding_GE.dtype)
    new_GE = torch.lerp(embedding_GE[source_G], old_GE, momentum) if momentum else embedding_GE[source_G]
    length_G1 = new_GE.norm(dim=1, keepdim=True)
    usable_G1 = (length_G1 > NO_DIRECTION) & length_G1.isfinite()
    if shard is not None and shard.world > 1:
        usable_G1 &= mine_G.any()
    bank[place_G] = torch.where(usable_G1, (new_GE / length_G1).to(bank.dtype), bank[place_G])
