"""timm datasets and loaders that also give each image's index."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_loader, resolve_data_config
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from ..errors import UserError
from .arguments import non_negative_int, positive_float, positive_int, probability
from .indexed import EpochBatches, IndexedDataset, NamingDataset
from .splits import Source as Source
from .splits import check_labels as check_labels
from .splits import is_streaming as is_streaming
from .splits import open_split as open_split

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


def add_dataset_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    """Declare timm's flags for where images come from and how they are sized and normalised.

    Args:
        parser: Gets the flags.
        positional: Whether the folder may stand without a flag, as in timm's training script.
    """
    group = parser.add_argument_group('Data')
    parser.set_defaults(data=None)
    if positional:
        group.add_argument('data', nargs='?', metavar='DIR', help='folder with the images, same as --data-dir')
    group.add_argument('--data-dir', metavar='DIR', help='folder with the images')
    group.add_argument(
        '--dataset',
        default='',
        metavar='NAME',
        help="any name that timm's create_dataset takes (hfds/..., torch/..., a folder or tar reader), or digits",
    )
    group.add_argument(
        '--train-split',
        default='train',
        metavar='NAME',
        help="training split; hfds and digits also take slices, 'train[:10000]'",
    )
    group.add_argument('--val-split', default='validation', metavar='NAME', help='validation split')
    for split in ('train', 'val'):
        group.add_argument(
            f'--{split}-num-samples',
            type=positive_int,
            metavar='N',
            help='images in a streaming set that does not say how many it has',
        )
    group.add_argument('--dataset-download', action='store_true', help='let torch/, tfds/ and hfids/ datasets download')
    group.add_argument('--class-map', default='', metavar='FILE', help='class to index mapping')
    group.add_argument('--input-img-mode', metavar='MODE', help='PIL mode images are converted to')
    group.add_argument('--input-key', metavar='KEY', help='column of the images')
    group.add_argument('--target-key', metavar='KEY', help='column of the labels')
    group.add_argument('--img-size', type=positive_int, metavar='N', help='image size, square')
    group.add_argument('--in-chans', type=positive_int, metavar='N', help='image channels')
    group.add_argument(
        '--input-size', type=positive_int, nargs=3, metavar=('C', 'H', 'W'), help='image channels, height and width'
    )
    group.add_argument('--crop-pct', type=positive_float, metavar='F', help='centre crop share at evaluation')
    group.add_argument('--crop-mode', choices=('squash', 'border', 'center'), help='crop at evaluation')
    group.add_argument('--mean', type=float, nargs='+', metavar='M', help='channel means, of 1')
    group.add_argument('--std', type=positive_float, nargs='+', metavar='S', help='channel standard deviations')
    group.add_argument('--interpolation', choices=INTERPOLATIONS, help='resize interpolation at evaluation')
    group.add_argument('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='of each process')
    group.add_argument(
        '-vb', '--validation-batch-size', type=positive_int, metavar='N', help='--batch-size when not given'
    )
    group.add_argument('-j', '--workers', type=non_negative_int, default=4, metavar='N', help='data loading processes')
    group.add_argument('--pin-mem', action='store_true', help='pin memory for faster transfer to a GPU')


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's augmentation flags."""
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', help='none at all')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='random crop')
    group.add_argument('--scale', type=positive_float, nargs=2, metavar='F', help='random resize, area range')
    group.add_argument('--ratio', type=positive_float, nargs=2, metavar='F', help='random resize, aspect range')
    group.add_argument(
        '--crop-padding',
        type=non_negative_int,
        default=0,
        metavar='PIXELS',
        help='first pad by this and crop back to --img-size at random, as is usual for 32x32 images',
    )
    group.add_argument('--hflip', type=probability, default=0.5, metavar='P', help='horizontal flip')
    group.add_argument('--vflip', type=probability, default=0.0, metavar='P', help='vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='F', help='colour jitter factor')
    group.add_argument('--color-jitter-prob', type=probability, metavar='P', help='of colour jitter')
    group.add_argument('--grayscale-prob', type=probability, default=0.0, metavar='P', help='of grayscale')
    group.add_argument('--gaussian-blur-prob', type=probability, default=0.0, metavar='P', help='of blur')
    group.add_argument('--aa', metavar='POLICY', help="timm's auto-augment string, such as rand-m9-mstd0.5")
    group.add_argument('--reprob', type=probability, default=0.0, metavar='P', help='random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='random erasing fill')
    group.add_argument('--recount', type=positive_int, default=1, metavar='N', help='random erasing regions')
    group.add_argument(
        '--train-interpolation', default='random', choices=('random', *INTERPOLATIONS), help='resize interpolation'
    )


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Input size, normalisation and interpolation: the flags over the model's own, by timm's rules.

    Raises:
        UserError: As many means or deviations as there are neither channels nor one.
    """
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for flag, values in (('--mean', args.mean), ('--std', args.std)):
        if values is not None and len(values) not in (1, channels):
            words = ' '.join(map(str, values))
            raise UserError(f'{flag} {words}: {len(values)} values for {channels} channel(s); give {channels}')
    return resolve_data_config(vars(args), model=model)


def _create_train_loader(
    dataset: Any, args: argparse.Namespace, config: dict[str, Any], device: torch.device
) -> PrefetchLoader:
    """timm's training loader as the flags say."""
    try:
        return create_loader(
            dataset,
            input_size=config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            mean=config['mean'],
            std=config['std'],
            num_workers=worker_count(args),
            pin_memory=args.pin_mem,
            device=device,
        )
    except (AssertionError, ValueError, KeyError) as error:
        if not args.aa:
            raise
        raise UserError(
            f'--aa {args.aa}: {" ".join(str(error).split())}; use a policy such as rand-m9-mstd0.5, augmix-m5, '
            f'3a, original or v0'
        ) from None


class TrainLoader:
    """Batches of (images, targets, index) on the device, in an order that only seed and epoch decide.

    Built by timm's `create_loader`, with the order put in place of its shuffle.

    Args:
        dataset: Map-style image dataset.
        args: Data and augmentation flags.
        config: Of `data_config`.
        device: Where batches go.
        rank: This process.
        world_size: How many processes.

    Attributes:
        skipped: How many images could not be read so far and were replaced by the next.

    Raises:
        UserError: Fewer images than one global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        config: dict[str, Any],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        indexed = IndexedDataset(dataset, seed=args.seed)
        loader = _create_train_loader(indexed, args, config, device)
        if args.crop_padding:
            size = config['input_size'][-2:]
            indexed.transform.transforms.insert(0, transforms.RandomCrop(size, args.crop_padding, pad_if_needed=True))
        self.batches = EpochBatches(len(indexed), args.batch_size, args.seed, rank, world_size)
        if not len(self.batches):
            raise UserError(
                f'--batch-size {args.batch_size} times {world_size} process(es) is more than the {len(indexed)} '
                f'training images; use at most {max(1, len(indexed) // world_size)}'
            )
        inner = loader.loader
        loader.loader = DataLoader(
            inner.dataset,
            batch_sampler=self.batches,
            num_workers=inner.num_workers,
            collate_fn=inner.collate_fn,
            pin_memory=inner.pin_memory,
            worker_init_fn=inner.worker_init_fn,
            persistent_workers=inner.persistent_workers,
            generator=torch.Generator(),  # workers' seeds must not draw from the state that dropout draws from
        )
        self._loader: PrefetchLoader = loader
        self.skipped = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration goes through, and at which batch it begins."""
        self.batches.epoch, self.batches.first = epoch, first

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, rows_B3 in self._loader:
            targets_B, index_B, asked_B = rows_B3.unbind(dim=1)
            self.skipped += int((index_B != asked_B).sum())
            yield images, targets_B, index_B


class StreamLoader:
    """Batches of (images, targets, None) of a streaming set, for plain training; timm's own loader."""

    skipped = 0

    def __init__(self, dataset: Any, args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> None:
        self._dataset = dataset
        self._loader = _create_train_loader(dataset, args, config, device)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Tell the reader which epoch to shuffle for."""
        self._dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        for images, targets in self._loader:
            yield images, targets, None


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


class RefreshLoader:
    """One pass over the training set without augmentation: batches of (images, targets, index).

    Args:
        source: The training split, opened anew: its transform is set.
        args: Data flags.
        config: Of `data_config`.
        device: Where batches go.
        distributed: Whether several processes share the pass.
    """

    def __init__(
        self,
        source: Source,
        args: argparse.Namespace,
        config: dict[str, Any],
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        self._loader = create_eval_loader(IndexedDataset(source.dataset), args, config, device, distributed)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, rows_B3 in self._loader:
            yield images, rows_B3[:, 0], rows_B3[:, 1]


def worker_count(args: argparse.Namespace) -> int:
    """`--workers`, but no more than there are processors to run them on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(args.workers, usable)


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimiser steps in an epoch; a last, smaller group of batches is a step too."""
    return math.ceil(batches / accumulation)
