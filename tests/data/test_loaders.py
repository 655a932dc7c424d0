"""Training images with their index: order, augmentation and erasing are functions of seed, epoch and index alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch import Tensor

from ctc_timm.data.datasets import open_split
from ctc_timm.data.decoding import UnreadableError
from ctc_timm.data.indexed import EpochBatches, IndexedDataset
from ctc_timm.data.loaders import RefreshLoader, TrainLoader, create_eval_loader, erase
from ctc_timm.data.settings import AugmentationSettings, DataSettings, LoaderSettings
from ctc_timm.data.transforms import data_config
from ctc_timm.utils.errors import UserError
from runs import CONFIG

CPU = torch.device('cpu')
DIGITS = DataSettings(dataset='digits')


def digits_loader(
    split: str, batch: int, workers: int, seed: int = 42, rank: int = 0, world: int = 1, **augmentation: Any
) -> TrainLoader:
    loader, augmented = LoaderSettings(batch_size=batch, workers=workers), AugmentationSettings(**augmentation)
    return TrainLoader(open_split(DIGITS, split).dataset, loader, augmented, CONFIG, CPU, seed, rank, world)


def folder_loader(folder: Path, workers: int, **augmentation: Any) -> TrainLoader:
    dataset = open_split(DataSettings(data_dir=str(folder)), 'train').dataset
    config, augmented = {**CONFIG, 'input_size': (3, 32, 32)}, AugmentationSettings(**augmentation)
    return TrainLoader(dataset, LoaderSettings(batch_size=6, workers=workers), augmented, config, CPU, 42)


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]


def batches(epoch: int, *args: int) -> list[list[tuple[int, int]]]:
    sampler = EpochBatches(*args)
    sampler.epoch = epoch
    return list(sampler)


def test_an_evaluation_draws_nothing() -> None:
    """The random state that dropout draws from is the same after a pass, the first, a later and a kept one."""
    source = open_split(DIGITS, 'validation[:20]')
    for keep in (False, True):
        loader = create_eval_loader(source.dataset, LoaderSettings(batch_size=8, workers=0), CONFIG, CPU, keep=keep)
        before = torch.get_rng_state()
        passes = [torch.cat([images for images, _ in loader]) for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(images, passes[0]) for images in passes)


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
    """Over many epochs no image is left out, and an epoch may begin at a later batch."""
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            random_seed(100 * seed + epoch)
            orders[seed, epoch] = [index for keys in batches(epoch, 40, 4, seed) for _, index in keys]
            random_seed(1)
            assert orders[seed, epoch] == [index for keys in batches(epoch, 40, 8, seed) for _, index in keys]
    assert len({tuple(order) for order in orders.values()}) == 9
    assert {index for epoch in range(20) for keys in batches(epoch, 43, 8, 0) for _, index in keys} == set(range(43))
    sampler = EpochBatches(40, 4, 3)
    sampler.first = 6
    assert list(sampler) == batches(0, 40, 4, 3)[6:]


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    """Crops, colors, RandAugment and erasing, whatever the workers, the batch begun at, the processes and batches."""

    def images(*args: int, first: int = 0, draw: int = 0, reprob: float = 0.5) -> dict[tuple[int, int], Tensor]:
        loader = digits_loader('train[:48]', *args, aa='rand-m9-mstd0.5', reprob=reprob, crop_padding=2, recount=2)
        seen: dict[tuple[int, int], Tensor] = {}
        for epoch in (0, 2):
            loader.set_epoch(epoch, first)
            for batch, _, index in loader:
                seen.update(((epoch, i), image) for i, image in zip(index.tolist(), batch))
                random.random(), torch.rand(draw + 1), np.random.rand()
        return seen

    def equal(one: dict, other: dict) -> int:
        return sum(torch.equal(image, other[key]) for key, image in one.items())

    random_seed(1)
    whole = images(8, 0)
    assert set(whole) == {(epoch, i) for epoch in (0, 2) for i in range(48)}
    others = images(8, 1), images(8, 2, draw=3), images(8, 0, first=4), images(4, 1, 42, 1, 2), images(16, 0)
    assert [equal(other, whole) for other in others] == [96, 96, 32, 48, 96]
    assert equal({(2, i): whole[0, i] for i in range(48)}, whole) < 5 and equal(images(8, 0, 43), whole) < 10
    assert 30 < equal(images(8, 0, reprob=0), whole) < 66  # half are erased


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_erasing_is_timms(mode: str) -> None:
    """An image alone through timm's class, its own seed set by hand; the random states are left alone."""
    erasing = RandomErasing(0.9, mode=mode, max_count=3, device='cpu')
    images = torch.ones(8, 3, 16, 16)
    random_seed(0)
    before = states()
    erase(erasing, images, [(4, i) for i in range(8)], seed=7)
    assert states() == before
    for i in range(8):
        seed = int(np.random.SeedSequence([7, 4, i, 1]).generate_state(1)[0])
        random.seed(seed)
        torch.manual_seed(seed)
        assert torch.equal(erasing(torch.ones(3, 16, 16)), images[i])
    assert len({tuple(image.flatten().tolist()) for image in images}) >= 7


def test_the_programs_random_states_are_left_alone() -> None:
    loader = digits_loader('train[:32]', 8, 1, reprob=1)
    indexed = IndexedDataset(open_split(DIGITS, 'train[:8]').dataset, seed=0)
    indexed.transform = lambda image: (random.random(), np.random.rand(), torch.rand(1).item())
    random_seed(3)
    before = states()
    assert len(list(loader)) == 4
    drawn = {key: indexed[key][0] for key in ((0, 1), (1, 1), (0, 2))}
    assert states() == before and len(set(drawn.values())) == 3
    random_seed(6)
    assert {key: indexed[key][0] for key in drawn} == drawn


@pytest.mark.parametrize('workers', [0, 2])
def test_index_of_the_image_delivered(image_folder: Path, workers: int) -> None:
    """Corrupt files: the index, label and pixels are those of the next image that can be read, by brute force."""
    files = sorted((image_folder / 'train').rglob('*.png'))
    broken = (4, 5, 20, len(files) - 1)  # two in a row, and the last, after which comes the first
    for i in broken:
        files[i].write_bytes(b'no image')
    expected = {4: 6, 5: 6, 20: 21, len(files) - 1: 0}
    loader = folder_loader(image_folder, workers, no_aug=True)
    requested = [index for keys in batches(0, len(files), 6, 42) for _, index in keys]
    delivered, labels, images, names = [], [], [], []
    for batch in loader:
        images += list(batch[0])
        labels += batch[1].tolist()
        delivered += batch[2].tolist()
        names += loader.image_names(batch)
    assert delivered == [expected.get(i, i) for i in requested]
    assert labels == [int(files[i].parent.name.removeprefix('class')) for i in delivered]
    assert names == [str(files[i]) for i in delivered]
    assert loader.skipped == len(broken) and set(loader.unreadable) == {str(files[i]) for i in broken}
    for index, image in zip(delivered, images):
        pixels = torch.from_numpy(np.array(Image.open(files[index]).convert('RGB'))).permute(2, 0, 1) / 255
        assert torch.allclose(image, (pixels - 0.3) / 0.4, atol=1e-5)


def test_too_many_unreadable_images_name_the_file(image_folder: Path) -> None:
    """timm gives up after ten in a row; a worker's traceback does not reach the message."""
    files = sorted((image_folder / 'train').rglob('*.png'))
    for file in files:
        file.write_bytes(b'no image')
    first = files[batches(0, len(files), 6, 42)[0][0][1]]
    with pytest.raises(
        UnreadableError, match=f'^{first}: unreadable .no image that PIL knows., and so .* 10 consecutive'
    ):
        list(folder_loader(image_folder, 1))


def test_one_pass_to_fill_the_banks(image_folder: Path) -> None:
    """Every image once, in order, as plain timm's evaluation transform makes it."""
    data = DataSettings(data_dir=str(image_folder), img_size=16, mean=(0.3,), std=(0.4,), crop_pct=0.9)
    config = data_config(data, timm.create_model('test_resnet', num_classes=3))
    loader = LoaderSettings(batch_size=7, workers=1)
    images, targets, index = zip(*RefreshLoader(open_split(data, 'train'), loader, config, CPU))
    files = sorted((image_folder / 'train').rglob('*.png'))
    assert torch.cat(index).tolist() == list(range(len(files)))
    assert torch.cat(targets).tolist() == [int(file.parent.name.removeprefix('class')) for file in files]
    transform = create_transform(**config)
    expected = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    assert torch.allclose(torch.cat(images), expected, atol=1e-5)


def test_refused() -> None:
    with pytest.raises(UserError, match=r'`batch_size` 65 times 2 process\(es\) is more than the 129 .* at most 64'):
        digits_loader('train[:129]', 65, 0, world=2)
    with pytest.raises(UserError, match='`aa` rand-q7: .*; use a policy such as rand-m9-mstd0.5'):
        digits_loader('train[:16]', 8, 0, aa='rand-q7')
