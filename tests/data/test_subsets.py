"""Fractions of a training set: how many, of which classes, and the same images under new numbers."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from ctc_timm.data.datasets import DatasetSplit, open_split
from ctc_timm.data.decoding import ReplacingDataset
from ctc_timm.data.indexed import IndexedDataset
from ctc_timm.data.settings import DataSettings
from ctc_timm.data.subsets import draw, part_of, stratified_order

FRACTIONS = (0.001, 0.01, 0.1, 0.33, 0.5, 0.999, 1.0)


def uneven_labels() -> torch.Tensor:
    """Classes of 1 to 300 images in any order, one number unused."""
    sizes = {0: 300, 1: 77, 2: 5, 4: 1, 5: 121}
    labels = torch.cat([torch.full((size,), klass) for klass, size in sizes.items()])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize('seed', range(5))
def test_classes_keep_their_share(seed: int) -> None:
    """As many as asked for, no image twice, no class without any, and each within one image of its share.

    Beyond that one, only images that classes with a share below one got move the others.
    """
    labels = uneven_labels()
    for fraction in FRACTIONS:
        index = draw(labels, round(fraction * len(labels)), seed)
        assert len(index) == max(5, round(fraction * len(labels))) == len(set(index.tolist()))
        assert torch.equal(index, index.sort().values)
        taken, sizes = np.bincount(labels[index], minlength=6), np.bincount(labels)
        assert (taken[sizes > 0] >= 1).all()
        share = sizes * len(index) / len(labels)
        lifted = np.maximum((sizes > 0) - share, 0).sum()
        assert (np.abs(taken - share) <= 1 + lifted).all(), (fraction, taken, share)


def test_each_fraction_lies_in_the_larger_ones() -> None:
    labels = uneven_labels()
    for seed in range(5):
        drawn = [set(draw(labels, round(fraction * len(labels)), seed).tolist()) for fraction in FRACTIONS]
        assert all(small <= large for small, large in zip(drawn, drawn[1:]))
        assert drawn[-1] == set(range(len(labels)))


def test_the_seed_decides() -> None:
    """The same images for a seed, others for another; over many seeds every image of a class is as likely."""
    labels = uneven_labels()
    assert torch.equal(draw(labels, round(0.1 * len(labels)), 3), draw(labels, round(0.1 * len(labels)), 3))
    assert not torch.equal(draw(labels, round(0.1 * len(labels)), 3), draw(labels, round(0.1 * len(labels)), 4))
    counts = torch.zeros(len(labels))
    for seed in range(400):
        counts[draw(labels, round(0.2 * len(labels)), seed)] += 1
    largest = counts[labels == 0] / 400  # 60 or so of 300 images each time
    assert largest.mean().item() == pytest.approx(0.2, abs=0.01)
    assert largest.std().item() == pytest.approx((0.2 * 0.8 / 400) ** 0.5, rel=0.3)


def test_an_order_of_all_images() -> None:
    """Every beginning holds equal classes in equal numbers."""
    labels = torch.arange(7).repeat(6)
    order = stratified_order(labels, 0)
    assert sorted(order.tolist()) == list(range(42))
    for count in range(7, 43, 7):
        assert np.bincount(labels[order[:count]]).tolist() == [count // 7] * 7


def test_part_of_a_folder(image_folder: Path) -> None:
    """Pixels, labels and names of the images named, also from a worker process's copy; the whole is left as it was."""
    source = open_split(DataSettings(data_dir=str(image_folder)), 'train')
    plain = ImageFolder(str(image_folder / 'train'))
    index = torch.tensor([30, 2, 2, 17])
    part = part_of(source, index)
    dataset = pickle.loads(pickle.dumps(part.dataset))
    assert len(dataset) == 4 and len(source.dataset) == 36
    assert part.labels_N is not None and part.labels_N.tolist() == [plain.targets[i] for i in index]
    for place, i in enumerate(index.tolist()):
        image, label = dataset[place]
        assert label == plain.targets[i] and np.array_equal(np.asarray(image), np.asarray(plain[i][0]))
        assert ReplacingDataset(dataset).name(place) == plain.samples[i][0]
    assert part.num_classes == 3 and part.class_names == source.class_names


def test_unreadable_images_are_replaced_within_the_part(image_folder: Path) -> None:
    """By the next one of the part, never by one that was not drawn, and the index delivered tells."""
    source = open_split(DataSettings(data_dir=str(image_folder)), 'train')
    files = sorted((image_folder / 'train').rglob('*.png'))
    files[5].write_bytes(b'no image')
    part = IndexedDataset(part_of(source, torch.tensor([5, 20])).dataset)
    image, (label, delivered, requested) = part[0]
    plain = ImageFolder(str(image_folder / 'train'))
    assert np.array_equal(np.asarray(image), np.asarray(plain[20][0]))
    assert (int(label), int(delivered), int(requested)) == (plain.targets[20], 1, 0)
    assert part.log_unreadable() == [str(files[5])]


def test_part_of_another_dataset(image_folder: Path) -> None:
    """Any map-style dataset."""
    plain = ImageFolder(str(image_folder / 'train'))
    part = part_of(DatasetSplit(plain, torch.tensor(plain.targets), 3, 'folder', {}), torch.tensor([35, 0]))
    replacing = ReplacingDataset(part.dataset)
    replacing.transform = np.asarray
    assert len(replacing) == 2
    for place, i in enumerate((35, 0)):
        image, label = replacing[place]
        assert label == plain.targets[i] and np.array_equal(image, plain[i][0])
        assert replacing.name(place) == plain.samples[i][0]
