"""Images kept in memory are the images on disk, through the same augmentation, whatever path it takes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ctc_timm.data import cached
from ctc_timm.data.cached import cache_split
from ctc_timm.data.datasets import open_split
from ctc_timm.data.decoding import ReplacingDataset
from ctc_timm.data.loaders import TrainLoader
from ctc_timm.data.settings import AugmentationSettings, DataSettings, LoaderSettings
from ctc_timm.utils.errors import UserError
from runs import CONFIG

CPU = torch.device('cpu')
SMALL: dict[str, Any] = dict(crop_padding=2, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=0.0)
AUGMENTATIONS = {
    'crop and flip': (SMALL, {}, True),
    'flip alone': ({'no_aug': True, 'hflip': 0.0}, {}, False),
    'without flip': ({**SMALL, 'hflip': 0.0}, {}, True),
    'gray': (SMALL, {'in_chans': 1}, True),
    'resized crops': ({'scale': (0.5, 1.0), 'ratio': (0.8, 1.2)}, {}, False),
    'auto-augment': ({**SMALL, 'aa': 'rand-m9-mstd0.5'}, {}, False),
    'erasing': ({**SMALL, 'reprob': 0.5}, {}, True),
    'images too small for the crop': (SMALL, {'img_size': 16}, False),
}


@pytest.mark.parametrize('augmentation, data, on_arrays', AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_epochs_are_the_same(augmentation: dict[str, Any], data: dict[str, Any], on_arrays: bool) -> None:
    """Images, targets and indices, to the bit, with a padded crop on arrays or timm's transforms on images."""
    settings, size = DataSettings(dataset='digits', **data), data.get('img_size', 8)
    config = {**CONFIG, 'input_size': (data.get('in_chans', 3), size, size)}
    epochs = []
    for keep in (False, True):
        split = open_split(settings, 'train[:96]')
        dataset = cache_split(split, quiet=True).dataset if keep else split.dataset
        loader = LoaderSettings(batch_size=32, workers=0)
        train = TrainLoader(dataset, loader, AugmentationSettings(**augmentation), config, CPU, 42)
        for epoch in (0, 3):
            train.set_epoch(epoch)
            epochs.append(list(train))
    assert isinstance(dataset[0][0], Image.Image) != on_arrays
    for plain, kept in zip(epochs[:2], epochs[2:]):
        for one, other in zip(plain, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_of_any_size(image_folder: Path) -> None:
    """Each keeps its own; an unreadable one is replaced by the next, and named; worker processes get the same."""
    files = sorted(image_folder.glob('train/*/*.png'))
    for i, file in enumerate(files):
        Image.open(file).resize((20 + i % 5, 30 + i % 7)).save(file)
    files[4].write_bytes(b'not an image')
    kept = cache_split(open_split(DataSettings(data_dir=str(image_folder)), 'train'), quiet=True).dataset
    contents = {i: Image.open(file).convert('RGB').tobytes() for i, file in enumerate(files) if i != 4}
    for file in files:
        file.unlink()
    for dataset in (kept, pickle.loads(pickle.dumps(kept))):
        replacing = ReplacingDataset(dataset)
        for i in range(len(files)):
            image, target, delivered = replacing.read(i)
            assert delivered == (5 if i == 4 else i) and image.tobytes() == contents[delivered]
            assert target == int(files[delivered].parent.name.removeprefix('class'))
        assert replacing.log_unreadable() == [str(files[4])] and replacing.name(7) == str(files[7])


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory, with how much it would take and how much there is; streams; images of more than 8 bits."""
    source = open_split(DataSettings(dataset='digits'), 'train')
    with pytest.raises(UserError, match='`cache_dataset`: digits is a stream'):
        cache_split(replace(source, labels_N=None))
    with pytest.raises(UserError, match='`cache_dataset`: only 8-bit images of one mode are kept, not F'):
        cache_split(open_split(DataSettings(dataset='digits', in_chans=1, input_img_mode='F'), 'train'))
    monkeypatch.setattr(cached.psutil, 'virtual_memory', lambda: SimpleNamespace(available=200_000))
    with pytest.raises(UserError, match='`cache_dataset`: the 1,437 decoded images would take about 0.0 GiB'):
        cache_split(source, quiet=True)
