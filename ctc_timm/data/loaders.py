"""timm's loaders: training images with their index in a seeded order, streams, and passes without augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from ..utils.errors import UserError, one_line
from .cached import CachedDataset
from .datasets import DatasetSplit
from .decoding import ReplacingDataset, fetch_batches
from .indexed import EpochBatches, IndexedDataset, random_state_kept, seed_transforms
from .settings import AugmentationSettings, LoaderSettings
from .transforms import worker_count

Config = dict[str, Any]  # of `data_config`
_ERASING = 1  # its draws are apart from those of the image's other transforms


def create_eval_loader(
    dataset: Any,
    loader: LoaderSettings,
    config: Config,
    device: torch.device,
    distributed: bool = False,
    keep: bool = False,
) -> PrefetchLoader:
    """Create timm's evaluation loader: no augmentation, batches of (images, targets) on the device.

    With several processes each sees its share, padded to the same number of batches; timm's evaluator knows which
    samples are padding. The next image, with its own target, replaces an unreadable one; a log line names those.

    Args:
        dataset: Map-style, or a stream.
        loader, config, device: Batch size and processes, normalization, and where batches go.
        distributed: Whether several processes share the pass.
        keep: Keep the batches of the first complete pass in memory, as uint8, for the passes that follow.
    """
    plain = not isinstance(dataset, (IterableDataset, ReplacingDataset))
    images: Any = ReplacingDataset(dataset) if plain else dataset
    created = create_loader(
        images,
        batch_size=loader.validation_batch_size or loader.batch_size,
        **{key: config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')},
        num_workers=worker_count(loader.workers),
        distributed=distributed,
        pin_memory=loader.pin_mem,
        device=device,
        persistent_workers=False,
    )
    created.loader.generator = torch.Generator()  # a pass must not draw from the state that dropout draws from
    created.loader = _EvalBatches(created.loader, keep, log_unreadable=plain)
    return created


class _EvalBatches:
    """PyTorch's loader with errors of one line and names of unreadable images; it may keep its batches."""

    def __init__(self, loader: Any, keep: bool, log_unreadable: bool) -> None:
        self._loader, self._keep, self._log_unreadable = loader, keep, log_unreadable
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
            self._loader.dataset.log_unreadable()


class RefreshLoader:
    """One pass over a training split, loaded as by `create_eval_loader`: batches of (images, targets, index)."""

    def __init__(self, source: DatasetSplit, *loading: Any, **options: Any) -> None:
        self._loader = create_eval_loader(IndexedDataset(source.dataset), *loading, **options)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, rows_B3 in self._loader:
            yield images, rows_B3[:, 0], rows_B3[:, 1]


class EpochLoader:
    """Batches of a dataset whose items go by (epoch, index), in an order that is a function of seed and epoch.

    Raises:
        UserError: Fewer images than one global batch.
    """

    def __init__(
        self, dataset: Any, loader: LoaderSettings, seed: int, rank: int, world_size: int, collate: Callable[..., Any]
    ) -> None:
        count, workers = len(dataset), worker_count(loader.workers)
        self.batches = EpochBatches(count, loader.batch_size, seed, rank, world_size)
        if not len(self.batches):
            asked = f'`batch_size` {loader.batch_size} times {world_size} process(es)'
            hint = f'use at most {max(1, count // world_size)}'
            raise UserError(f'{asked} is more than the {count} training images; {hint}')
        self.loader: Any = DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=loader.pin_mem,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # workers' seeds must not draw from the state that dropout draws from
        )
        self.unreadable: list[str] = []  # files of the epochs that are done, each once

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch of the next iteration, and the batch at which it begins."""
        self.batches.epoch, self.batches.first = epoch, first_batch


class TrainLoader(EpochLoader):
    """Batches of (images, targets, index) on the device, in an order that is a function of seed and epoch.

    The batch size is that of each of `world_size` processes, of which this is `rank`.

    Raises:
        UserError: Fewer images than one global batch, or an unknown augmentation policy.
    """

    def __init__(
        self,
        dataset: Any,
        loader: LoaderSettings,
        augmentation: AugmentationSettings,
        config: Config,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._indexed = IndexedDataset(dataset, seed)
        transform = create_transform(**_train_options(augmentation, config), use_prefetcher=True)
        if augmentation.crop_padding:
            transform = _with_padded_crop(transform, augmentation.crop_padding, config['input_size'][-2:])
        cached = isinstance(dataset, CachedDataset)
        self._indexed.transform = dataset.faster_transform(transform) if cached else transform
        super().__init__(self._indexed, loader, seed, rank, world_size, fast_collate)
        self.loader = PrefetchLoader(self.loader, config['mean'], config['std'], config['input_size'][0], device)
        self._erasing: RandomErasing | None = None
        if augmentation.reprob > 0 and not augmentation.no_aug:
            drawing = device if device.type == 'cuda' else 'cpu'  # whose random state can be restored
            options = {'mode': augmentation.remode, 'max_count': augmentation.recount, 'device': drawing}
            self._erasing = RandomErasing(augmentation.reprob, **options)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def skipped(self) -> int:
        """Number of unreadable images so far, replaced by the next. Waits for the device."""
        return int(self._skipped)

    def image_names(self, batch: tuple[Any, ...]) -> list[str]:
        """Names of a batch's images."""
        return [self._indexed.name(index) for index in batch[2].tolist()]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (images, rows_B3), keys in zip(fetch_batches(self.loader), self.batches):
            if self._erasing is not None:
                erase(self._erasing, images, keys, self.batches.seed)
            targets_B, index_B, requested_B = rows_B3.unbind(dim=1)
            self._skipped += (index_B != requested_B).sum()
            yield images, targets_B, index_B
        self.unreadable += self._indexed.log_unreadable()


class StreamLoader:
    """Batches of (images, targets, None) of a stream, for supervised training, by timm's own loader."""

    skipped = None  # timm's readers skip what they can't read, without a count
    unreadable: list[str] = []

    def __init__(
        self,
        dataset: Any,
        loader: LoaderSettings,
        augmentation: AugmentationSettings,
        config: Config,
        device: torch.device,
    ) -> None:
        self._dataset, self._first_batch = dataset, 0
        self._loader = create_loader(
            dataset,
            **_train_options(augmentation, config),
            batch_size=loader.batch_size,
            num_workers=worker_count(loader.workers),
            pin_memory=loader.pin_mem,
            device=device,
        )
        self._loader.loader.generator = torch.Generator()  # of the workers' seeds, as above

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch to shuffle for; batches before the first are read and dropped."""
        self._loader.loader.generator.manual_seed(10_007 * torch.initial_seed() + epoch)
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


def erase(erasing: RandomErasing, images_BCHW: Tensor, keys: Iterable[tuple[int, int]], seed: int) -> None:
    """Erase in place by timm's random erasing, as a function of the seed and each image's key (epoch, index).

    timm draws from the program's random state, a batch ahead: what an image loses would depend on the batches before.
    """
    device = torch.device(erasing.device)
    with random_state_kept(device):
        for image_CHW, (epoch, index) in zip(images_BCHW, keys):
            seed_transforms(seed, epoch, index, _ERASING, device=device)
            erasing(image_CHW)


def _train_options(augmentation: AugmentationSettings, config: Config) -> dict[str, Any]:
    """Translate the settings to options of timm's training transforms and loader."""
    options = dataclasses.asdict(augmentation) | {key: config[key] for key in ('input_size', 'mean', 'std')}
    del options['crop_padding']
    options['auto_augment'], options['interpolation'] = options.pop('aa'), options.pop('train_interpolation')
    for name in ('prob', 'mode', 'count'):
        options[f're_{name}'] = options.pop(f're{name}')
    options['color_jitter'] = options['color_jitter'] or None  # a jitter of nothing would take as long as any
    options['is_training'] = True
    try:
        create_transform(**options)
    except (AssertionError, ValueError, KeyError) as error:
        known = 'a policy such as rand-m9-mstd0.5, augmix-m5, 3a, original or v0'
        raise UserError(f'`aa` {augmentation.aa}: {one_line(error)}; use {known}') from None
    return options


def _with_padded_crop(transform: transforms.Compose, padding: int, size: tuple[int, int]) -> transforms.Compose:
    """Put a padded crop before timm's transforms, in place of a resized crop that takes all of an image."""
    first, *rest = transform.transforms
    resized_crop = isinstance(first, RandomResizedCropAndInterpolation) and {*first.scale, *first.ratio} == {1.0}
    kept = rest if resized_crop and size[0] == size[1] else transform.transforms
    return transforms.Compose([transforms.RandomCrop(size, padding, pad_if_needed=True), *kept])
