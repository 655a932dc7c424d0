"""Training images with their index, in an order that is a pure function of (seed, epoch).

The index that reaches the banks is that of the image delivered, where the next replaces an unreadable one. An image's
augmentation is a function of (seed, epoch, index), so neither workers nor an interruption change what a run sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, get_worker_info

from .decoding import ReplacingDataset


class IndexedDataset(ReplacingDataset):
    """A map-style image dataset whose targets are [target, index delivered, index requested].

    timm's collate and prefetch carry such a target through unchanged, as one [B, 3] tensor. `seed` is that of the
    augmentation; None for transforms that draw nothing.
    """

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[tuple[Any, Tensor]]:
        """A batch at once, as PyTorch's loader asks for it."""
        with nullcontext() if self.seed is None else random_state_kept():
            return [self._sample(*key) if isinstance(key, tuple) else self._sample(0, key) for key in keys]

    def _sample(self, epoch: int, index: int) -> tuple[Any, Tensor]:
        if self.seed is not None:
            seed_transforms(self.seed, epoch, index)
        image, target, delivered = self.read(index)
        return image, torch.tensor([int(target), delivered, index])


def seed_transforms(*key: int, device: torch.device | None = None) -> None:
    """Seed the random states that image transforms draw from, as a function of `key`; that of a GPU too."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    if device is not None and device.type == 'cuda':
        torch.cuda.manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the main process's random states afterwards, also of a GPU: dropout and Mixup draw from them too."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device is not None and device.type == 'cuda' else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class EpochBatches(Sampler):
    """Batches of (epoch, index): a seeded shuffle an epoch, split over processes batch by batch.

    Together the processes' i-th batches are the i-th batch that one process with the global batch size would see. The
    last, incomplete batch is dropped. `batch_size` is that of one process.
    """

    def __init__(self, num_instances: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_instances, self.batch_size, self.seed = num_instances, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0  # the epoch to iterate over, and the batch to begin at

    def __len__(self) -> int:
        return self.num_instances // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_instances)
        for i in range(self.first, len(self)):
            start = (i * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]
