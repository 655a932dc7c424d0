"""COCO-format folders and COCO's numbers, against pycocotools itself, closed forms and a brute-force loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coding
from pycocotools.coco import COCO

from coco_folders import content, write_coco
from ctc_timm.dense.coco import CocoSplit, evaluate_results, metric_names, to_results
from ctc_timm.utils.errors import UserError

Content = dict[str, Any]


@pytest.mark.parametrize('suffix', ['', '2017'])
def test_boxes_and_classes(tmp_path: Path, suffix: str) -> None:
    """Corners in pixels; classes count from 1 over the gap in the ids; masks as pycocotools makes them."""
    split = CocoSplit(write_coco(tmp_path, {'train': content()}, suffix), 'train', masks=True)
    assert split.names == {3: 'square', 11: 'bar'} and str(split) == '8 objects in 4 images'
    image, target = split[1]
    assert image.size == (32, 32) and target['image_id'] == 11 and target['name'] == '1.png'
    assert target['boxes'].tolist() == [[3, 4, 13, 14], [18, 3, 24, 23]] and target['labels'].tolist() == [1, 2]
    plain = COCO(str(split.file))
    expected = [plain.annToMask(annotation) for annotation in plain.loadAnns(plain.getAnnIds(imgIds=[11]))]
    assert np.array_equal(target['masks'].numpy(), np.stack(expected)) and target['masks'].sum() == 100 + 120


def test_cut_boxes_are_counted(tmp_path: Path) -> None:
    """A box over the border, one beside the image, one without area, a crowd, an image without annotations."""
    annotated = content(3)
    notes = annotated['annotations'] = annotated['annotations'][:4]
    notes[0]['bbox'] = [-4, 20, 10, 30]
    notes[1]['bbox'] = [40, 2, 6, 20]
    notes[2]['bbox'] = [5, 5, 0, 8]
    notes[3].update(iscrowd=1)
    split = CocoSplit(write_coco(tmp_path, {'train': annotated}), 'train')
    assert list(split.counts.values()) == [1, 2, 1, 1]
    assert split[0][1]['boxes'].tolist() == [[0, 20, 6, 32]]
    assert split[1][1]['boxes'].shape == (0, 4) and split[2][1]['labels'].shape == (0,)
    assert str(split) == (
        '2 objects in 3 images, 1 boxes cut at the border, 2 boxes without area left out, 1 crowds, '
        '1 images without annotations'
    )


def segmented(segmentation: Any) -> Callable[[Content], Any]:
    return lambda c: c['annotations'][0].update(segmentation=segmentation)


MISTAKES: list[tuple[Callable[[Content], Any], str]] = [
    (lambda c: c['annotations'][2].update(image_id=99), 'annotation 3 has image_id 99, which is not in images'),
    (lambda c: c['annotations'][2].update(category_id=4), 'annotation 3 has category_id 4, which is not in categories'),
    (lambda c: c['annotations'][1].update(bbox=[1, 2, 3]), 'annotation 2 has no bbox of 4 numbers'),
    (lambda c: c['annotations'][1].update(bbox=[1, 2, 3, 1e999]), 'annotation 2 has no bbox of 4 numbers'),
    (lambda c: c['annotations'][1].pop('image_id'), 'not annotations in the format of COCO .KeyError'),
    (lambda c: c['annotations'][1].update(id=1), 'annotations with id 1 stand twice'),
    (lambda c: c['images'][3].update(id=10), 'images with id 10 stand twice'),
    (lambda c: c['images'][3].update(file_name='../../secret.png'), 'image 13 is not in .*train: ../../secret.png'),
    (lambda c: c['images'][3].update(file_name='/etc/passwd'), 'image 13 is not in .*train: /etc/passwd'),
    (lambda c: c['images'][3].update(file_name='9.png'), 'image 13 is not in .*train: 9.png'),
    (lambda c: c.update(categories=[]), 'holds no categories'),
    (lambda c: c.update(annotations=[]), 'holds no annotations'),
    (lambda c: c.pop('annotations'), 'not annotations in the format of COCO'),
    (lambda c: [note.update(iscrowd=1) for note in c['annotations']], 'holds no object to find'),
    (segmented(None), 'the segmentation of annotation 1: '),
    (segmented([]), 'the segmentation of annotation 1: '),
    (segmented({'size': [8, 8], 'counts': [64]}), 'the segmentation of annotation 1: is 8x8, unlike its image'),
    (segmented({'size': [32, 32], 'counts': [5, 2000]}), 'the segmentation of annotation 1: '),
    (segmented([['a', 'b', 'c', 'd', 'e', 'f']]), 'the segmentation of annotation 1: .*could not convert'),
]


@pytest.mark.parametrize('change,message', MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_broken_annotations_are_named(tmp_path: Path, change: Callable[[Content], Any], message: str) -> None:
    """With the file's name, and the id."""
    broken, folder = content(), write_coco(tmp_path, {'train': content()})
    change(broken)
    (folder / 'annotations' / 'instances_train.json').write_text(json.dumps(broken))
    with pytest.raises(UserError, match=f'instances_train.json: .*{message}'):
        CocoSplit(folder, 'train', masks=True)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, {'train': content()})
    with pytest.raises(UserError, match='no annotations/instances_val.json'):
        CocoSplit(folder, 'val')
    with pytest.raises(UserError, match='nowhere: no annotations.instances_train.json'):
        CocoSplit(tmp_path / 'nowhere', 'train')
    split = CocoSplit(folder, 'train')
    (folder / 'train' / '2.png').write_bytes(b'\x89PNG no more')
    with pytest.raises(UserError, match=r'2\.png: not an image'):
        split[2]
    Image.new('RGB', (30, 32)).save(folder / 'train' / '1.png')
    with pytest.raises(UserError, match=r'1\.png: is 30x32, but image 11 .* is 32x32'):
        split[1]
    (folder / 'annotations' / 'instances_train.json').write_text('{"images": [')
    with pytest.raises(UserError, match=r'instances_train\.json: not annotations in the format of COCO .JSONDecode'):
        CocoSplit(folder, 'train')


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """Four images of a square (100 pixels) and a bar (120 pixels)."""
    return CocoSplit(write_coco(tmp_path, {'val': content()}), 'val')


def perfect(split: CocoSplit, score: float = 0.9) -> list[dict[str, Any]]:
    """Every object as a detection."""
    rows = []
    for annotation in split.coco.anns.values():
        code = coding.encode(np.asfortranarray(split.coco.annToMask(annotation)))
        row = {key: annotation[key] for key in ('image_id', 'category_id', 'bbox')}
        rows.append({**row, 'score': score, 'segmentation': code})
    return rows


def test_perfect_and_nothing(split: CocoSplit) -> None:
    """1 for every object found exactly, 0 for none; sizes that do not occur have no number."""
    split.masks = True
    names = {'ap', 'ap50', 'ap75', 'ap_small', 'ap/square', 'ap/bar'}
    expected = {f'{kind}_{name}' for kind in ('box', 'mask') for name in names}
    assert evaluate_results(split, perfect(split)) == pytest.approx(dict.fromkeys(expected, 1.0))
    assert evaluate_results(split, []) == pytest.approx(dict.fromkeys(expected, 0.0))
    assert {name for name in expected if '/' not in name} < set(metric_names(True))


def test_half_found_is_51_of_101_points(split: CocoSplit) -> None:
    """Two of four objects of each class, nothing false: precision is 1 up to recall 0.5, at 51 of 101 points."""
    rows = [row for row in perfect(split) if row['image_id'] < 12]
    assert evaluate_results(split, rows)['box_ap'] == pytest.approx(51 / 101)


def test_a_shifted_box_counts_up_to_its_overlap(split: CocoSplit) -> None:
    """Squares shifted by 2 of 10 pixels have IoU 80/120, enough for thresholds 0.5 to 0.65: 4 of 10."""
    rows = perfect(split)
    for row in rows:
        if row['category_id'] == 3:
            row['bbox'] = [row['bbox'][0] + 2, *row['bbox'][1:]]
    metrics = evaluate_results(split, rows)
    assert metrics['box_ap/square'] == pytest.approx(0.4) and metrics['box_ap/bar'] == pytest.approx(1.0)
    assert (metrics['box_ap50'], metrics['box_ap75']) == pytest.approx((1.0, 0.5))


def test_crowds_are_neither_missed_nor_false(tmp_path: Path) -> None:
    """A crowd that is not found costs nothing, and detections within it neither."""
    crowded = content()
    crowd = dict(iscrowd=1, segmentation={'size': [32, 32], 'counts': [0, 1024]}, bbox=[0, 0, 32, 32])
    crowded['annotations'][0].update(crowd)
    split = CocoSplit(write_coco(tmp_path, {'val': crowded}), 'val')
    rows = [row for row in perfect(split) if row['bbox'] != [0, 0, 32, 32]]
    assert evaluate_results(split, rows)['box_ap'] == pytest.approx(1.0)
    within = {'image_id': 10, 'category_id': 3, 'bbox': [20, 20, 5, 5], 'score': 0.99}
    assert evaluate_results(split, [*rows, within])['box_ap'] == pytest.approx(1.0)
    assert evaluate_results(split, [*rows, {**within, 'image_id': 11}])['box_ap'] < 0.95


def test_the_way_back_from_the_canvas(tmp_path: Path) -> None:
    """An image of 40x20 shown as 32x16: boxes divided by 0.8, cut at the image, labels back over the gap."""
    annotated = content(1)
    annotated['images'][0].update(width=40, height=20)
    split = CocoSplit(write_coco(tmp_path, {'val': annotated}), 'val')
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, 4:12, 8:16] = 1.0
    output = {
        'boxes': torch.tensor([[8.0, 4.0, 16.0, 12.0], [24.0, 8.0, 32.0, 24.0]]),
        'labels': torch.tensor([2, 1]),
        'scores': torch.tensor([0.5, 0.25]),
        'masks': masks,
    }
    first, second = to_results(output, {'image_id': 10, 'fitted': (16, 32)}, split)
    assert first['bbox'] == pytest.approx([10, 5, 10, 10]) and second['bbox'] == pytest.approx([30, 10, 10, 10])
    assert (first['image_id'], first['category_id'], second['category_id']) == (10, 11, 3)
    expected = np.zeros((20, 40), dtype=np.uint8)
    expected[5:15, 10:20] = 1
    assert np.array_equal(coding.decode(first['segmentation']), expected)
