"""Small COCO-format folders for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{'id': 3, 'name': 'square'}, {'id': 11, 'name': 'bar'}]  # with a gap


def content(count: int = 4, size: int = 32) -> dict[str, Any]:
    """A light square and a light bar in every image, of places that go with its number."""
    images, annotations = [], []
    for i in range(count):
        images.append({'id': 10 + i, 'file_name': f'{i}.png', 'width': size, 'height': size})
        for category, box in ((3, [2 + i % 8, 4, 10, 10]), (11, [18, 2 + i % 6, 6, 20])):
            annotation = {'id': len(annotations) + 1, 'image_id': 10 + i, 'category_id': category, 'bbox': box}
            left, top, width, height = box
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            annotations.append({**annotation, 'area': width * height, 'iscrowd': 0, 'segmentation': [corners]})
    return {'images': images, 'annotations': annotations, 'categories': CATEGORIES}


def write_coco(folder: Path, splits: dict[str, dict[str, Any]], suffix: str = '') -> Path:
    """Write a folder of splits with images that show their boxes, red squares and green bars."""
    rng = np.random.default_rng(0)
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, told in splits.items():
        (folder / f'annotations/instances_{split}{suffix}.json').write_text(json.dumps(told))
        (folder / f'{split}{suffix}').mkdir(exist_ok=True)
        for image in told['images']:
            pixels = rng.integers(0, 40, (image['height'], image['width'], 3), dtype=np.uint8)
            for annotation in told['annotations']:
                if annotation['image_id'] == image['id'] and len(annotation['bbox']) == 4:
                    left, top, width, height = (max(0, round(x)) for x in annotation['bbox'])
                    pixels[top : top + height, left : left + width, 0 if annotation['category_id'] == 3 else 1] = 220
            Image.fromarray(pixels).save(folder / f'{split}{suffix}' / image['file_name'])
    return folder
