"""Images with their index, in an order that only seed and epoch decide."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.utils import random_seed

from ctc_timm.data.datasets import open_split
from ctc_timm.data.indexed import EpochBatches, IndexedDataset, UnreadableError
from ctc_timm.data.training_loader import TrainLoader

Flags = Callable[..., argparse.Namespace]
CONFIG = {'input_size': (3, 16, 16), 'mean': (0.3,) * 3, 'std': (0.4,) * 3}


def batches(epoch: int, *args: int) -> list[list[tuple[int, int]]]:
    sampler = EpochBatches(*args)
    sampler.epoch = epoch
    return list(sampler)


@pytest.mark.parametrize('n, batch, world', [(24, 4, 1), (24, 4, 2), (24, 2, 3), (53, 4, 2), (31, 5, 3), (8, 8, 1)])
def test_every_index_once_over_all_processes(n: int, batch: int, world: int) -> None:
    """By brute force: the i-th batches of all processes, one after the other, are one process's i-th batch."""
    for epoch in range(3):
        shares = [batches(epoch, n, batch, 7, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {n // (batch * world)}
        whole = batches(epoch, n, batch * world, 7)
        for i, expected in enumerate(whole):
            assert [key for share in shares for key in share[i]] == expected
        indices = [index for keys in whole for at, index in keys if at == epoch]
        assert len(indices) == len(set(indices)) == n // (batch * world) * batch * world
        assert set(indices) <= set(range(n))


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            random_seed(100 * seed + epoch)
            orders[seed, epoch] = [index for keys in batches(epoch, 40, 4, seed) for _, index in keys]
            random_seed(1)
            assert orders[seed, epoch] == [index for keys in batches(epoch, 40, 8, seed) for _, index in keys]
    assert len({tuple(order) for order in orders.values()}) == 9


def test_an_epoch_may_begin_later() -> None:
    sampler = EpochBatches(40, 4, 3)
    whole = list(sampler)
    sampler.first = 6
    assert list(sampler) == whole[6:]


def test_the_last_incomplete_batch_is_spread_over_epochs() -> None:
    """No image is left out for good."""
    seen = {index for epoch in range(20) for keys in batches(epoch, 43, 8, 0) for _, index in keys}
    assert seen == set(range(43))


@pytest.fixture(scope='module')
def augmented(flags: Flags) -> Callable[[int], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    def load(workers: int, seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        words = '--dataset digits --train-split train[:48] -b 8 --aa rand-m9-mstd0.5 --reprob 0.5 --crop-padding 2'
        args = flags(words, '--seed', str(seed), '-j', str(workers))
        random_seed(11)
        loader = TrainLoader(open_split(args, args.train_split).dataset, args, CONFIG, torch.device('cpu'))
        out = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            out += list(loader)
        return out

    return load


def test_pixels_do_not_depend_on_workers(augmented: Callable[..., list[tuple[torch.Tensor, ...]]]) -> None:
    """Crops, colors, RandAugment and erasing are the same with no, one and two worker processes."""
    alone = augmented(0)
    for workers in (1, 2):
        for mine, theirs in zip(alone, augmented(workers), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)
    first, second = (
        {int(i): image for images, _, index in half for i, image in zip(index, images)}
        for half in (alone[:6], alone[6:])
    )
    assert set(first) == set(second) == set(range(48))
    assert sum(torch.equal(first[i], second[i]) for i in range(48)) < 5
    assert not torch.equal(alone[0][0], augmented(0, seed=4)[0][0])


def test_the_programs_random_state_is_left_alone(flags: Flags) -> None:
    args = flags('--dataset digits --train-split train[:8]')
    indexed = IndexedDataset(open_split(args, args.train_split).dataset, seed=0)
    indexed.transform = lambda image: (random.random(), np.random.rand(), torch.rand(1).item())
    random_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    drawn = {key: indexed[key][0] for key in ((0, 1), (1, 1), (0, 2))}
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert torch.equal(before[2], torch.get_rng_state())
    assert len(set(drawn.values())) == 3
    random_seed(6)
    assert {key: indexed[key][0] for key in drawn} == drawn


@pytest.mark.parametrize('workers', [0, 2])
def test_index_of_the_image_delivered(flags: Flags, image_folder: Path, workers: int) -> None:
    """Corrupt files: the index, label and pixels are those of the next image that can be read, by brute force."""
    files = sorted((image_folder / 'train').rglob('*.png'))
    broken = (4, 5, 20, len(files) - 1)  # two in a row, and the last, after which comes the first
    for i in broken:
        files[i].write_bytes(b'no image')
    expected = {}
    for i in range(len(files)):
        j = i
        while j in broken:
            j = (j + 1) % len(files)
        expected[i] = j

    args = flags('--data-dir', str(image_folder), f'-b 6 -j {workers} --no-aug')
    source = open_split(args, 'train')
    loader = TrainLoader(source.dataset, args, {**CONFIG, 'input_size': (3, 32, 32)}, torch.device('cpu'))
    asked = [index for keys in batches(0, len(files), 6, args.seed) for _, index in keys]
    delivered, labels, images = [], [], []
    for image_B, target_B, index_B in loader:
        delivered += index_B.tolist()
        labels += target_B.tolist()
        images += list(image_B)
    assert delivered == [expected[i] for i in asked]
    assert labels == [int(files[i].parent.name.removeprefix('class')) for i in delivered]
    assert loader.skipped == len(broken)
    for index, image in zip(delivered, images):
        pixels = torch.from_numpy(np.array(Image.open(files[index]).convert('RGB'))).permute(2, 0, 1) / 255
        assert torch.allclose(image, (pixels - 0.3) / 0.4, atol=1e-5)


@pytest.mark.parametrize('workers', [0, 1])
def test_too_many_unreadable_images_name_the_file(flags: Flags, image_folder: Path, workers: int) -> None:
    """timm gives up after ten in a row; a worker's traceback does not reach the message."""
    files = sorted((image_folder / 'train').rglob('*.png'))
    for file in files:
        file.write_bytes(b'no image')
    args = flags('--data-dir', str(image_folder), f'-b 6 -j {workers}')
    loader = TrainLoader(open_split(args, 'train').dataset, args, CONFIG, torch.device('cpu'))
    first = files[batches(0, len(files), 6, args.seed)[0][0][1]]
    with pytest.raises(UnreadableError) as error:
        list(loader)
    assert str(error.value).startswith(f'{first}: unreadable') and 'Traceback' not in str(error.value)
    assert '10 consecutive' in str(error.value)
