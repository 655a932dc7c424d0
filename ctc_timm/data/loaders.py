"""timm's evaluation loader over any split."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset, IterableDataset

from . import workers
from .decoding import NamingDataset
from .transforms import worker_count


def create_eval_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    distributed: bool = False,
    tell: bool = True,
) -> PrefetchLoader:
    """timm's evaluation loader: no augmentation, batches of (images, targets) on the device.

    With several processes each sees its share, padded to the same number of batches; timm's evaluator knows
    which samples are padding.

    As in timm the next image, with its own target, stands in for one that can't be read. At the end of a pass one
    line says which those were, each once.

    Args:
        dataset: Map-style, or a stream.
        args: Data flags.
        config: Of `data_config`.
        device: Where batches go.
        distributed: Whether several processes share the pass.
        tell: Print that line.
    """
    named: Any = dataset if isinstance(dataset, (IterableDataset, NamingDataset)) else NamingDataset(dataset)
    loader = create_loader(
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
    watched: Any = _Watched(loader.loader, tell and isinstance(named, NamingDataset))
    loader.loader = watched
    return loader


def keep_batches(loader: PrefetchLoader) -> None:
    """Let a loader that gives the same batches each time decode them once; they stay in memory as uint8.

    Args:
        loader: Of `create_eval_loader`.
    """
    inner: Any = _Kept(loader.loader)
    loader.loader = inner


class _Batches:
    """A loader's batches by another way; PyTorch's loader in all else that timm asks for."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Watched(_Batches):
    """A loader whose workers' errors are told in a line, and the images that can't be read."""

    def __init__(self, loader: Any, tell: bool) -> None:
        super().__init__(loader)
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        with workers.translate_errors():
            yield from self._loader
        if self._tell:
            self._loader.dataset.tell_unread()


class _Kept(_Batches):
    """A loader whose batches stay in memory after the first complete pass."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._batches: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._batches is not None:
            yield from self._batches
            return
        batches = []
        for batch in self._loader:
            batches.append(batch)
            yield batch
        self._batches = batches
