"""Instance banks: one unit vector per training image, [N, E].

A bank row is updated with the embedding of the step that used it, after that step's loss is computed. With
several processes every process holds the whole bank and applies every process's updates in the same order,
so that the copies stay bitwise equal; or each holds its rows of a split bank and updates those, see `sharding`.

A bank in bfloat16 takes half the memory. Its rows are read into the precision of the embeddings, updated
there and rounded when they are written.

Letters: B batch of one process, G batch of all processes together, E embedding size, N instances, R rows held here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sharding import BankShard, gather_rows

BANK_DTYPES = (torch.float32, torch.bfloat16)
NO_DIRECTION = 1e-8  # the length of a vector that has none
_ROWS_AT_ONCE = 1 << 16


def new_bank(
    num_instances: int,
    embed_dim: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    split: BankShard | None = None,
) -> Tensor:
    """Random unit vectors, one per training image.

    Uniform in a cube before normalization, as the paper's code starts its banks.

    Args:
        num_instances: N.
        embed_dim: E.
        generator: Where the numbers come from; torch's default when None.
        dtype: Of the bank.
        split: Which rows to keep; the rows kept are the same numbers as in a whole bank.

    Returns:
        [N, E], or [R, E] of a split bank, each row of length one, up to rounding.
    """
    rank, world = (0, 1) if split is None else (split.rank, split.world)
    bank_RE = torch.empty(len(range(rank, num_instances, world)), embed_dim, dtype=dtype)
    filled = 0
    # In blocks, so that nothing but the rows kept is ever in memory as a whole.
    for start in range(0, num_instances, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, num_instances - start)
        block_E = F.normalize(torch.rand(rows, embed_dim, generator=generator) * 2 - 1, dim=1)
        kept_E = block_E[(rank - start) % world :: world]
        bank_RE[filled : filled + len(kept_E)] = kept_E
        filled += len(kept_E)
    return bank_RE


@torch.no_grad()
def momentum_update(
    bank: Tensor, index_B: Tensor, embedding_BE: Tensor, momentum: float, split: BankShard | None = None
) -> None:
    """bank[index] <- normalize(momentum * bank[index] + (1 - momentum) * embedding), in place.

    An image that appears more than once among the processes' batches (a sampler that pads, repeated
    augmentation) is updated once, with its first appearance, so that the result does not depend on the order
    in which a device happens to write.

    Args:
        bank: Bank, [N, E], or this process's rows of a split one, [R, E]; changed in place.
        index_B: Rows to update by their number in the whole bank, [B].
        embedding_BE: Unit vectors of this step, [B, E].
        momentum: In [0, 1); zero replaces the row.
        split: Of a split bank.
    """
    index_G = gather_rows(index_B).contiguous()
    embedding_GE = gather_rows(embedding_BE.detach())
    embedding_GE = embedding_GE.to(torch.promote_types(bank.dtype, torch.float32))
    ordered_G, order_G = index_G.sort(stable=True)
    source_G = order_G[torch.searchsorted(ordered_G, index_G)]  # where each image appears first
    place_G = index_G
    if split is not None:
        mine_G, place_G = split.find(index_G)
        # Every image writes something, as picking out those that lie here would have to wait for the device: the
        # others repeat what the first that does lie here writes.
        stand_in = mine_G.byte().argmax()
        place_G = torch.where(mine_G, place_G, place_G[stand_in])
        source_G = torch.where(mine_G, source_G, source_G[stand_in])
    old_GE = bank[place_G].to(embedding_GE.dtype)
    new_GE = torch.lerp(embedding_GE[source_G], old_GE, momentum) if momentum else embedding_GE[source_G]
    length_G1 = new_GE.norm(dim=1, keepdim=True)
    usable_G1 = (length_G1 > NO_DIRECTION) & length_G1.isfinite()
    if split is not None:
        usable_G1 &= mine_G.any()
    bank[place_G] = torch.where(usable_G1, (new_GE / length_G1).to(bank.dtype), bank[place_G])


class BankUpdates(nn.Module):
    """A module whose banks are updated by the embeddings of the steps that used them.

    At once, after each loss in training mode; or, with `hold_updates`, when `apply_updates` says that the
    optimizer has stepped, so that a step of several batches is one step for the banks too, and `drop_updates`
    leaves no trace of a step that was not taken.

    Args:
        momentum: Share of the old row in the new one.
        split: Of split banks.
    """

    def __init__(self, momentum: float, split: BankShard | None) -> None:
        super().__init__()
        self.momentum = momentum
        self.split = split
        self.defer_updates = False
        self._held: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def _update(self, bank: str, index_B: Tensor, embedding_BE: Tensor) -> None:
        if self.defer_updates:
            self._held.setdefault(bank, []).append((index_B, embedding_BE.detach()))
        else:
            momentum_update(getattr(self, bank), index_B, embedding_BE, self.momentum, self.split)

    def apply_updates(self) -> None:
        """Update the banks by all that is held; with several processes, in all of them."""
        for bank, parts in self._held.items():
            index_B, embedding_BE = (torch.cat(some) for some in zip(*parts))
            momentum_update(getattr(self, bank), index_B, embedding_BE, self.momentum, self.split)
        self._held = {}

    def discard_updates(self) -> None:
        """Forget what is held."""
        self._held = {}
