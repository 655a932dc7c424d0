"""Folders of masks as they are read, and transforms that keep image and mask together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_folders import blocks, write_ade, write_voc
from PIL import Image

from ctc_timm.dense.augment import FitCanvas
from ctc_timm.dense.masks import IGNORE, Coding, MaskDataset, mask_transform, open_masks
from ctc_timm.utils.errors import UserError


def test_voc(tmp_path: Path) -> None:
    """Values are classes whatever the palette says, 255 doesn't count, classes.txt names them."""
    folder = write_voc(tmp_path / 'voc')
    with Image.open(folder / 'SegmentationClass' / 'train1.png') as opened:
        indexed = opened.copy()
    indexed.putpalette(list(range(255, -1, -1)) * 3)
    indexed.save(folder / 'SegmentationClass' / 'train1.png')
    train, val = open_masks(str(folder), ('train', 'val'))
    assert (len(train.pairs), len(val.pairs), train.names, train.unlabeled) == (6, 3, ['0', '1', '2'], 0)
    for (image, target), (pixels, mask) in zip((MaskDataset(train)[i] for i in range(6)), blocks(6)):
        mask[0, 0] = IGNORE
        assert np.array_equal(target['mask'].numpy(), mask)
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 12
    (folder / 'classes.txt').write_text('ground\nred\ngreen\nblue\n')
    (train,) = open_masks(str(folder), ('train',))
    assert train.names == ['ground', 'red', 'green', 'blue'] and train.told() == '6 images, 4 classes'


def test_ade(tmp_path: Path) -> None:
    """With 0 left out classes begin at 1; an image without a label is kept and counted."""
    folder = write_ade(tmp_path / 'ade')
    blank = folder / 'annotations' / 'training' / '2.png'
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(blank)
    train, val = open_masks(str(folder), ('train', 'val'), coding=Coding(reduce_zero=True))
    assert (len(train.pairs), len(val.pairs), len(train.names), train.unlabeled) == (4, 2, 3, 1)
    assert train.told() == '4 images, 3 classes, 1 without a pixel that counts'
    for i, (_, mask) in enumerate(blocks(4)):
        mask[0, 0] = IGNORE
        truth = np.full_like(mask, IGNORE) if i == 2 else mask
        assert np.array_equal(MaskDataset(train)[i][1]['mask'].numpy(), truth)
    (plain,) = open_masks(str(folder), ('train',))
    assert len(plain.names) == 4 and plain.unlabeled == 0


def test_values_of_sixteen_bits_and_another_ignored_value(tmp_path: Path) -> None:
    """--ignore-index is of the file; what datasets give is 255 for it."""
    values = np.array([[0, 1], [300, 2]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / 'mask.png')
    assert Coding(ignore_index=300).read(tmp_path / 'mask.png').tolist() == [[0, 1], [-1, 2]]
    assert Coding(ignore_index=300, reduce_zero=True).read(tmp_path / 'mask.png').tolist() == [[-1, 0], [-1, 1]]


@pytest.mark.parametrize('seed', range(8))
def test_image_and_mask_stay_together(seed: int) -> None:
    """A mask that is painted into the image is still there after flip, scale, crop and border."""
    _, mask = blocks(1, 40)[0]
    colors = np.array([0, 100, 200], dtype=np.uint8)[mask]
    image = Image.fromarray(np.stack([colors] * 3, -1))
    from torchvision.tv_tensors import Mask

    torch.manual_seed(seed)
    transform = mask_transform(48, 0.5, (0.6, 1.6), [1.0, 1.0, 1.0])
    pixels, target = transform(image, {'mask': Mask(torch.from_numpy(mask))})
    assert pixels.shape == (3, 48, 48) and target['mask'].shape == (48, 48) and target['mask'].dtype == torch.uint8
    border = target['mask'] == IGNORE
    assert torch.all(pixels[:, border] == 1)
    wanted = torch.tensor([0, 100, 200])[target['mask'].long().clamp(max=2)] / 255
    far = (pixels[0] - wanted).abs()[~border] > 0.1
    assert far.float().mean() < 0.12  # only where interpolation mixes both sides of an edge


def test_a_flip_flips_both() -> None:
    """Without scale it is numpy's."""
    pixels, mask = blocks(1)[0]
    from torchvision.tv_tensors import Mask

    image, target = mask_transform(32, 1.0, (1.0, 1.0), [0.5] * 3)(
        Image.fromarray(pixels), {'mask': Mask(torch.from_numpy(mask))}
    )
    assert np.array_equal(target['mask'].numpy(), mask[:, ::-1])
    assert np.allclose(image.numpy(), pixels[:, ::-1].transpose(2, 0, 1) / 255)


def test_measuring_keeps_the_mask_as_it_is(tmp_path: Path) -> None:
    """Only the image goes onto the canvas."""
    (split,) = open_masks(str(write_voc(tmp_path / 'voc')), ('val',))
    image, target = MaskDataset(split, FitCanvas(64, [0.5]), 'L')[0]
    assert image.shape == (1, 64, 64) and target['mask'].shape == (32, 32) and target['fitted'] == (64, 64)


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def resized(path: Path) -> None:
    with Image.open(path) as opened:
        small = opened.resize((16, 20))
    small.save(path)


def value(number: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[3, 3] = number
        Image.fromarray(mask).save(path)

    return write


def colored(path: Path) -> None:
    Image.new('RGB', (32, 32)).save(path)


CASES: list[tuple[str, Callable[[Path], None], str]] = [
    ('SegmentationClass/val1.png', resized, 'val1.png: is 16x20, but its image {}/JPEGImages/val1.jpg is 32x32'),
    ('SegmentationClass/train2.png', value(7), 'train2.png: holds the value 7, which is no class; classes are 0 to 2'),
    ('SegmentationClass/train2.png', colored, 'train2.png: has colors (RGB), not a class for each pixel'),
    ('SegmentationClass/train2.png', broken, 'train2.png: not a mask that can be read'),
    ('SegmentationClass/train0.png', Path.unlink, 'train0.jpg: has no mask, {}/SegmentationClass/train0.png is not'),
    ('JPEGImages/train0.jpg', Path.unlink, 'names train0, but {}/JPEGImages/train0.jpg is not there'),
    ('JPEGImages/train0.jpg', lambda path: path.write_text('x'), 'train0.jpg: not an image that can be read'),
    ('ImageSets/Segmentation/val.txt', Path.unlink, 'val.txt: no such file; splits there: train'),
    ('ImageSets/Segmentation/val.txt', lambda path: path.write_text('\n'), 'val.txt: names no image'),
    ('ImageSets/Segmentation/val.txt', lambda path: path.write_text('../x\n'), 'names ../x, which lies outside'),
    ('ImageSets/Segmentation', shutil.rmtree, 'neither ImageSets/Segmentation/ (VOC) nor images/training/ (ADE)'),
    ('classes.txt', lambda path: path.write_text('a\nb\na\n'), 'classes.txt: names a twice'),
    ('images', Path.mkdir, 'holds the layouts of VOC and of ADE; say which by --layout'),
]


@pytest.mark.parametrize('file,damage,message', CASES, ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_what_is_wrong_is_named(tmp_path: Path, file: str, damage: Callable[[Path], None], message: str) -> None:
    """Before anything is trained."""
    folder = write_voc(tmp_path / 'voc')
    (folder / 'classes.txt').write_text('a\nb\nc\n')
    damage(folder / file)
    with pytest.raises(UserError) as raised:
        open_masks(str(folder), ('train', 'val'))
    assert message.format(folder) in str(raised.value)


def test_what_is_wrong_in_ade(tmp_path: Path) -> None:
    """Classes that begin at 1 without the flag, a missing folder, a mask that is not there, nothing labeled."""
    folder = write_ade(tmp_path / 'ade')
    with pytest.raises(UserError, match="value 3, which is no class; .* --reduce-zero-label is for ADE20K's"):
        open_masks(str(folder), ('train',), num_classes=3)
    with pytest.raises(UserError, match='images/nowhere: no such folder'):
        open_masks(str(folder), ('train', 'nowhere'))
    (folder / 'annotations' / 'validation' / '1.png').unlink()
    with pytest.raises(UserError, match='images/validation/1.jpg: has no mask'):
        open_masks(str(folder), ('train', 'val'))
    for mask in (folder / 'annotations' / 'training').iterdir():
        Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match='annotations/training: no mask of the split has a pixel that counts'):
        open_masks(str(folder), ('train',), coding=Coding(reduce_zero=True))
