"""Fractions of a training set: how many, of which classes, and the same images under new numbers."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from ctc_timm.data.datasets import DatasetSplit, open_split
from ctc_timm.data.indexed import IndexedDataset
from ctc_timm.data.settings import DataSettings
from ctc_timm.data.subsets import draw, part_of

FRACTIONS = (0.001, 0.01, 0.1, 0.33, 0.5, 0.999, 1.0)


def uneven_labels() -> torch.Tensor:
    """Classes of 1 to 300 images in any order, one number unused."""
    sizes = {0: 300, 1: 77, 2: 5, 4: 1, 5: 121}
    labels = torch.cat([torch.full((size,), klass) for klass, size in sizes.items()])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize('seed', range(5))
def test_classes_keep_their_share(seed: int) -> None:
    """As many as asked for, no image twice, no class without any, each within one image of its share; nested.

    Beyond that one, only images that classes with a share below one got move the others.
    """
    labels, smaller = uneven_labels(), set()
    for fraction in FRACTIONS:
        count = round(fraction * len(labels))
        index = draw(labels, count, seed)
        assert len(index) == max(5, count) == len(set(index.tolist())) and torch.equal(index, index.sort().values)
        taken, sizes = np.bincount(labels[index], minlength=6), np.bincount(labels)
        assert (taken[sizes > 0] >= 1).all()
        share = sizes * len(index) / len(labels)
        lifted = np.maximum((sizes > 0) - share, 0).sum()
        assert (np.abs(taken - share) <= 1 + lifted).all(), (fraction, taken, share)
        assert smaller <= set(index.tolist()) and torch.equal(index, draw(labels, count, seed))
        smaller = set(index.tolist())
    assert smaller == set(range(len(labels)))


def test_every_image_is_as_likely() -> None:
    """Of the largest class, over many seeds."""
    labels = uneven_labels()
    counts = torch.zeros(len(labels))
    for seed in range(400):
        counts[draw(labels, round(0.2 * len(labels)), seed)] += 1
    largest = counts[labels == 0] / 400  # 60 or so of 300 images each time
    assert largest.mean().item() == pytest.approx(0.2, abs=0.01)
    assert largest.std().item() == pytest.approx((0.2 * 0.8 / 400) ** 0.5, rel=0.3)


@pytest.mark.parametrize('reader', [True, False], ids=["timm's", "torchvision's"])
def test_part_of_a_folder(image_folder: Path, reader: bool) -> None:
    """Pixels, labels and names, also in a worker's copy; an unreadable image is replaced by the next of the part."""
    plain = ImageFolder(str(image_folder / 'train'))
    source = open_split(DataSettings(data_dir=str(image_folder)), 'train')
    if not reader:
        source = DatasetSplit(plain, torch.tensor(plain.targets), 3, 'folder', {})
    pixels = {i: np.asarray(plain[i][0]) for i in (2, 17, 30)}
    Path(plain.samples[5][0]).write_bytes(b'no image')
    index = torch.tensor([30, 2, 5, 2, 17])
    part = part_of(source, index)
    dataset = IndexedDataset(pickle.loads(pickle.dumps(part.dataset)))
    assert len(dataset) == 5 and len(source.dataset) == 36 and part.num_classes == 3
    assert part.labels_N is not None and part.labels_N.tolist() == [plain.targets[i] for i in index]
    for place, i in enumerate([30, 2, 2, 2, 17]):
        image, (label, delivered, requested) = dataset[place]
        assert np.array_equal(np.asarray(image), pixels[i]) and label == plain.targets[i]
        assert delivered == (3 if place == 2 else place) and requested == place
    assert [dataset.name(i) for i in range(5)] == [plain.samples[i][0] for i in index]
    assert dataset.log_unreadable() == [plain.samples[5][0]]
