"""Folders of masks as they are read; metrics against scikit-learn and closed forms."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from ctc_timm.dense.loading import IGNORE
from ctc_timm.dense.masks import confusion, open_masks, read_classes, scores, voc_palette
from ctc_timm.dense.settings import SegmenterSettings
from ctc_timm.utils.errors import UserError
from mask_folders import blocks, write_ade, write_voc

PLAIN = SegmenterSettings()
ADE20K = SegmenterSettings(reduce_zero_label=True)


def test_voc(tmp_path: Path) -> None:
    """Values are classes whatever the palette says, 255 doesn't count, classes.txt names them."""
    folder = write_voc(tmp_path / 'voc')
    file = folder / 'SegmentationClass' / 'train1.png'
    with Image.open(file) as opened:
        indexed = opened.copy()
    indexed.putpalette(list(range(255, -1, -1)) * 3)
    indexed.save(file)
    train, val = open_masks(str(folder), PLAIN)
    assert (len(train), len(val), train.names, train.unlabeled) == (6, 3, ['0', '1', '2'], 0)
    for (image, target), (pixels, mask) in zip((train[i] for i in range(6)), blocks(6)):
        mask[0, 0] = IGNORE
        assert np.array_equal(target['mask'].numpy(), mask)
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 12
    (folder / 'classes.txt').write_text('ground\nred\ngreen\nblue\n')
    train, _ = open_masks(str(folder), PLAIN)
    assert train.names == ['ground', 'red', 'green', 'blue'] and str(train) == '6 images, 4 classes'


def test_ade(tmp_path: Path) -> None:
    """With 0 left out classes begin at 1; an image without a label is kept and counted."""
    folder = write_ade(tmp_path / 'ade')
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(folder / 'annotations' / 'training' / '2.png')
    train, val = open_masks(str(folder), ADE20K)
    assert (len(val), train.names) == (2, ['0', '1', '2'])
    assert str(train) == '4 images, 3 classes, 1 without a pixel that counts'
    for i, (_, mask) in enumerate(blocks(4)):
        mask[0, 0] = IGNORE
        assert np.array_equal(train[i][1]['mask'].numpy(), np.full_like(mask, IGNORE) if i == 2 else mask)
    train, _ = open_masks(str(folder), PLAIN)
    assert len(train.names) == 4 and train.unlabeled == 0


def test_values_of_sixteen_bits_and_another_ignored_value(tmp_path: Path) -> None:
    """`ignore_index` is of the file; what datasets give is 255 for it."""
    file = tmp_path / 'mask.png'
    Image.fromarray(np.array([[0, 1], [300, 2]], dtype=np.uint16)).save(file)
    assert read_classes(file, SegmenterSettings(ignore_index=300)).tolist() == [[0, 1], [-1, 2]]
    assert read_classes(file, dataclasses.replace(ADE20K, ignore_index=300)).tolist() == [[-1, 0], [-1, 1]]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def picture(value: int, mode: str = 'L', size: int = 32) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, (size, size), value).save(path)


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ('SegmentationClass/val1.png', picture(0, 'L', 16), 'is 16x16, but its image {}/JPEGImages/val1.jpg is 32x32'),
    ('SegmentationClass/train2.png', picture(7), 'holds the value 7, which is no class; classes are 0 to 2'),
    ('SegmentationClass/train2.png', picture(0, 'RGB'), 'train2.png: has colors (RGB), not a class for each pixel'),
    ('SegmentationClass/train2.png', cut_off, 'train2.png: not a mask that can be read'),
    ('SegmentationClass/train0.png', Path.unlink, 'train0.jpg: has no mask, {}/SegmentationClass/train0.png is not'),
    ('JPEGImages/train0.jpg', Path.unlink, 'names train0, but {}/JPEGImages/train0.jpg is not there'),
    ('JPEGImages/train0.jpg', lambda path: path.write_text('x'), 'train0.jpg: not an image that can be read'),
    ('ImageSets/Segmentation/val.txt', Path.unlink, 'val.txt: not a list of names'),
    ('ImageSets/Segmentation/val.txt', lambda path: path.write_text('\n'), "split 'val' has no images"),
    ('ImageSets/Segmentation/val.txt', lambda path: path.write_text('../JPEGImages/val0\n'), 'is not there'),
    ('ImageSets/Segmentation', shutil.rmtree, 'holds none of ImageSets/Segmentation/'),
    ('classes.txt', lambda path: path.write_text('a\nb\na\n'), 'classes.txt: must name 2 to 255 classes, each once'),
    ('images', Path.mkdir, "holds both of ImageSets/Segmentation/, `layout='voc'`, and images/, 'ade'"),
]


@pytest.mark.parametrize('file,damage,message', CASES, ids=[f'{i}-{case[0]}' for i, case in enumerate(CASES)])
def test_what_is_wrong_is_named(tmp_path: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    """Before anything is trained."""
    folder = write_voc(tmp_path / 'voc')
    (folder / 'classes.txt').write_text('a\nb\nc\n')
    damage(folder / file)
    with pytest.raises(UserError) as raised:
        open_masks(str(folder), PLAIN)
    assert message.format(folder) in str(raised.value)


def test_what_is_wrong_in_ade(tmp_path: Path) -> None:
    """Classes that begin at 1 without the setting, a missing folder, a mask that is not there, nothing labeled."""
    folder = write_ade(tmp_path / 'ade')
    with pytest.raises(UserError, match="value 3, which is no class; .* `reduce_zero_label` is for ADE20K's"):
        open_masks(str(folder), SegmenterSettings(num_classes=3))
    with pytest.raises(UserError, match='images/nowhere: split .nowhere. has no images'):
        open_masks(str(folder), SegmenterSettings(val_split='nowhere'))
    for mask in (folder / 'annotations' / 'training').iterdir():
        Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match='annotations/training: no mask of the split has a pixel that counts'):
        open_masks(str(folder), ADE20K)
    (folder / 'annotations' / 'validation' / '1.png').unlink()
    with pytest.raises(UserError, match='images/validation/1.jpg: has no mask'):
        open_masks(str(folder), PLAIN)


def test_voc_colors() -> None:
    """The first ones are those of the VOC development kit."""
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    known += [(128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0)]
    assert [tuple(row) for row in voc_palette()[:11].tolist()] == known
    assert tuple(voc_palette()[255]) == (224, 224, 192)


@pytest.mark.parametrize('seed', range(3))
def test_metrics_are_scikit_learns(seed: int) -> None:
    """With ignored pixels, and images added up before anything is divided."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(5, (3, 9, 7), generator=generator, dtype=torch.uint8)
    predicted = torch.randint(5, (3, 9, 7), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    matrix = sum((confusion(p, t, 5) for p, t in zip(predicted, truth)), torch.zeros(5, 5, dtype=torch.int64))
    p, t, metrics = predicted[truth != IGNORE], truth[truth != IGNORE], scores(matrix, 'abcde')
    assert metrics['pixel_accuracy'] == pytest.approx(accuracy_score(t, p), abs=1e-12)
    assert [metrics[f'iou/{k}'] for k in 'abcde'] == pytest.approx(jaccard_score(t, p, average=None), abs=1e-12)
    assert np.array_equal(matrix.numpy(), confusion_matrix(t, p))
    assert metrics['miou'] == pytest.approx(jaccard_score(t, p, average='macro'))
    assert metrics['mean_accuracy'] == pytest.approx(balanced_accuracy_score(t, p))


def test_absent_classes() -> None:
    """A class that is nowhere has no part in the mean; one that is only predicted counts as 0 in it."""
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    metrics = scores(confusion(predicted, truth, 4), ['a', 'b', 'c', 'd'])
    assert metrics['miou'] == pytest.approx((1 + 0.5 + 0) / 3) and 'iou/d' not in metrics
    assert metrics['mean_accuracy'] == pytest.approx((1 + 0.5) / 2)
