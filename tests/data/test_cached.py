"""Images kept in memory are the images on disk, through the same augmentation, whatever path it takes."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from runs import forget_processes
from safetensors.torch import load_file

from ctc_timm.data import cached
from ctc_timm.data.arrays import CropAndFlip
from ctc_timm.data.cached import cache_images
from ctc_timm.data.datasets import open_split
from ctc_timm.data.training_loader import TrainLoader
from ctc_timm.data.training_loader import cached as cached_split
from ctc_timm.data.transforms import data_config
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import UserError

Flags = Callable[..., argparse.Namespace]
SMALL = '--crop-padding 2 --scale 1 1 --ratio 1 1 --color-jitter 0'
AUGMENTATIONS = {
    'crop and flip': (SMALL, True),
    'flip alone': ('--no-aug --hflip 0', False),
    'without flip': (f'{SMALL} --hflip 0', True),
    'gray': (f'{SMALL} --in-chans 1 --mean 0.5 --std 0.5', True),
    'resized crops': ('--scale 0.5 1 --ratio 0.8 1.2', False),
    'auto-augment': (f'{SMALL} --aa rand-m9-mstd0.5', False),
    'erasing': (f'{SMALL} --reprob 0.5', True),
}


def loaded(args: argparse.Namespace, keep: bool, epoch: int) -> tuple[list, object]:
    """All batches of an epoch, from files or from memory, and the transform at the end."""
    model = timm.create_model('test_resnet', num_classes=10, in_chans=args.in_chans or 3)
    dataset = open_split(args, args.train_split).dataset
    dataset = cache_images(dataset, quiet=True) if keep else dataset
    loader = TrainLoader(dataset, args, data_config(args, model), torch.device('cpu'))
    loader.set_epoch(epoch)
    return list(loader), dataset.transform


@pytest.mark.parametrize('words,on_arrays', AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_epochs_are_the_same(flags: Flags, words: str, on_arrays: bool) -> None:
    """Images, targets and indices, to the bit, with a padded crop on arrays or timm's transforms on images."""
    args = flags(f'--dataset digits --train-split train[:96] -b 32 -j 0 --img-size 8 {words}')
    for epoch in (0, 3):
        plain, _ = loaded(args, False, epoch)
        kept, transform = loaded(args, True, epoch)
        assert isinstance(transform, CropAndFlip) == on_arrays
        for one, other in zip(plain, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_another_size_goes_through_timm(flags: Flags) -> None:
    """A crop larger than image and border together would be padded further, which is left to torchvision."""
    args = flags(f'--dataset digits --train-split train[:32] -b 32 -j 0 --img-size 16 {SMALL}')
    plain, _ = loaded(args, False, 0)
    kept, transform = loaded(args, True, 0)
    assert not isinstance(transform, CropAndFlip)
    assert torch.equal(plain[0][0], kept[0][0])


def test_images_of_any_size(flags: Flags, image_folder: Path) -> None:
    """Each keeps its own; an unreadable one is the next one, and says so; worker processes get the same."""
    files = sorted(image_folder.glob('train/*/*.png'))
    for i, file in enumerate(files):
        Image.open(file).resize((20 + i % 5, 30 + i % 7)).save(file)
    files[4].write_bytes(b'not an image')
    source = open_split(flags('--data-dir', str(image_folder)), 'train')
    kept = cache_images(source.dataset, quiet=True)
    kept.with_index = True
    for dataset in (kept, pickle.loads(pickle.dumps(kept))):
        for i in range(len(files)):
            image, target, delivered = dataset[i]
            assert delivered == (5 if i == 4 else i)
            assert image.tobytes() == Image.open(files[delivered]).convert('RGB').tobytes()
            assert target == int(files[delivered].parent.name.removeprefix('class'))


def test_memory_is_checked_first(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with how much it would take and how much there is, before anything is decoded."""
    monkeypatch.setattr(cached.psutil, 'virtual_memory', lambda: SimpleNamespace(available=200_000))
    source = open_split(flags('--dataset digits'), 'train')
    with pytest.raises(UserError, match='--cache-dataset: the 1,437 decoded images would take about 0.0 GiB'):
        cache_images(source.dataset, quiet=True)


def test_a_run_is_the_same(flags: Flags, tiny: list[str], tmp_path: Path) -> None:
    """Both stages, trained from files and from memory: the same weights and numbers to the bit."""
    common = f'--crop-padding 2 --epochs 2 --temporal-start-epoch 1 --output {tmp_path} --experiment'
    for words in ('files', 'memory --cache-dataset'):
        forget_processes()
        Trainer(flags(*tiny, common, words)).fit(quiet=True)
    weights = [load_file(tmp_path / name / 'last.safetensors') for name in ('files', 'memory')]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert (tmp_path / 'files' / 'summary.csv').read_text() == (tmp_path / 'memory' / 'summary.csv').read_text()


def test_streams_are_not_kept(flags: Flags) -> None:
    """One line that names the flag."""
    source = open_split(flags('--dataset digits'), 'train')
    source.labels_N = None
    with pytest.raises(UserError, match='--cache-dataset: digits is a stream'):
        cached_split(flags('--dataset digits'), source)
