"""Several ranks that train together: rows gathered from all of them, and banks sharded over them.

A sharded bank costs each of P ranks the memory of N / P rows. Sums over all rows stay exact: every rank scores the
embeddings of all ranks against its rows, and the parts are added. What travels is one embedding and one slope an image,
and the few bank rows that are asked for by number.

Letters: B batch of one rank, E embedding size, G batch of all ranks that share a bank (P times B), N instances, R rows
of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils.errors import UserError


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, B from each. Not differentiable."""
    if not is_distributed():
        return rows.detach()
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    # PyTorch 2.14 deprecates the older name.
    gather: Any = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
    gather(gathered, rows.detach().contiguous())
    return gathered


@dataclass(frozen=True)
class BankShard:
    """Which rows of a bank a rank holds: row n lies with rank n mod P, at place n // P there. P of one is a whole bank.

    Images are often sorted by class, and a run of rows would hold a few classes only. Dealt out in turn, every rank has
    its share of each class, and so of each image's negatives. Raises UserError on fewer rows than ranks.
    """

    num_instances: int  # N
    rank: int = 0
    world: int = 1  # P

    def __post_init__(self) -> None:
        if self.num_instances < self.world:
            rows = f'a bank of {self.num_instances} rows'
            raise UserError(f'`split_banks=True`: {rows} cannot be split over {self.world} processes')

    @classmethod
    def create(cls, num_instances: int, split_banks: bool) -> BankShard:
        """Make the shard of this rank; of a whole bank where banks are not split or no others train with it."""
        split = split_banks and is_distributed()
        return cls(num_instances, dist.get_rank(), dist.get_world_size()) if split else cls(num_instances)

    @property
    def num_rows(self) -> int:
        """R: N / P, one more on the first N mod P ranks."""
        return len(range(self.rank, self.num_instances, self.world))

    def rows(self, device: torch.device | str = 'cpu') -> Tensor:
        """Number this rank's rows as in the whole bank, [R], in the order of their places."""
        return torch.arange(self.rank, self.num_instances, self.world, device=device)

    def find(self, index_G: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which of these rows lie here, [G] booleans, and their places, [G]; any valid place for the others."""
        return index_G % self.world == self.rank, (index_G // self.world).clamp_(max=self.num_rows - 1)

    def fetch(self, bank_RE: Tensor, index_B: Tensor) -> Tensor:
        """Read rows by their numbers in the whole bank, [B, E], from the ranks that hold them."""
        if self.world == 1:
            return bank_RE[index_B]
        mine_G, place_G = self.find(gather_rows(index_B))
        rows_GE = torch.where(mine_G[:, None], bank_RE[place_G], 0)
        return self.local(self.sum(rows_GE.to(torch.promote_types(bank_RE.dtype, torch.float32))))

    def gather(self, rows: Tensor) -> Tensor:
        """Gather what is looked up in this shard, [B, ...] -> [G, ...]. Not differentiable."""
        return rows.detach() if self.world == 1 else gather_rows(rows)

    def local(self, rows: Tensor) -> Tensor:
        """Take this rank's images of all, [G, ...] -> [B, ...]."""
        return rows.chunk(self.world)[self.rank]

    def sum(self, part: Tensor) -> Tensor:
        """Add up the tensors of all shards, in place."""
        if self.world > 1:
            dist.all_reduce(part)
        return part
