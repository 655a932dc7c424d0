"""Scenes of digits: what is written is what real readers read, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torchvision.datasets import VOCSegmentation

from ctc_timm.dense import scenes
from ctc_timm.dense.settings import ScenesSettings
from ctc_timm.utils.errors import UserError

TRAIN, VAL, SIZE = 12, 6, 96


def write(folder: Path, *counts: int, layouts: tuple[str, ...] = ('coco', 'voc')) -> Path:
    return scenes.write_scenes(ScenesSettings(str(folder), *counts, layouts=layouts))  # type: ignore[arg-type]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and six validation scenes in all layouts."""
    return write(tmp_path_factory.mktemp('scenes') / 'all', TRAIN, VAL, layouts=('coco', 'voc', 'ade'))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.mark.parametrize('split,count', [('train', TRAIN), ('val', VAL)])
def test_coco_reads_exactly_the_masks(folder: Path, split: str, count: int) -> None:
    """pycocotools' masks are the scenes', boxes and areas those that numpy finds, and nothing overlaps."""
    coco = COCO(str(folder / 'annotations' / f'instances_{split}.json'))
    assert len(coco.imgs) == count and [c['name'] for c in coco.cats.values()] == [str(i) for i in range(10)]
    for number, image_id in enumerate(sorted(coco.imgs)):
        scene = scenes.compose(split, number, SIZE)
        pixels = np.asarray(Image.open(folder / split / coco.imgs[image_id]['file_name']))
        assert pixels.shape == (SIZE, SIZE, 3) and np.array_equal(pixels, scene.image)
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert [a['category_id'] - 1 for a in annotations] == list(scene.digits)
        assert np.sum(scene.masks, axis=0).max() == 1
        for annotation, mask in zip(annotations, scene.masks):
            assert np.array_equal(coco.annToMask(annotation), mask)
            y, x = np.nonzero(mask)
            assert annotation['bbox'] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert annotation['area'] == len(x) > 0


def test_semantic_masks_are_the_instances(folder: Path) -> None:
    """torchvision's reader of VOC and the files of ADE give the category of the instance at every pixel."""
    (folder.parent / 'VOCdevkit').mkdir()
    (folder.parent / 'VOCdevkit' / 'VOC2012').symlink_to(folder)
    coco = COCO(str(folder / 'annotations' / 'instances_train.json'))
    voc = VOCSegmentation(str(folder.parent), image_set='train')
    assert len(voc) == TRAIN
    ade = sorted((folder / 'annotations' / 'training').iterdir())
    for i, (image, mask) in enumerate(voc):
        truth = np.zeros((image.height, image.width), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(sorted(coco.imgs)[i])):
            truth[coco.annToMask(annotation) == 1] = annotation['category_id']
        assert mask.mode == 'P' and np.array_equal(np.asarray(mask), truth)
        assert np.array_equal(np.asarray(Image.open(ade[i])), truth + 1)
        near = np.asarray(image).astype(int) - np.asarray(Image.open(folder / 'train' / f'{i + 1:04d}.png'))
        assert np.abs(near).mean() < 6  # JPEG
    assert (folder / 'classes.txt').read_text().split() == ['background', *'0123456789']


def test_no_validation_digit_in_training_scenes() -> None:
    """Each split paints scikit-learn's digits of its own part of a stratified split, and photographs of its own."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, test_size=0.2, stratify=digits.target, random_state=0)
    for part, split in zip(parts, ('train', 'val')):
        assert np.array_equal(scenes._sources(split)[0].images, part)
    whole = [pixels.shape[1] for pixels in load_sample_images().images]
    widths = [[photograph.width for photograph in scenes._sources(split)[1]] for split in ('train', 'val')]
    assert [sum(pair) for pair in zip(*widths)] == whole


def test_a_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """More scenes leave the first ones as they are; another seed does not."""
    assert contents(write(tmp_path / 'again', TRAIN, VAL, layouts=('coco', 'voc', 'ade'))) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ['again']
    more = contents(write(tmp_path / 'more', TRAIN + 1, VAL))
    assert all(more[name] == data for name, data in contents(folder).items() if name.startswith('JPEGImages'))
    first, other = (scenes.compose('train', 0, SIZE, seed).image for seed in (0, 1))
    assert not np.array_equal(first, other)
    small = scenes.compose('val', 0, size=32)
    assert small.image.shape == (32, 32, 3) and all(mask.any() for mask in small.masks)


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves no folder, and what is there is not written over."""
    with monkeypatch.context() as patch:
        patch.setattr(json, 'dumps', lambda content: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / 'out', 1, 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'out').mkdir()
    assert write(tmp_path / 'out', 1, 1).is_dir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match='out: exists already; name a new folder for the scenes'):
        write(tmp_path / 'out', 1, 1)
    assert contents(tmp_path) == before


def test_the_default_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache, named by version."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(scenes, 'ScenesSettings', lambda output: ScenesSettings(output, 2, 1))
    folder = Path(scenes.default_scenes())
    assert folder == tmp_path / 'ctc_timm' / f'digit-scenes-{scenes.VERSION}'
    marked = {file: file.stat().st_mtime_ns for file in folder.rglob('*')}
    assert len(list((folder / 'train').iterdir())) == 2
    assert scenes.default_scenes() == str(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob('*')} == marked
