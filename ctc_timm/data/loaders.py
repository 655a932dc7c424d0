"""timm's evaluation loader over any split."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset, IterableDataset

from .flags import worker_count
from .indexed import NamingDataset


def create_eval_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    distributed: bool = False,
) -> PrefetchLoader:
    """timm's evaluation loader: no augmentation, batches of (images, targets) on the device.

    With several processes each sees its share, padded to the same number of batches; timm's evaluator knows
    which samples are padding.
    """
    named: Any = dataset if isinstance(dataset, (IterableDataset, NamingDataset)) else NamingDataset(dataset)
    return create_loader(
        named,
        input_size=config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=worker_count(args),
        distributed=distributed,
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,
    )


def keep_batches(loader: PrefetchLoader) -> None:
    """Let a loader that gives the same batches each time decode them once; they stay in memory as uint8.

    Args:
        loader: Of `create_eval_loader`.
    """
    inner: Any = _Kept(loader.loader)
    loader.loader = inner


class _Kept:
    """A loader whose batches stay in memory after the first complete pass."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._batches: list[Any] | None = None

    @property
    def dataset(self) -> Any:
        """What timm's evaluator counts."""
        return self._loader.dataset

    @property
    def sampler(self) -> Any:
        """What timm's evaluator asks about padding."""
        return self._loader.sampler

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._batches is not None:
            yield from self._batches
            return
        batches = []
        for batch in self._loader:
            batches.append(batch)
            yield batch
        self._batches = batches
