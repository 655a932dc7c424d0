"""Several ranks that train together: rows gathered from all of them, and banks sharded over them.

A sharded bank costs each of P ranks the memory of N / P rows. Sums over all rows stay exact: every rank scores the
embeddings of all ranks against its rows, and the parts are added. What travels is one embedding and one slope an
image, never a bank row, except for the few rows that are asked for by number.

Letters: B batch of one rank, G batch of all ranks (P times B), E embedding size, N instances, R rows of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils.errors import UserError


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, [B, ...] -> [G, ...]; every rank gives B rows. Not differentiable."""
    if not is_distributed():
        return rows
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


@dataclass(frozen=True)
class BankShard:
    """Which rows of a bank a rank holds: row n lies with rank n mod P, at place n // P there.

    Rows are dealt out in turn because images are often sorted by class, as in folders of images. A run of rows would
    hold a few classes only; dealt out, every rank has its share of each class, and so of each image's negatives.

    Args:
        num_instances: N.
        rank: This rank's number.
        world: P.

    Raises:
        UserError: Fewer rows than ranks.
    """

    num_instances: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.num_instances < self.world:
            rows = f'a bank of {self.num_instances} rows cannot be split over {self.world} processes'
            raise UserError(f'`split_banks=True`: {rows}')

    @classmethod
    def of_this_rank(cls, num_instances: int) -> BankShard:
        """Make the shard of this rank; all rows where no others train with it."""
        return cls(num_instances, dist.get_rank(), dist.get_world_size()) if is_distributed() else cls(num_instances)

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
        """Fetch rows of the whole bank from the ranks that hold them, [B, E]; in float32 at least."""
        mine_G, place_G = self.find(gather_rows(index_B))
        rows_GE = torch.where(mine_G[:, None], bank_RE[place_G], 0)
        return self.local_sum(rows_GE.to(torch.promote_types(bank_RE.dtype, torch.float32)))

    def local_sum(self, part_G: Tensor) -> Tensor:
        """Add up all ranks' tensors, in place, and take this rank's images, [G, ...] -> [B, ...]."""
        if self.world > 1:
            dist.all_reduce(part_G)
        return self.local(part_G)

    def max(self, part_G: Tensor) -> Tensor:
        """Take the maximum of all ranks' tensors entry by entry, in place."""
        if self.world > 1:
            dist.all_reduce(part_G, op=dist.ReduceOp.MAX)
        return part_G

    def local(self, all_G: Tensor) -> Tensor:
        """Take this rank's images, [G, ...] -> [B, ...]."""
        return all_G.chunk(self.world)[self.rank]


def fetch_rows(bank: Tensor, index_B: Tensor, shard: BankShard | None) -> Tensor:
    """Read rows by their numbers in the whole bank, [B, E], wherever they lie."""
    return bank[index_B] if shard is None else shard.fetch(bank, index_B)
