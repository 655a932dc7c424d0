"""Reading COCO-format folders: what is put in order and counted, and what is refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folders import content, write_coco
from PIL import Image
from pycocotools.coco import COCO
from torchvision.tv_tensors import BoundingBoxes, Mask

from ctc_timm.dense.augment import FitCanvas, collate, train_transform
from ctc_timm.dense.coco import CocoDataset, open_coco
from ctc_timm.dense.scenes import write_scenes
from ctc_timm.utils.errors import UserError

Content = dict[str, Any]


@pytest.mark.parametrize('suffix', ['', '2017'])
def test_boxes_and_classes(tmp_path: Path, suffix: str) -> None:
    """Corners in pixels; classes count from 1 over the gap in the ids; masks as pycocotools itself makes them."""
    told = content()
    split = open_coco(write_coco(tmp_path, {'train': told}, suffix), 'train')
    assert split.class_of == {3: 1, 11: 2} and split.class_names == ['square', 'bar']
    image, target = CocoDataset(split, masks=True)[1]
    assert image.size == (32, 32) and target['image_id'] == 11
    assert target['boxes'].tolist() == [[3, 4, 13, 14], [18, 3, 24, 23]] and target['labels'].tolist() == [1, 2]
    tool = COCO(str(split.file))
    expected = [tool.annToMask(annotation) for annotation in tool.loadAnns(tool.getAnnIds(imgIds=[11]))]
    assert np.array_equal(target['masks'].numpy(), np.stack(expected)) and target['masks'].sum() == 100 + 120


def test_scenes_are_read_with_their_exact_masks(tmp_path: Path) -> None:
    """Uncompressed run-length codes of the digits' scenes: each mask's own box is the box."""
    split = open_coco(write_scenes(tmp_path / 's', 3, 1, 64, layouts=['coco']), 'train')
    for i in range(3):
        _, target = CocoDataset(split, masks=True)[i]
        for box, mask in zip(target['boxes'].tolist(), target['masks'].numpy()):
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_what_is_put_in_order_is_counted(tmp_path: Path) -> None:
    """A box over the border, one beside the image, one without area, a crowd, an image without annotations."""
    told = content(3)
    notes = told['annotations']
    notes[0]['bbox'] = [-4, 20, 10, 30]
    notes[1]['bbox'] = [40, 2, 6, 20]
    notes[2]['bbox'] = [5, 5, 0, 8]
    notes[3].update(iscrowd=1)
    told['annotations'] = notes[:4]
    split = open_coco(write_coco(tmp_path, {'train': told}), 'train')
    assert split.counts == {
        'boxes cut at the border': 1,
        'boxes without area left out': 2,
        'crowds': 1,
        'images without annotations': 1,
    }
    dataset = CocoDataset(split)
    assert dataset[0][1]['boxes'].tolist() == [[0, 20, 6, 32]]
    assert dataset[1][1]['boxes'].shape == (0, 4) and dataset[2][1]['labels'].shape == (0,)
    assert '2 objects in 3 images, 1 boxes cut at the border, 2 boxes without area left out' in split.told()


def broken(change: Callable[[Content], Any]) -> Content:
    told = copy.deepcopy(content())
    change(told)
    return told


MISTAKES = [
    (lambda c: c['annotations'][2].update(image_id=99), 'annotation 3 names image 99, which is not there'),
    (lambda c: c['annotations'][2].update(category_id=4), 'annotation 3 names category 4, which is not there'),
    (lambda c: c['annotations'][1].update(bbox=[1, 2, 3]), 'annotation 2 has no bbox of 4 numbers'),
    (lambda c: c['annotations'][1].update(bbox=[1, 2, 3, 1e999]), 'annotation 2 has no bbox of 4 numbers'),
    (lambda c: c['annotations'][1].pop('image_id'), 'annotations id 2 has no image_id'),
    (lambda c: c['annotations'][1].update(id=1), 'annotations with id 1 stand twice'),
    (lambda c: c['images'][3].update(id=10), 'images with id 10 stand twice'),
    (lambda c: c['images'][3].update(id='13'), 'images\\[3\\] has no whole number as its id'),
    (lambda c: c['images'][3].update(width=0), 'image 13 has no pixels'),
    (lambda c: c['images'][3].update(file_name='../../secret.png'), 'outside of'),
    (lambda c: c['images'][3].update(file_name='/etc/passwd'), 'outside of'),
    (lambda c: c.update(categories=[]), 'holds no category'),
    (lambda c: c.pop('annotations'), 'has no list of annotations'),
]


@pytest.mark.parametrize('change,message', MISTAKES, ids=[message for _, message in MISTAKES])
def test_broken_annotations_are_told(tmp_path: Path, change: Callable[[Content], Any], message: str) -> None:
    """With the file's name, and the id."""
    folder = write_coco(tmp_path, {'train': content()})
    (folder / 'annotations' / 'instances_train.json').write_text(json.dumps(broken(change)))
    with pytest.raises(UserError, match=f'instances_train.json: .*{message}'):
        open_coco(folder, 'train')


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, {'train': content()})
    with pytest.raises(UserError, match='no annotations/instances_val.json'):
        open_coco(folder, 'val')
    with pytest.raises(UserError, match='--data-dir .*nowhere: no such folder'):
        open_coco(tmp_path / 'nowhere', 'train')
    dataset = CocoDataset(open_coco(folder, 'train'))
    (folder / 'train' / '2.png').write_bytes(b'\x89PNG no more')
    with pytest.raises(UserError, match=r'2\.png: not an image'):
        dataset[2]
    Image.new('RGB', (30, 32)).save(folder / 'train' / '1.png')
    with pytest.raises(UserError, match=r'1\.png: is 30x32, but image 11 .* is 32x32'):
        dataset[1]
    (folder / 'train' / '3.png').unlink()
    with pytest.raises(UserError, match=r'image 13 is not there: .*3\.png'):
        open_coco(folder, 'train')
    (folder / 'annotations' / 'instances_train.json').write_text('{"images": [')
    with pytest.raises(UserError, match=r'instances_train\.json: no JSON'):
        open_coco(folder, 'train')


@pytest.mark.parametrize(
    'segmentation,message',
    [
        (None, 'is not there'),
        ([[1, 2, 3, 4]], 'not of three points'),
        ({'size': [8, 8], 'counts': [64]}, 'is of size'),
        ({'size': [32, 32], 'counts': [5, 5]}, 'has runs of 10 pixels, not 1024'),
        ([['a', 'b', 'c', 'd', 'e', 'f']], 'could not convert string to float'),
    ],
)
def test_broken_segmentations_are_told(tmp_path: Path, segmentation: Any, message: str) -> None:
    told = content(1)
    told['annotations'][0]['segmentation'] = segmentation
    dataset = CocoDataset(open_coco(write_coco(tmp_path, {'train': told}), 'train'), masks=True)
    with pytest.raises(UserError, match=f'instances_train.json: the segmentation of annotation 1: .*{message}'):
        dataset[0]


def test_flip_by_hand(tmp_path: Path) -> None:
    """A flipped box begins where its right side was, counted from the other border; the pixels go along."""
    dataset = CocoDataset(open_coco(write_coco(tmp_path, {'train': content()}), 'train'), masks=True)
    image, target = dataset[0]
    plain, flipped = (train_transform(32, p, (1.0, 1.0), (0, 0, 0))(*copy.deepcopy((image, target))) for p in (0, 1))
    assert plain[1]['boxes'].tolist() == [[2, 4, 12, 14], [18, 2, 24, 22]]
    assert flipped[1]['boxes'].tolist() == [[32 - 12, 4, 32 - 2, 14], [32 - 24, 2, 32 - 18, 22]]
    assert torch.equal(flipped[0], plain[0].flip(-1)) and torch.equal(flipped[1]['masks'], plain[1]['masks'].flip(-1))


def test_scale_jitter_keeps_boxes_on_their_objects(tmp_path: Path) -> None:
    """After any draw the red pixels of the square are those within its box; labels go with the boxes that are left."""
    dataset = CocoDataset(open_coco(write_coco(tmp_path, {'train': content()}), 'train'))
    transform = train_transform(48, 0.5, (0.6, 2.0), (0.0, 0.0, 0.0))
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = transform(*dataset[seed % 4])
        assert image.shape == (3, 48, 48) and len(target['boxes']) == len(target['labels'])
        seen.add(len(target['boxes']))
        for box, label in zip(target['boxes'].tolist(), target['labels'].tolist()):
            rows, columns = (image[label - 1] > 0.5).nonzero().T
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == pytest.approx([float(edge) for edge in edges], abs=1.5)
    assert 2 in seen


def test_fit_canvas_by_hand() -> None:
    """A 40x20 image on 32 pixels: 32x16 at the upper left, the mean below; factors that lead back."""
    image = Image.new('RGB', (40, 20), (255, 0, 0))
    canvas, target = FitCanvas(32, (0.5, 0.25, 0.75))(image, {'image_id': 1})
    assert target == {'image_id': 1, 'scale': (0.8, 0.8), 'fitted': (16, 32)}
    assert canvas.shape == (3, 32, 32)
    assert torch.equal(canvas[:, :16], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 32))
    assert torch.equal(canvas[:, 16:], torch.tensor([0.5, 0.25, 0.75])[:, None, None].expand(3, 16, 32))


def test_batches_hold_plain_tensors(tmp_path: Path) -> None:
    """Subclasses would make every operation of the detector slow."""
    dataset = CocoDataset(
        open_coco(write_coco(tmp_path, {'train': content()}), 'train'), train_transform(32, 0, (1, 1), (0, 0, 0)), True
    )
    assert isinstance(dataset[0][1]['boxes'], BoundingBoxes) and isinstance(dataset[0][1]['masks'], Mask)
    images, targets = collate([dataset[0], dataset[1]])
    assert {type(image) for image in images} == {torch.Tensor}
    assert {type(t[key]) for t in targets for key in ('boxes', 'labels', 'masks')} == {torch.Tensor}
