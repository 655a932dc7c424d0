"""timm's loaders, that also give each image's index, and timm's augmentation flags."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..cli.arguments import number, positive_float, probability, whole_number
from ..utils.errors import UserError
from . import workers
from .cached import CachedDataset, cache_images
from .datasets import DatasetSplit
from .erasing import erase
from .indexed import EpochBatches, IndexedDataset
from .loaders import create_eval_loader
from .transforms import INTERPOLATIONS, LARGEST_SIDE, worker_count


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's augmentation flags."""
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', help='none at all')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='random crop')
    group.add_argument('--scale', type=positive_float, nargs=2, metavar='F', help='random resize, area range')
    group.add_argument('--ratio', type=positive_float, nargs=2, metavar='F', help='random resize, aspect range')
    group.add_argument(
        '--crop-padding',
        type=whole_number(0, LARGEST_SIDE),
        default=0,
        metavar='PIXELS',
        help='first pad by this and crop back to --img-size at random, as is usual for 32x32 images',
    )
    group.add_argument('--hflip', type=probability, default=0.5, metavar='P', help='horizontal flip')
    group.add_argument('--vflip', type=probability, default=0.0, metavar='P', help='vertical flip')
    group.add_argument('--color-jitter', type=number(0, 100), default=0.4, metavar='F', help='color jitter factor')
    group.add_argument('--color-jitter-prob', type=probability, metavar='P', help='of color jitter')
    group.add_argument('--grayscale-prob', type=probability, default=0.0, metavar='P', help='of grayscale')
    group.add_argument('--gaussian-blur-prob', type=probability, default=0.0, metavar='P', help='of blur')
    group.add_argument('--aa', metavar='POLICY', help="timm's auto-augment string, such as rand-m9-mstd0.5")
    group.add_argument('--reprob', type=probability, default=0.0, metavar='P', help='random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='random erasing fill')
    group.add_argument('--recount', type=whole_number(1, 1000), default=1, metavar='N', help='random erasing regions')
    group.add_argument(
        '--train-interpolation', default='random', choices=('random', *INTERPOLATIONS), help='resize interpolation'
    )


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


def _with_padded_crop(steps: list[Any], padding: int, size: tuple[int, int]) -> list[Any]:
    """timm's transforms behind a padded crop, where there is one, without those that change nothing.

    For small images what changes nothing costs as much as what does: a resized crop of the whole of a crop that has
    the size already, and a color jitter of nothing.
    """
    crop = [transforms.RandomCrop(size, padding, pad_if_needed=True)] if padding else []
    kept = []
    for step in steps:
        whole = isinstance(step, RandomResizedCropAndInterpolation) and {*step.scale, *step.ratio} == {1.0}
        if whole and padding and size[0] == size[1]:
            continue
        if isinstance(step, transforms.ColorJitter):
            factors = step.brightness, step.contrast, step.saturation, step.hue
            if all(factor is None for factor in factors):
                continue
        kept.append(step)
    return crop + kept


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
        unreadable: Names of the files that could not be read so far, each once; known at the end of an epoch.

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
        if isinstance(indexed.transform, transforms.Compose):
            size = config['input_size'][-2:]
            indexed.transform.transforms = _with_padded_crop(indexed.transform.transforms, args.crop_padding, size)
            if isinstance(dataset, CachedDataset):
                dataset.on_arrays(size)
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
        self._erasing: RandomErasing | None = loader.random_erasing
        loader.random_erasing = None  # type: ignore[assignment]  # timm would draw from the program's random state
        if self._erasing is not None and device.type != 'cuda':
            self._erasing.device = torch.device('cpu')  # whose random state can be kept
        self._loader: PrefetchLoader = loader
        self._indexed = indexed
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.unreadable: list[str] = []

    @property
    def skipped(self) -> int:
        """How many images could not be read so far and were replaced by the next; waits for the device."""
        return int(self._skipped)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration goes through, and at which batch it begins."""
        self.batches.epoch, self.batches.first = epoch, first

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with workers.translate_errors():
            for (images, rows_B3), keys in zip(self._loader, self.batches):
                if self._erasing is not None:
                    erase(self._erasing, images, keys, self.batches.seed)
                targets_B, index_B, asked_B = rows_B3.unbind(dim=1)
                self._skipped += (index_B != asked_B).sum()
                yield images, targets_B, index_B
        self.unreadable += self._indexed.tell_unread()


def cached(args: argparse.Namespace, source: DatasetSplit, quiet: bool = False) -> DatasetSplit:
    """The same split with its images decoded and in memory.

    Raises:
        UserError: A streaming set, or not enough memory.
    """
    if source.labels_N is None:
        raise UserError(f'--cache-dataset: {args.dataset} is a stream, of which nothing is kept; leave the flag out')
    return replace(source, dataset=cache_images(source.dataset, quiet))


class StreamLoader:
    """Batches of (images, targets, None) of a streaming set, for plain training; timm's own loader."""

    skipped = 0
    unreadable: list[str] = []

    def __init__(self, dataset: Any, args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> None:
        self._dataset = dataset
        self._first = 0
        self._loader = _create_train_loader(dataset, args, config, device)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Tell the reader which epoch to shuffle for; batches before the first are read and left out."""
        self._dataset.set_epoch(epoch)
        self._first = first

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        with workers.translate_errors():
            for images, targets in islice(self._loader, self._first, None):
                yield images, targets, None


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
        source: DatasetSplit,
        args: argparse.Namespace,
        config: dict[str, Any],
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        self._loader = create_eval_loader(IndexedDataset(source.dataset), args, config, device, distributed, tell=False)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, rows_B3 in self._loader:
            yield images, rows_B3[:, 0], rows_B3[:, 1]


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps in an epoch; a last, smaller group of batches is a step too."""
    return math.ceil(batches / accumulation)
