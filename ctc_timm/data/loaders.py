"""timm's loaders: training images with their index in a seeded order, streams, and passes without augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from ..utils.errors import UserError, one_line
from .cached import CachedDataset
from .datasets import DatasetSplit
from .decoding import ReplacingDataset, fetch_batches
from .indexed import EpochBatches, IndexedDataset, random_state_kept, seed_transforms
from .settings import AugmentationSettings, LoaderSettings
from .transforms import worker_count

_TIMM_NAMES = {
    'aa': 'auto_augment',
    'reprob': 're_prob',
    'remode': 're_mode',
    'recount': 're_count',
    'train_interpolation': 'interpolation',
}
_ERASING = 1  # its draws are apart from those of the image's other transforms


def create_eval_loader(
    dataset: Dataset,
    loader: LoaderSettings,
    config: dict[str, Any],
    device: torch.device,
    distributed: bool = False,
    keep: bool = False,
    log_unreadable: bool = True,
) -> PrefetchLoader:
    """Create timm's evaluation loader: no augmentation, batches of (images, targets) on the device.

    With several processes each sees its share, padded to the same number of batches; timm's evaluator knows which
    samples are padding. The next image, with its own target, replaces an unreadable one.

    Args:
        dataset: Map-style, or a stream.
        loader: Batch size and processes.
        config: Of `data_config`.
        device: Where batches go.
        distributed: Whether several processes share the pass.
        keep: Keep the batches of the first complete pass in memory, as uint8, for the passes that follow.
        log_unreadable: Log the names of unreadable images at the end of a pass, each once.
    """
    if not isinstance(dataset, (IterableDataset, ReplacingDataset)):
        dataset = ReplacingDataset(dataset)
    created = _create_loader(
        dataset,
        loader,
        config,
        device,
        batch_size=loader.validation_batch_size or loader.batch_size,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        distributed=distributed,
        persistent_workers=False,
    )
    batches: Any = _EvalBatches(created.loader, keep, log_unreadable and isinstance(dataset, ReplacingDataset))
    created.loader = batches
    return created


class _EvalBatches:
    """PyTorch's loader with errors of one line and names of unreadable images; it may keep its batches."""

    def __init__(self, loader: DataLoader, keep: bool, log_unreadable: bool) -> None:
        self._loader = loader
        self._keep = keep
        self._log_unreadable = log_unreadable
        self._kept: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:  # what timm asks a loader for
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        batches = []
        for batch in fetch_batches(self._loader):
            if self._keep:
                batches.append(batch)
            yield batch
        self._kept = batches if self._keep else None
        if self._log_unreadable:
            self._loader.dataset.log_unreadable()  # type: ignore[attr-defined]


class TrainLoader:
    """Batches of (images, targets, index) on the device, in an order that is a function of seed and epoch.

    Built by timm's `create_loader`; the seeded order replaces its shuffle, and seeded erasing its erasing.

    Args:
        dataset: Map-style image dataset.
        loader: Batch size and processes.
        augmentation: timm's.
        config: Of `data_config`.
        device: Where batches go.
        seed: Of order and augmentation.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        unreadable: Names of the unreadable files of the epochs that are done, each once.

    Raises:
        UserError: Fewer images than one global batch, or an unknown augmentation policy.
    """

    def __init__(
        self,
        dataset: Dataset,
        loader: LoaderSettings,
        augmentation: AugmentationSettings,
        config: dict[str, Any],
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._indexed = IndexedDataset(dataset, seed)
        self._loader = _create_train_loader(self._indexed, loader, augmentation, config, device)
        if isinstance(self._indexed.transform, transforms.Compose):
            _adapt_to_small_images(self._indexed.transform, augmentation.crop_padding, config['input_size'][-2:])
            if isinstance(dataset, CachedDataset):
                dataset.use_tensors_if_possible()
        self.batches = EpochBatches(len(self._indexed), loader.batch_size, seed, rank, world_size)
        if not len(self.batches):
            raise UserError(
                f'`batch_size` {loader.batch_size} times {world_size} process(es) is more than the '
                f'{len(self._indexed)} training images; use at most {max(1, len(self._indexed) // world_size)}'
            )
        inner = self._loader.loader
        self._loader.loader = DataLoader(
            inner.dataset,
            batch_sampler=self.batches,
            num_workers=inner.num_workers,
            collate_fn=inner.collate_fn,
            pin_memory=inner.pin_memory,
            worker_init_fn=inner.worker_init_fn,
            persistent_workers=inner.persistent_workers,
            generator=torch.Generator(),  # workers' seeds must not draw from the state that dropout draws from
        )
        self._erasing: RandomErasing | None = self._loader.random_erasing
        self._loader.random_erasing = None  # type: ignore[assignment]  # it would draw from the program's random state
        if self._erasing is not None and device.type != 'cuda':
            self._erasing.device = torch.device('cpu')  # whose random state can be restored
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.unreadable: list[str] = []

    @property
    def skipped(self) -> int:
        """Number of unreadable images so far, replaced by the next. Waits for the device."""
        return int(self._skipped)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch of the next iteration, and the batch at which it begins."""
        self.batches.epoch, self.batches.first = epoch, first_batch

    def image_names(self, batch: tuple[Any, ...]) -> list[str]:
        """Names of a batch's images."""
        return [self._indexed.name(index) for index in batch[2].tolist()]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (images, rows_B3), keys in zip(fetch_batches(self._loader), self.batches):
            if self._erasing is not None:
                erase(self._erasing, images, keys, self.batches.seed)
            targets_B, index_B, requested_B = rows_B3.unbind(dim=1)
            self._skipped += (index_B != requested_B).sum()
            yield images, targets_B, index_B
        self.unreadable += self._indexed.log_unreadable()


class StreamLoader:
    """Batches of (images, targets, None) of a stream, for supervised training, by timm's own loader.

    Args:
        dataset: Of a streaming reader, which itself skips what it can't read.
        loader: Batch size and processes.
        augmentation: timm's.
        config: Of `data_config`.
        device: Where batches go.
    """

    skipped = None  # not counted
    unreadable: list[str] = []

    def __init__(
        self,
        dataset: Any,
        loader: LoaderSettings,
        augmentation: AugmentationSettings,
        config: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._first_batch = 0
        self._loader = _create_train_loader(dataset, loader, augmentation, config, device)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch to shuffle for; batches before the first are read and dropped."""
        self._dataset.set_epoch(epoch)
        self._first_batch = first_batch

    def image_names(self, batch: tuple[Any, ...]) -> list[str]:
        """Nothing: a stream's images have no names."""
        return []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        for images, targets in islice(fetch_batches(self._loader), self._first_batch, None):
            yield images, targets, None


class RefreshLoader:
    """One pass over the training set without augmentation: batches of (images, targets, index).

    Args:
        source: The training split, opened anew: its transform is set.
        loader: Batch size and processes.
        config: Of `data_config`.
        device: Where batches go.
        distributed: Whether several processes share the pass.
    """

    def __init__(
        self,
        source: DatasetSplit,
        loader: LoaderSettings,
        config: dict[str, Any],
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        dataset = IndexedDataset(source.dataset)
        self._loader = create_eval_loader(dataset, loader, config, device, distributed, log_unreadable=False)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, rows_B3 in self._loader:
            yield images, rows_B3[:, 0], rows_B3[:, 1]


def erase(erasing: RandomErasing, images_BCHW: Tensor, keys: Iterable[tuple[int, int]], seed: int) -> None:
    """Erase in place by timm's random erasing, as a function of (seed, epoch, index).

    timm draws from the program's random state on the device, a batch ahead: what an image loses would depend on the
    batches before it.

    Args:
        erasing: Its fill is drawn on its `device`.
        images_BCHW: Normalized.
        keys: Epoch and index of each image.
        seed: Of the run.
    """
    device = torch.device(erasing.device)
    with random_state_kept(device):
        for image_CHW, (epoch, index) in zip(images_BCHW, keys):
            seed_transforms(seed, epoch, index, _ERASING, device=device)
            erasing(image_CHW)


def _create_loader(
    dataset: Any, loader: LoaderSettings, config: dict[str, Any], device: torch.device, **options: Any
) -> PrefetchLoader:
    return create_loader(
        dataset,
        input_size=config['input_size'],
        mean=config['mean'],
        std=config['std'],
        num_workers=worker_count(loader.workers),
        pin_memory=loader.pin_mem,
        device=device,
        **options,
    )


def _create_train_loader(
    dataset: Any,
    loader: LoaderSettings,
    augmentation: AugmentationSettings,
    config: dict[str, Any],
    device: torch.device,
) -> PrefetchLoader:
    """Create timm's training loader."""
    policy = augmentation.aa
    try:
        create_transform(config['input_size'], is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f'`aa` {policy}: {one_line(error)}; use a policy such as rand-m9-mstd0.5, augmix-m5, 3a, original or v0'
        ) from None
    options = dataclasses.asdict(augmentation)
    del options['crop_padding']
    options = {_TIMM_NAMES.get(name, name): value for name, value in options.items()}
    return _create_loader(dataset, loader, config, device, batch_size=loader.batch_size, is_training=True, **options)


def _adapt_to_small_images(transform: transforms.Compose, padding: int, size: tuple[int, int]) -> None:
    """Put a padded crop before timm's transforms, and drop those that change nothing.

    For small images a transform that changes nothing costs as much as one that does: a resized crop of a whole image
    that has the size already, and a color jitter of nothing.
    """
    kept: list[Any] = [transforms.RandomCrop(size, padding, pad_if_needed=True)] if padding else []
    for step in transform.transforms:
        whole = isinstance(step, RandomResizedCropAndInterpolation) and {*step.scale, *step.ratio} == {1.0}
        if whole and padding and size[0] == size[1]:
            continue
        if (
            isinstance(step, transforms.ColorJitter)
            and step.brightness is step.contrast is step.saturation is step.hue is None
        ):
            continue
        kept.append(step)
    transform.transforms = kept
