"""COCO-format folders: read, checked, and put in order as COCO's own tools take them.

annotations/instances_train.json   train/    or   annotations/instances_train2017.json   train2017/
annotations/instances_val.json     val/      or   annotations/instances_val2017.json     val2017/

Boxes are cut at the border of their image, and those without area left out, as torchvision's reference scripts do; both
are counted. Images without annotations stay as negatives. Category ids may have gaps: classes count from 1, 0 is
background. Crowds are not trained on, and are what COCO makes of them when measuring.

M: objects of an image. H, W: its sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, Mask

from ..utils.errors import UserError, nearest, one_line

NEEDED = "needs the package pycocotools; pip install 'ctc-timm[dense]'"


@dataclass
class CocoSplit:
    """A split of a COCO-format folder.

    Attributes:
        file: The annotations.
        folder: The images.
        images: As in the file, in its order.
        annotations: Of each image by its id; boxes are cut, those without area left out.
        categories: As in the file, by id in rising order.
        counts: What was put in order, by what it was.
    """

    file: Path
    folder: Path
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def class_of(self) -> dict[int, int]:
        """Class of each category id, from 1."""
        return {category['id']: i for i, category in enumerate(self.categories, 1)}

    @property
    def class_names(self) -> list[str]:
        """Name of each class, from class 1 on."""
        return [str(category['name']) for category in self.categories]

    def content(self) -> dict[str, Any]:
        """What pycocotools takes in place of the file."""
        annotations = [annotation for image in self.images for annotation in self.annotations[image['id']]]
        return {'images': self.images, 'annotations': annotations, 'categories': self.categories}

    def told(self) -> str:
        """How much there is, and what was put in order."""
        objects = sum(map(len, self.annotations.values()))
        told = [f'{objects:,} objects in {len(self.images):,} images']
        return ', '.join([*told, *(f'{count:,} {what}' for what, count in self.counts.items() if count)])


def open_coco(folder: str | Path, split: str, flag: str = '--data-dir') -> CocoSplit:
    """Read a split.

    Args:
        folder: In COCO's layout.
        split: 'train' or 'val'.
        flag: What to call the folder in error messages.

    Raises:
        UserError: Nothing there, broken JSON, ids that name nothing or stand twice, image files that are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ''
        raise UserError(f'{flag} {folder}: no such folder{near}')
    for name in (split, f'{split}2017'):
        file, images = folder / 'annotations' / f'instances_{name}.json', folder / name
        if file.is_file() and images.is_dir():
            return _read(file, images)
    raise UserError(
        f'{flag} {folder}: no annotations/instances_{split}.json beside a folder {split}/, '
        f'nor instances_{split}2017.json beside {split}2017/'
    )


def same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Refuse splits of different categories.

    Raises:
        UserError: An id in one of them only.
    """
    for split, other in ((train, val), (val, train)):
        missing = set(other.class_of) - set(split.class_of)
        if missing:
            raise UserError(f'{split.file}: has no category {min(missing)}, which {other.file.name} has')


def require_objects(*splits: CocoSplit) -> None:
    """Refuse splits in which there is nothing to find.

    Raises:
        UserError: No annotation but of crowds.
    """
    for split in splits:
        if all(o['iscrowd'] for objects in split.annotations.values() for o in objects):
            raise UserError(f'{split.file}: holds no object to find')


def _read(file: Path, folder: Path) -> CocoSplit:
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file}: no JSON: {one_line(error)}') from None
    if not isinstance(content, dict):
        raise UserError(f'{file}: holds no mapping of images, annotations and categories')
    images = _by_id(file, content, 'images', {'file_name': str, 'width': int, 'height': int})
    categories = _by_id(file, content, 'categories', {'name': str})
    found = _by_id(file, content, 'annotations', {'image_id': int, 'category_id': int, 'bbox': list})
    if not images:
        raise UserError(f'{file}: holds no image')
    if not categories:
        raise UserError(f'{file}: holds no category')
    _check_files(file, folder, images)
    annotations: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    clipped = empty = crowds = 0
    for number, annotation in found.items():
        image, category = annotation['image_id'], annotation['category_id']
        if image not in images:
            raise UserError(f'{file}: annotation {number} names image {image}, which is not there')
        if category not in categories:
            raise UserError(f'{file}: annotation {number} names category {category}, which is not there')
        given = _box(file, annotation)
        box = _clip(given, images[image])
        if box[2] <= 0 or box[3] <= 0:
            empty += 1
            continue
        clipped += any(abs(a - b) > 0.01 for a, b in zip(given, box))  # rounded ones are meant to touch the border
        crowd = int(bool(annotation.get('iscrowd', 0)))
        crowds += crowd
        area: Any = annotation.get('area')
        if type(area) not in (int, float) or not 0 <= area < math.inf:
            area = box[2] * box[3]
        annotations[image].append({**annotation, 'bbox': box, 'iscrowd': crowd, 'area': area})
    counts = {
        'boxes cut at the border': clipped,
        'boxes without area left out': empty,
        'crowds': crowds,
        'images without annotations': sum(not some for some in annotations.values()),
    }
    ordered = [categories[number] for number in sorted(categories)]
    return CocoSplit(file, folder, list(images.values()), annotations, ordered, counts)


def _by_id(file: Path, content: dict[str, Any], key: str, wanted: dict[str, type]) -> dict[int, dict[str, Any]]:
    """The rows of a part of the file by their id, each with the fields that it needs."""
    rows = content.get(key)
    if not isinstance(rows, list):
        raise UserError(f'{file}: has no list of {key}')
    found: dict[int, dict[str, Any]] = {}
    for place, row in enumerate(rows):
        number = row.get('id') if isinstance(row, dict) else None
        if type(number) is not int:
            raise UserError(f'{file}: {key}[{place}] has no whole number as its id')
        if number in found:
            raise UserError(f'{file}: {key} with id {number} stand twice')
        for name, kind in wanted.items():
            if type(row.get(name)) is not kind:
                raise UserError(f'{file}: {key} id {number} has no {name}, or not as COCO writes it')
        found[number] = row
    return found


def _check_files(file: Path, folder: Path, images: dict[int, dict[str, Any]]) -> None:
    """Refuse sizes that can't be, names that leave the folder, and files that are not there."""
    missing = []
    for number, image in images.items():
        name = Path(image['file_name'])
        if name.is_absolute() or '..' in name.parts:
            raise UserError(f'{file}: image {number} is to be {image["file_name"]}, outside of {folder}')
        if image['width'] < 1 or image['height'] < 1:
            raise UserError(f'{file}: image {number} has no pixels')
        if not (folder / name).is_file():
            missing.append((number, name))
    if missing:
        number, name = missing[0]
        more = f', nor {len(missing) - 1} more' if len(missing) > 1 else ''
        raise UserError(f'{file}: image {number} is not there: {folder / name}{more}')


def _box(file: Path, annotation: dict[str, Any]) -> list[float]:
    box = annotation['bbox']
    if len(box) != 4 or not all(type(x) in (int, float) and math.isfinite(x) for x in box):
        raise UserError(f'{file}: annotation {annotation["id"]} has no bbox of 4 numbers, but {str(box)[:60]}')
    return [float(x) for x in box]


def _clip(box: list[float], image: dict[str, Any]) -> list[float]:
    """A box (left, top, width, height) as far as it lies in its image."""
    left, right = (min(max(x, 0.0), float(image['width'])) for x in (box[0], box[0] + box[2]))
    top, bottom = (min(max(y, 0.0), float(image['height'])) for y in (box[1], box[1] + box[3]))
    return [left, top, right - left, bottom - top]


def decode_mask(file: Path, annotation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """An annotation's segmentation, polygons or run-length code, as [H, W], uint8 of 0 and 1.

    Raises:
        UserError: It has none, one of another size, or one that can't be read.
    """
    coding = coco_masks()
    segmentation = annotation.get('segmentation')
    try:
        if isinstance(segmentation, dict):
            if list(segmentation['size']) != [height, width]:
                raise ValueError(f'is of size {segmentation["size"]}, not {[height, width]}')
            code = segmentation
            if isinstance(segmentation['counts'], list):
                if sum(segmentation['counts']) != height * width:
                    raise ValueError(f'has runs of {sum(segmentation["counts"])} pixels, not {height * width}')
                code = coding.frPyObjects(segmentation, height, width)
        elif isinstance(segmentation, list) and segmentation:
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
                raise ValueError('has a polygon that is not of three points or more')
            code = coding.merge(coding.frPyObjects(segmentation, height, width))
        else:
            raise ValueError('is not there')
        return coding.decode(code)
    except Exception as error:  # of pycocotools, about whatever stands there
        raise UserError(f'{file}: the segmentation of annotation {annotation["id"]}: {one_line(error)}') from None


def coco_masks() -> Any:
    """pycocotools' module of masks.

    Raises:
        UserError: It is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(f'COCO-format data: {NEEDED}') from None
    return mask


class CocoDataset(Dataset):
    """Images with their objects.

    An item is (image, target): the target has `boxes`, [M, 4] as corners in pixels, `labels`, [M] classes from 1,
    `image_id`, and `masks`, [M, H, W], if asked for. Crowds are left out.

    Args:
        split: What is in it.
        transform: transform(image, target), as torchvision.transforms.v2 has them.
        masks: Whether objects' masks are wanted.
    """

    def __init__(
        self, split: CocoSplit, transform: Callable[[Any, Any], Any] | None = None, masks: bool = False
    ) -> None:
        self.split = split
        self.transform = transform
        self.masks = masks
        self._class_of = split.class_of

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        entry = self.split.images[index]
        image = self.image(index)
        height, width = entry['height'], entry['width']
        objects = [o for o in self.split.annotations[entry['id']] if not o['iscrowd']]
        boxes = torch.tensor([o['bbox'] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            'boxes': BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width)),
            'labels': torch.tensor([self._class_of[o['category_id']] for o in objects], dtype=torch.int64),
            'image_id': entry['id'],
        }
        if self.masks:
            masks = [decode_mask(self.split.file, o, height, width) for o in objects]
            target['masks'] = Mask(torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width).byte())
        return self.transform(image, target) if self.transform else (image, target)

    def image(self, index: int) -> Image.Image:
        """An image alone.

        Raises:
            UserError: It can't be read, or has another size than its boxes are for.
        """
        entry = self.split.images[index]
        path = self.split.folder / entry['file_name']
        try:
            with Image.open(path) as opened:
                image = opened.convert('RGB')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f'{path}: not an image that can be read: {one_line(error)}') from None
        if image.size != (entry['width'], entry['height']):
            raise UserError(
                f'{path}: is {image.width}x{image.height}, but image {entry["id"]} of {self.split.file} is '
                f'{entry["width"]}x{entry["height"]}'
            )
        return image
