"""Frozen features against a plain loop, and the cache that keeps them."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torchvision.transforms import functional

from ctc_timm.data.datasets import DatasetSplit, open_split
from ctc_timm.data.digits import DigitsReader
from ctc_timm.data.settings import DataSettings, LoaderSettings
from ctc_timm.measure.features import SplitImages, compute_features, features_of
from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.loading import LoadedModel
from ctc_timm.utils.errors import UserError
from processes import run_processes
from runs import CONFIG

DIGITS, LOADER = DataSettings(dataset='digits'), LoaderSettings(batch_size=32, workers=0)


def model(seed: int = 0) -> LoadedModel:
    """A small model with random weights."""
    torch.manual_seed(seed)
    return LoadedModel(timm.create_model('test_resnet', num_classes=7).eval(), 'small', 'small', None)


def images_of(accelerator: Accelerator, split: str = 'validation[:70]', **options: Any) -> SplitImages:
    """A split of the digits through the model's transform."""
    return SplitImages(open_split(DIGITS, split), LOADER, CONFIG, accelerator, **options)


def plainly(count: int) -> torch.Tensor:
    """The first images through the same transform, without timm's loader."""
    pixels = torch.from_numpy(DigitsReader('validation').images[:count])[:, None]
    pil = [functional.to_pil_image(image).convert('RGB').resize((16, 16), 2) for image in pixels]
    return torch.stack([functional.to_tensor(image) for image in pil]).sub(0.3).div(0.4)


def test_features_equal_a_plain_loop() -> None:
    """Twice, from decoded files and from memory; logits, labels and pixels too."""
    images, loaded, plain = images_of(Accelerator()), model(), plainly(70)
    with torch.no_grad():
        expected, logits = features_and_logits(loaded.model, plain)
    for _ in range(2):
        found = compute_features(loaded.model, images, Accelerator(), logits=True)
        torch.testing.assert_close(found.features_ND, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found.logits_NC, logits, atol=2e-5, rtol=1e-5)
        assert found.labels_N.tolist() == DigitsReader('validation').labels[:70].tolist()
    torch.testing.assert_close(images.pixels(), plain.flatten(1), atol=1e-5, rtol=0)
    averaged = torch.nn.functional.avg_pool2d(plain, 4).flatten(1)
    torch.testing.assert_close(images.pixels(side=4), averaged, atol=1e-5, rtol=0)


def test_cache(tmp_path: Path) -> None:
    """A hit needs the same weights, images and transform; anything else is computed anew."""
    accelerator = Accelerator()
    images, loaded = images_of(accelerator), model()
    first = features_of(loaded, images, accelerator, tmp_path)
    (file,) = tmp_path.iterdir()
    for parameter in loaded.model.parameters():
        parameter.data.zero_()
    assert not torch.equal(features_of(loaded, images, accelerator, tmp_path).features_ND, first.features_ND)
    assert len(list(tmp_path.iterdir())) == 2

    again = features_of(model(), images_of(accelerator), accelerator, tmp_path)
    assert torch.equal(again.features_ND, first.features_ND) and again.logits_NC is None
    written = file.stat().st_mtime_ns
    with_logits = features_of(model(), images, accelerator, tmp_path, logits=True)
    assert with_logits.logits_NC is not None and file.stat().st_mtime_ns > written
    for other in (images_of(accelerator, 'validation[1:71]'), images_of(accelerator, most=50)):
        features_of(model(), other, accelerator, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert not torch.equal(features_of(model(1), images, accelerator, tmp_path).features_ND, first.features_ND)


def test_folder_changes_are_seen(image_folder: Path) -> None:
    """An image that is written anew is another data set."""
    data = DataSettings(data_dir=str(image_folder))

    def identity() -> dict[str, Any]:
        return SplitImages(open_split(data, 'validation'), LOADER, CONFIG, Accelerator()).identity

    before = identity()
    assert identity() == before
    picture = next(image_folder.rglob('validation/*/*.png'))
    picture.write_bytes(picture.read_bytes() + b' ')
    assert identity() != before


def write_tar(file: Path, folder: Path) -> Path:
    with tarfile.open(file, 'w') as tar:
        tar.add(folder, arcname='.')
    return file


class Colors(torch.utils.data.Dataset):
    """As torchvision has them: images in memory."""

    def __init__(self, value: int) -> None:
        self.data, self.targets = np.full((4, 16, 16, 3), value, dtype=np.uint8), [0, 1, 0, 1]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[index], self.targets[index]


def test_what_is_cached_is_known_by_its_content(image_folder: Path, tmp_path: Path) -> None:
    """Of a tar file and of torchvision's sets: another one in its place is not taken for it."""
    labels = torch.tensor([0, 1, 0, 1])

    def identity(source: DatasetSplit) -> Any:
        return SplitImages(source, LOADER, CONFIG, Accelerator()).identity

    def of_torch(value: int) -> Any:
        return identity(DatasetSplit(Colors(value), labels, 2, 'torch/colors', {}))

    assert of_torch(3) == of_torch(3) != of_torch(4)
    unknown: Any = torch.utils.data.TensorDataset(torch.zeros(4, 3, 16, 16), labels)
    assert identity(DatasetSplit(unknown, labels, 2, 'torch/unknown', {})) is None

    tar = DataSettings(data_dir=str(write_tar(tmp_path / 'images.tar', image_folder / 'validation')))
    before = identity(open_split(tar, ''))
    assert before is not None and identity(open_split(tar, '')) == before
    for file in image_folder.rglob('validation/*/*.png'):
        file.write_bytes(file.read_bytes() + b' ')
    write_tar(tmp_path / 'images.tar', image_folder / 'validation')
    assert identity(open_split(tar, '')) != before


def test_what_nothing_tells_apart_is_not_cached(tmp_path: Path) -> None:
    images, accelerator = images_of(Accelerator()), Accelerator()
    images.identity = None
    features_of(model(), images, accelerator, tmp_path)
    assert not list(tmp_path.iterdir())


def _gathered(rank: int, world: int) -> tuple[torch.Tensor, ...]:
    accelerator = Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, world)
    images = images_of(accelerator, 'validation[:33]')
    features = compute_features(model().model, images, accelerator, logits=True)
    return features.features_ND, features.labels_N, images.pixels()


def test_processes_see_what_one_sees(tmp_path: Path) -> None:
    """Two processes share an odd number of images and both get all of them, in order."""
    found = run_processes(_gathered, 2, tmp_path)
    alone = compute_features(model().model, images_of(Accelerator(), 'validation[:33]'), Accelerator(), logits=True)
    for features, labels, pixels in found:
        torch.testing.assert_close(features, alone.features_ND)
        assert torch.equal(labels, alone.labels_N) and len(pixels) == 33


def test_stream_is_not_drawn_from() -> None:
    """A set without an index is measured whole."""
    source = replace(open_split(DIGITS, 'validation'), labels_N=None)
    with pytest.raises(UserError, match='measured whole'):
        SplitImages(source, LOADER, CONFIG, Accelerator(), most=5)
