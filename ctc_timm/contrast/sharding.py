"""Several processes that train together: rows gathered from all of them, and banks split over them.

A split bank costs each of P processes the memory of N / P rows. Sums over all rows stay exact: every process
scores the embeddings of all processes against its own rows, and the parts are added. What travels is one
embedding and one slope an image, never a bank row, except for the few rows that are asked for by number.

Letters: B batch of one process, G batch of all processes together (P times B), E embedding size, N instances,
P processes, R rows of one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


@dataclass(frozen=True)
class BankShard:
    """Which rows of a bank this process holds: row n lies with process n mod P, at place n // P there.

    Dealing rows out in turn and not in runs matters where images are sorted by class, as in folders of images: a
    run of rows would hold a few classes only, while here every process has its share of each class, and so of
    each image's negatives.

    Args:
        num_instances: N.
        rank: This process's number.
        world: P.

    Raises:
        ValueError: Fewer rows than processes.
    """

    num_instances: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.num_instances < self.world:
            raise ValueError(f'a bank of {self.num_instances} rows cannot be split over {self.world} processes')

    @classmethod
    def of_processes(cls, num_instances: int) -> BankShard:
        """The split over the processes that train together; over this one alone where there are no others."""
        if not across_processes():
            return cls(num_instances)
        return cls(num_instances, dist.get_rank(), dist.get_world_size())

    @property
    def num_rows(self) -> int:
        """R: N / P, one more in the first N mod P processes."""
        return len(range(self.rank, self.num_instances, self.world))

    def rows(self, device: torch.device | str = 'cpu') -> Tensor:
        """The numbers of this process's rows in the whole bank, [R], in the order of their places."""
        return torch.arange(self.rank, self.num_instances, self.world, device=device)

    def find(self, index_G: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these rows lie here, [G] booleans, and their places, [G]; any valid place for the others."""
        return index_G % self.world == self.rank, (index_G // self.world).clamp_(max=self.num_rows - 1)

    def fetch(self, bank_RE: Tensor, index_B: Tensor) -> Tensor:
        """Rows of the whole bank, each from the process that holds it, [B, E]; in float32 at least."""
        mine_G, place_G = self.find(gather_rows(index_B))
        rows_GE = torch.where(mine_G[:, None], bank_RE[place_G], 0)
        rows_GE = rows_GE.to(torch.promote_types(bank_RE.dtype, torch.float32))
        return self.own(self.add(rows_GE))

    def add(self, part: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place."""
        if self.world > 1:
            dist.all_reduce(part)
        return part

    def highest(self, part: Tensor) -> Tensor:
        """The maximum of all processes' tensors, entry by entry, in place."""
        if self.world > 1:
            dist.all_reduce(part, op=dist.ReduceOp.MAX)
        return part

    def own(self, all_G: Tensor) -> Tensor:
        """This process's images among those of all, [G, ...] -> [B, ...]."""
        size = all_G.shape[0] // self.world
        return all_G[self.rank * size : (self.rank + 1) * size]


def fetch_rows(bank: Tensor, index_B: Tensor, split: BankShard | None) -> Tensor:
    """Rows by their numbers in the whole bank, [B, E], wherever they lie."""
    return bank[index_B] if split is None else split.fetch(bank, index_B)
