"""COCO's numbers against plain ways to the same: closed forms, a brute-force loop, and the way back from the canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folders import content, write_coco
from pycocotools import mask as coding

from ctc_timm.dense import coco_metrics
from ctc_timm.dense.coco import CocoSplit, decode_mask, open_coco

IMAGE = {'id': 10, 'width': 40, 'height': 20}


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """Four images of a square (100 pixels) and a bar (120 pixels)."""
    return open_coco(write_coco(tmp_path, {'val': content()}), 'val')


def perfect(split: CocoSplit, score: float = 0.9) -> list[dict[str, Any]]:
    """Every object as a detection."""
    rows = []
    for image in split.images:
        for annotation in split.annotations[image['id']]:
            code = coding.encode(np.asfortranarray(decode_mask(split.file, annotation, 32, 32)))
            row = {key: annotation[key] for key in ('image_id', 'category_id', 'bbox')}
            rows.append({**row, 'score': score, 'segmentation': code})
    return rows


def test_perfect_and_nothing(split: CocoSplit) -> None:
    """1 for every object found exactly, 0 for none; sizes that do not occur have no number."""
    names = {'ap', 'ap50', 'ap75', 'ap_small', 'ap/square', 'ap/bar'}
    expected = {f'{kind}_{name}' for kind in ('box', 'mask') for name in names}
    found = coco_metrics.measure(split, perfect(split), masks=True)
    assert found == pytest.approx(dict.fromkeys(expected, 1.0))
    assert coco_metrics.measure(split, [], masks=True) == pytest.approx(dict.fromkeys(expected, 0.0))
    assert names < {name.removeprefix('box_') for name in [*coco_metrics.metric_names(False), 'box_ap/bar', *names]}


def test_half_found_is_51_of_101_points(split: CocoSplit) -> None:
    """Two of four objects of each class, nothing false: precision is 1 up to recall 0.5, at 51 of 101 points."""
    rows = [row for row in perfect(split) if row['image_id'] < 12]
    assert coco_metrics.measure(split, rows)['box_ap'] == pytest.approx(51 / 101)


def test_a_shifted_box_counts_up_to_its_overlap(split: CocoSplit) -> None:
    """Squares shifted by 2 of 10 pixels have IoU 80/120, enough for thresholds 0.5 to 0.65: 4 of 10."""
    rows = perfect(split)
    for row in rows:
        if row['category_id'] == 3:
            row['bbox'] = [row['bbox'][0] + 2, *row['bbox'][1:]]
    found = coco_metrics.measure(split, rows)
    assert found['box_ap/square'] == pytest.approx(0.4) and found['box_ap/bar'] == pytest.approx(1.0)
    assert (found['box_ap50'], found['box_ap75']) == pytest.approx((1.0, 0.5))


def brute_force_ap50(split: CocoSplit, rows: list[dict[str, Any]], category: int) -> float:
    """Average precision at IoU 0.5, written out: match greedily by score, then 101 points of the upper envelope."""
    objects = [(i, o['bbox']) for i, some in split.annotations.items() for o in some if o['category_id'] == category]
    taken: set[int] = set()
    hits = []
    for row in sorted((r for r in rows if r['category_id'] == category), key=lambda r: -r['score']):
        best, chosen = 0.5, -1
        for n, (image, (x, y, w, h)) in enumerate(objects):
            if image != row['image_id'] or n in taken:
                continue
            a, b, c, d = row['bbox']
            inner = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
            iou = inner / (w * h + c * d - inner)
            if iou >= best:
                best, chosen = iou, n
        hits.append(chosen >= 0)
        taken.add(chosen)
    total = 0.0
    for point in range(101):
        best = 0.0
        for n in range(1, len(hits) + 1):
            if sum(hits[:n]) / len(objects) >= point / 100 - 1e-9:
                best = max(best, sum(hits[:n]) / n)
        total += best
    return total / 101


@pytest.mark.parametrize('seed', range(4))
def test_brute_force(split: CocoSplit, seed: int) -> None:
    """Shaken boxes, false ones and doubles, with scores that all differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in perfect(split) * 2:
        box = (np.asarray(row['bbox']) + rng.normal(0, 2.5, 4)).clip(1).tolist()
        category = int(rng.choice([3, 11])) if rng.random() < 0.2 else row['category_id']
        rows.append({**row, 'bbox': box, 'category_id': category, 'score': float(rng.random())})
    found = coco_metrics.measure(split, rows)
    expected = [brute_force_ap50(split, rows, category) for category in (3, 11)]
    assert 0 < expected[0] < 1
    assert found['box_ap50'] == pytest.approx(np.mean(expected), abs=1e-9)


def test_crowds_are_neither_missed_nor_false(tmp_path: Path) -> None:
    """A crowd that is not found costs nothing, and detections within it neither."""
    told = content()
    told['annotations'][0].update(iscrowd=1, segmentation={'size': [32, 32], 'counts': [0, 1024]}, bbox=[0, 0, 32, 32])
    split = open_coco(write_coco(tmp_path, {'val': told}), 'val')
    rows = [row for row in perfect(split) if row['bbox'] != [0, 0, 32, 32]]
    assert coco_metrics.measure(split, rows)['box_ap'] == pytest.approx(1.0)
    within = {'image_id': 10, 'category_id': 3, 'bbox': [20, 20, 5, 5], 'score': 0.99}
    assert coco_metrics.measure(split, [*rows, within])['box_ap'] == pytest.approx(1.0)
    outside = {**within, 'image_id': 11}
    assert coco_metrics.measure(split, [*rows, outside])['box_ap'] < 0.95


def test_the_way_back_from_the_canvas() -> None:
    """An image of 40x20 shown as 32x16: boxes divided by 0.8, cut at the image, labels back over the gap."""
    target = {'scale': (0.8, 0.8), 'fitted': (16, 32)}
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 4:12, 8:16] = 1.0
    output = {
        'boxes': torch.tensor([[8.0, 4.0, 16.0, 12.0]]),
        'labels': torch.tensor([2]),
        'scores': torch.tensor([0.5]),
        'masks': masks,
    }
    (row,) = coco_metrics.to_results(output, target, IMAGE, [3, 11])
    assert row['bbox'] == pytest.approx([10, 5, 10, 10]) and (row['image_id'], row['category_id']) == (10, 11)
    expected = np.zeros((20, 40), dtype=np.uint8)
    expected[5:15, 10:20] = 1
    assert np.array_equal(coding.decode(row['segmentation']), expected)
    (row,) = coco_metrics.to_results(
        {**output, 'boxes': torch.tensor([[24.0, 8.0, 32.0, 24.0]])}, target, IMAGE, [3, 11]
    )
    assert row['bbox'] == pytest.approx([30, 10, 10, 10])
