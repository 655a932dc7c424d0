"""Random erasing that only seed, epoch and index decide."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch import Tensor

from ctc_timm.data.datasets import open_split
from ctc_timm.data.erasing import erase
from ctc_timm.data.training_loader import TrainLoader

Flags = Callable[..., argparse.Namespace]
CONFIG = {'input_size': (3, 16, 16), 'mean': (0.3,) * 3, 'std': (0.4,) * 3}
CPU = torch.device('cpu')


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]


def images_of(args: argparse.Namespace, first: int = 0, rank: int = 0, world_size: int = 1) -> dict[int, Tensor]:
    """An epoch's images by index, the program's random states drawn from between batches."""
    loader = TrainLoader(open_split(args, 'train[:64]').dataset, args, CONFIG, CPU, rank, world_size)
    loader.set_epoch(2, first=first)
    seen = {}
    for images, _, index in loader:
        seen.update(zip(index.tolist(), images))
        random.random(), torch.rand(first + 1), np.random.rand()
    return seen


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_a_function_of_seed_epoch_and_index(flags: Flags, mode: str) -> None:
    """The same with any workers, from any batch on, in any process and batch size; states are left alone."""
    words = f'--dataset digits --reprob 0.6 --remode {mode} --recount 2 --no-aug'.replace(' --no-aug', ' --scale 0.5 1')
    random_seed(1)
    whole = images_of(flags(words, '-b 8 -j 0'))
    assert len(whole) == 64
    others = {
        'two workers': images_of(flags(words, '-b 8 -j 2')),
        'begun later': images_of(flags(words, '-b 8 -j 0'), first=5),
        'second process': images_of(flags(words, '-b 4 -j 1'), rank=1, world_size=2),
        'other batches': images_of(flags(words, '-b 32 -j 0')),
    }
    assert [len(other) for other in others.values()] == [64, 24, 32, 64]
    for other in others.values():
        assert all(torch.equal(image, whole[i]) for i, image in other.items())
    different = images_of(flags(words, '-b 8 -j 0 --seed 43'))
    plain = images_of(flags(words.replace('--reprob 0.6', '--reprob 0'), '-b 8 -j 0'))
    erased = sum(not torch.equal(image, plain[i]) for i, image in whole.items())
    assert 25 < erased < 52  # of 64 at 0.6
    assert sum(torch.equal(image, different[i]) for i, image in whole.items()) < 16


def test_it_is_timms(flags: Flags) -> None:
    """An image alone through timm's class, its own seed set by hand."""
    erasing = RandomErasing(0.9, mode='pixel', max_count=3, device='cpu')
    images = torch.zeros(8, 3, 16, 16)
    random_seed(0)
    before = states()
    erase(erasing, images, [(4, i) for i in range(8)], seed=7)
    assert states() == before
    for i in range(8):
        seed = int(np.random.SeedSequence([7, 4, i, 1]).generate_state(1)[0])
        random.seed(seed)
        torch.manual_seed(seed)
        assert torch.equal(erasing(torch.zeros(3, 16, 16)), images[i])
    assert len({tuple(image.flatten().tolist()) for image in images}) >= 7


def test_a_loader_leaves_the_states_alone(flags: Flags) -> None:
    args = flags('--dataset digits --reprob 1 -b 8 -j 1')
    loader = TrainLoader(open_split(args, 'train[:32]').dataset, args, CONFIG, CPU)
    random_seed(3)
    before = states()
    assert len(list(loader)) == 4
    assert states() == before
