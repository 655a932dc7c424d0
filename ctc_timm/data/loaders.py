"""timm's evaluation loader over any split."""

from __future__ import annotations

import argparse
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
