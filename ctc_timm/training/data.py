"""timm datasets and loaders that also give each image's index."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IterableImageDataset, create_dataset, create_loader, resolve_data_config
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from .. import digits
from ..errors import UserError, nearest
from .arguments import non_negative_int, positive_float, positive_int, probability
from .indexed import EpochBatches, IndexedDataset

STREAMING = ('hfids', 'tfds', 'wds')


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
    group.add_argument('--interpolation', metavar='NAME', help='resize interpolation at evaluation')
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
    group.add_argument('--train-interpolation', default='random', metavar='NAME', help='resize interpolation')


@dataclass
class Source:
    """A split of a data set, checked.

    Attributes:
        dataset: timm's dataset.
        labels_N: Class of each image, [N]; None for streaming sets.
        num_classes: Classes that the set declares, or that its labels show.
        name: As it was asked for.
    """

    dataset: Any
    labels_N: Tensor | None
    num_classes: int | None
    name: str


def open_split(args: argparse.Namespace, split: str, is_training: bool = False, batch_size: int = 1) -> Source:
    """Open a split as the flags say, and read its labels without decoding images.

    Args:
        args: The data flags.
        split: Name of the split.
        is_training: For streaming sets, whether to shuffle.
        batch_size: A hint for streaming sets.

    Raises:
        UserError: Nothing there, an empty class folder, a split that does not exist, labels missing.
    """
    root = args.data_dir or args.data
    name = args.dataset
    if not name and not root:
        raise UserError('name the data: --dataset NAME (digits, hfds/..., torch/...) or --data-dir FOLDER')
    what = f'--dataset {name}' if name else f'--data-dir {root}'
    mode = args.input_img_mode or ('L' if (args.in_chans or 3) == 1 else 'RGB')
    if name == digits.NAME:
        dataset: Any = digits.create_digits(split, mode)
        return Source(dataset, torch.as_tensor(dataset.reader.labels), digits.NUM_CLASSES, name)
    if '/' not in name and not root:
        raise UserError(
            f'--dataset {name}: unknown without --data-dir{nearest(name, (digits.NAME,))}; '
            f'timm reads hfds/NAME, torch/NAME and others, or a folder given by --data-dir'
        )
    if root and '/' not in name and not Path(root).exists():
        raise UserError(f'--data-dir {root}: no such folder or file')
    split = _available_split(name, split)
    options = {'input_key': args.input_key, 'target_key': args.target_key} if '/' in name else {}
    try:
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            class_map=args.class_map or None,
            download=args.dataset_download,
            batch_size=batch_size,
            input_img_mode=mode,
            **options,
        )
    except ImportError as error:
        raise UserError(
            f"{what}: needs a package that is not installed ({error}); pip install 'ctc-timm[data]'"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f'{what}, split {split!r}: {" ".join(str(error).split()) or type(error).__name__}') from None
    if isinstance(dataset, IterableImageDataset):
        return Source(dataset, None, None, name)
    _check_class_folders(dataset, what)
    labels_N = _labels(dataset, what)
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    seen = int(labels_N.max()) + 1
    return Source(dataset, labels_N, max(seen, max(classes.values()) + 1 if classes else 0), name or str(root))


def _available_split(name: str, split: str) -> str:
    """The same split by the name a data set on the Hub gives it: many have 'test' but no 'validation'."""
    if not name.lower().startswith('hfds/'):
        return split
    import datasets

    wanted, bracket, rest = split.partition('[')
    try:
        known = datasets.get_dataset_split_names(name.split('/', 1)[1])
    except Exception:  # whatever is wrong with the data set, opening it says it better
        return split
    if wanted in known:
        return split
    synonyms = ('validation', 'val', 'valid', 'test')
    if wanted in synonyms:
        for other in synonyms:
            if other in known:
                return other + bracket + rest
    raise UserError(f'--dataset {name} has no split {wanted!r}; it has {", ".join(known)}')


def _check_class_folders(dataset: Any, what: str) -> None:
    """Refuse a class folder without images; timm would quietly give it no samples or leave the class out."""
    reader = getattr(dataset, 'reader', None)
    root = getattr(reader, 'root', None)
    if not root or not hasattr(reader, 'samples') or not Path(root).is_dir():
        return
    used = {Path(sample[0]).parent.resolve() for sample in reader.samples}
    for folder in sorted(p for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith('.')):
        if not any(folder.resolve() == u or folder.resolve() in u.parents for u in used):
            raise UserError(f'{what}: class folder {folder.name!r} has no images in it')


def _labels(dataset: Any, what: str) -> Tensor:
    """The labels in order, [N]."""
    reader = getattr(dataset, 'reader', None)
    if reader is not None and hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    elif reader is not None and hasattr(reader, 'samples'):
        labels = [sample[1] for sample in reader.samples]
        if not all(isinstance(label, int) for label in labels):  # tar readers keep labels elsewhere
            labels = list(getattr(reader, 'targets', labels))
    elif hasattr(dataset, 'targets'):
        labels = list(dataset.targets)
    else:
        labels = [dataset[i][1] for i in range(len(dataset))]
    if not labels:
        raise UserError(f'{what}: no images')
    try:
        labels_N = torch.as_tensor([int(label) for label in labels])
    except (TypeError, ValueError):
        raise UserError(f'{what}: labels must be class numbers, one an image') from None
    if int(labels_N.min()) < 0:
        raise UserError(f'{what}: image {int(labels_N.argmin())} has no label')
    return labels_N


def check_labels(source: Source, num_classes: int, split: str) -> None:
    """Refuse a label that the model has no output for.

    Raises:
        UserError: Naming the first such image.
    """
    if source.labels_N is None:
        return
    outside = (source.labels_N >= num_classes).nonzero()
    if len(outside):
        i = int(outside[0])
        raise UserError(
            f'--num-classes {num_classes}: label {int(source.labels_N[i])} of image {i} of split {split!r} lies '
            f'outside; {source.name} needs at least {int(source.labels_N.max()) + 1}'
        )


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Input size, normalisation and interpolation: the flags over the model's own, by timm's rules."""
    return resolve_data_config(vars(args), model=model)


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
        loader = create_loader(
            indexed,
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
        self._loader = create_loader(
            dataset,
            input_size=config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            mean=config['mean'],
            std=config['std'],
            num_workers=worker_count(args),
            pin_memory=args.pin_mem,
            device=device,
        )

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
    return create_loader(
        dataset,
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
