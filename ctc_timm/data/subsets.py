"""Part of a split: classes in proportion, seeded, each part within every larger one.

Letters: N images of the set, n of them drawn.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

from .datasets import DatasetSplit


def stratified_order(labels_N: Tensor, seed: int) -> Tensor:
    """An order of all images of which every beginning holds the classes in proportion.

    One image of each class comes first. Of a class of m images the j-th, counted from 0, then lies at (j + 1/2) / m
    of the way.

    Args:
        labels_N: Class of each image.
        seed: Of the order within a class, and among images at the same place.

    Returns:
        A permutation, [N].
    """
    shuffled_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    _, class_N, sizes_C = labels_N[shuffled_N].unique(return_inverse=True, return_counts=True)
    by_class_N = class_N.argsort(stable=True)
    starts_C = sizes_C.cumsum(0) - sizes_C
    rank_N = torch.empty_like(class_N)
    rank_N[by_class_N] = torch.arange(len(labels_N)) - starts_C[class_N[by_class_N]]
    place_N = (rank_N.double() + 0.5) / sizes_C[class_N]
    place_N[rank_N == 0] = 0
    return shuffled_N[place_N.argsort(stable=True)]


def draw(labels_N: Tensor, count: int, seed: int) -> Tensor:
    """Draw so many images, at least one of each class.

    Args:
        labels_N: Class of each image.
        count: How many; all where there are fewer.
        seed: Of the draw.

    Returns:
        Their indices, ascending, [n].
    """
    return stratified_order(labels_N, seed)[: max(count, len(labels_N.unique()))].sort().values


def part_of(source: DatasetSplit, index_n: Tensor) -> DatasetSplit:
    """Some images of a split as a split of its own.

    An unreadable image is replaced by the next one of the part, not of the whole.

    Args:
        source: A map-style split; it is left as it is.
        index_n: Which images; one that is named several times is there several times.
    """
    assert source.labels_N is not None
    if isinstance(source.dataset, ImageDataset):
        dataset: Any = copy.copy(source.dataset)
        dataset.reader = _PartOfReader(source.dataset.reader, index_n.tolist())
    else:
        dataset = Subset(source.dataset, index_n)
    return replace(source, dataset=dataset, labels_N=source.labels_N[index_n])


class _PartOfReader:
    """A timm reader over some of another's samples."""

    def __init__(self, reader: Any, index: list[int]) -> None:
        self._reader = reader
        self._index = index

    def __getitem__(self, index: int) -> Any:
        return self._reader[self._index[index]]

    def __len__(self) -> int:
        return len(self._index)

    def filename(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Of the sample at this place."""
        return self._reader.filename(self._index[index], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ('_reader', '_index'):  # not there yet while a worker process unpickles this object
            raise AttributeError(name)
        return getattr(self._reader, name)


class Subset(Dataset):
    """Some images of a map-style dataset, under the numbers 0, 1, ...

    Args:
        dataset: The whole.
        index_n: Which images.
    """

    def __init__(self, dataset: Any, index_n: Tensor) -> None:
        self.dataset = dataset
        self.index = index_n.tolist()

    @property
    def transform(self) -> Any:
        """The whole's; timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    @property
    def samples(self) -> list[Any]:
        """Files and targets, where the whole has files."""
        return [self.dataset.samples[i] for i in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.index[index]]
