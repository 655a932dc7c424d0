"""Parts of a split: classes in proportion, seeded, each part within every larger one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from timm.data import ImageDataset
from torch import Tensor

from .datasets import DatasetSplit


def stratified_order(labels_N: Tensor, seed: int) -> Tensor:
    """Order all images so that every beginning holds the classes in proportion.

    One image of each class comes first. Of a class of m images the j-th, counted from 0, then lies at (j + 1/2) / m
    of the way. The seed decides the order within a class, and among images at the same place. Returns indices, [N].
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
    """Draw `count` images, at least one of each class, or all where there are fewer: ascending indices, [n]."""
    return stratified_order(labels_N, seed)[: max(count, len(labels_N.unique()))].sort().values


def part_of(source: DatasetSplit, index_n: Tensor) -> DatasetSplit:
    """Take images of a map-style split by index, also several times; the split is left as it is.

    An unreadable one is replaced by the next of the part, not of the whole.
    """
    assert source.labels_N is not None
    dataset: Any = Part(source.dataset, index_n)
    if isinstance(source.dataset, ImageDataset):
        dataset = copy.copy(source.dataset)
        dataset.reader = Part(source.dataset.reader, index_n)
    return replace(source, dataset=dataset, labels_N=source.labels_N[index_n])


class Part:
    """Some samples of a timm reader, or of a map-style dataset, under the numbers 0, 1, ..."""

    def __init__(self, source: Any, index_n: Tensor) -> None:
        self.source, self.index = source, index_n.tolist()

    def __getitem__(self, index: int) -> Any:
        return self.source[self.index[index]]

    def __len__(self) -> int:
        return len(self.index)

    def filename(self, index: int, **options: Any) -> Any:
        """The file of a sample, where the reader or dataset knows it."""
        if hasattr(self.source, 'filename'):
            return self.source.filename(self.index[index], **options)
        return self.source.samples[self.index[index]][0]
