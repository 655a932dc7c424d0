"""COCO-format folders, read by torchvision and pycocotools, and COCO's metrics.

Boxes are cut at the border of their image, and those without area left out, as torchvision's reference scripts do.
Images without annotations stay as negatives. Category ids may have gaps: classes count from 1, 0 is background. Crowds
are not trained on, and are what COCO makes of them in evaluation.

M: objects of an image. N: detections in it. H, W: its sides. S: side of the canvas.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.tv_tensors import BoundingBoxes, Mask

from ..utils.errors import UserError, one_line
from ..utils.files import sha256
from .loading import open_image

METRICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')  # as the first of COCOeval's stats
KINDS = {'box': 'bbox', 'mask': 'segm'}


class CocoSplit(CocoDetection):
    """A split of a folder: annotations/instances_SPLIT.json and SPLIT/, or both with 2017 after SPLIT.

    An item is (image, target): the target has `boxes`, [M, 4] as corners in pixels, `labels`, [M] classes from 1,
    `image_id`, `name`, and if they are wanted `masks`, [M, H, W]. Crowds are left out. `counts` says how many boxes
    were cut, and so on; `names` are the categories' by rising id.

    Raises:
        UserError: Anything in the files that can't be used; pycocotools is not installed.
    """

    def __init__(self, folder: str | Path, split: str, masks: bool = False) -> None:
        names = [name for name in (split, f'{split}2017') if (Path(folder) / name).is_dir()]
        self.file = Path(folder) / 'annotations' / f'instances_{names[0] if names else split}.json'
        self.masks = masks
        if not names or not self.file.is_file():
            raise UserError(f'{folder}: no annotations/{self.file.name} beside a folder {split}/ or {split}2017/')
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(Path(folder) / names[0], str(self.file))
                self._check()
                self.counts = self._cut_boxes()
                self.coco.createIndex()
            self.names = {number: str(self.coco.cats[number]['name']) for number in sorted(self.coco.cats)}
        except UserError:
            raise
        except ImportError:
            raise UserError("COCO-format data: needs the package pycocotools; pip install 'ctc-timm[dense]'") from None
        except (OSError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            what = f'{type(error).__name__}: {one_line(error)}'
            raise UserError(f'{self.file}: not annotations in the format of COCO ({what})') from None
        if all(row['iscrowd'] for row in self.coco.anns.values()):
            raise UserError(f'{self.file}: holds no object to find')
        for row in self.coco.anns.values() if masks else ():
            self._mask(row)

    def __str__(self) -> str:
        counted = [f'{count:,} {what}' for what, count in self.counts.items() if count]
        return ', '.join([f'{len(self.coco.anns):,} objects in {len(self):,} images', *counted])

    @property
    def identity(self) -> str:
        """What tells the split from others."""
        return sha256(self.file)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        number, classes = self.ids[index], list(self.names)
        size = self._size(number)
        objects = [row for row in self._load_target(number) if not row['iscrowd']]
        boxes = torch.tensor([row['bbox'] for row in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            'boxes': BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            'labels': torch.tensor([classes.index(row['category_id']) + 1 for row in objects], dtype=torch.int64),
            'image_id': number,
            'name': self.coco.imgs[number]['file_name'],
        }
        if self.masks:
            masks = np.stack([self._mask(row) for row in objects]) if objects else np.zeros((0, *size), np.uint8)
            target['masks'] = Mask(torch.from_numpy(masks))
        return self._load_image(number), target

    def _load_image(self, id: int) -> Image.Image:
        path, (height, width) = Path(self.root) / self.coco.imgs[id]['file_name'], self._size(id)
        image = open_image(path, 'RGB')
        if image.size != (width, height):
            sizes = f'is {image.width}x{image.height}, but image {id} of {self.file} is {width}x{height}'
            raise UserError(f'{path}: {sizes}')
        return image

    def _size(self, id: int) -> tuple[int, int]:
        return self.coco.imgs[id]['height'], self.coco.imgs[id]['width']

    def _mask(self, row: dict[str, Any]) -> np.ndarray:
        """Decode an annotation's mask, [H, W], uint8 of 0 and 1."""
        try:
            mask = self.coco.annToMask(row)
            if mask.shape != self._size(row['image_id']):
                raise ValueError(f'is {mask.shape[1]}x{mask.shape[0]}, unlike its image')
        except Exception as error:  # of pycocotools, about any content
            raise UserError(f'{self.file}: the segmentation of annotation {row["id"]}: {one_line(error)}') from None
        return mask

    def _check(self) -> None:
        """Check what pycocotools takes on trust."""
        coco, file = self.coco, self.file
        indices: dict[str, dict[int, Any]] = {'images': coco.imgs, 'categories': coco.cats, 'annotations': coco.anns}
        for part in indices:
            ((number, count),) = Counter(row['id'] for row in coco.dataset[part]).most_common(1) or [(None, 0)]
            if count != 1:
                raise UserError(f'{file}: ' + (f'{part} with id {number} stand twice' if count else f'holds no {part}'))
        for number, entry in coco.imgs.items():
            name = Path(entry['file_name'])
            if name.is_absolute() or '..' in name.parts or not (self.root / name).is_file():
                raise UserError(f'{file}: image {number} is not in {self.root}: {name}')
        for number, row in coco.anns.items():
            for part, key in (('images', 'image_id'), ('categories', 'category_id')):
                if row[key] not in indices[part]:
                    raise UserError(f'{file}: annotation {number} has {key} {row[key]}, which is not in {part}')
            box = row['bbox']
            if len(box) != 4 or not all(type(x) in (int, float) and math.isfinite(x) for x in box):
                raise UserError(f'{file}: annotation {number} has no bbox of 4 numbers, but {str(box)[:60]}')

    def _cut_boxes(self) -> dict[str, int]:
        """Cut boxes at the border of their image, leave those without area out, and count."""
        kept, cut, rows = [], 0, self.coco.dataset['annotations']
        for row in rows:
            box, image = row['bbox'], self.coco.imgs[row['image_id']]
            left, right = (min(max(x, 0.0), float(image['width'])) for x in (box[0], box[0] + box[2]))
            top, bottom = (min(max(y, 0.0), float(image['height'])) for y in (box[1], box[1] + box[3]))
            inside = [left, top, right - left, bottom - top]
            if inside[2] > 0 and inside[3] > 0:
                crowd, area = int(bool(row.get('iscrowd'))), row.get('area', inside[2] * inside[3])
                kept.append({**row, 'bbox': inside, 'iscrowd': crowd, 'area': area})
                cut += any(abs(a - b) > 0.01 for a, b in zip(box, inside))  # rounded ones are meant to touch the border
        self.coco.dataset['annotations'] = kept
        return {
            'boxes cut at the border': cut,
            'boxes without area left out': len(rows) - len(kept),
            'crowds': sum(row['iscrowd'] for row in kept),
            'images without annotations': len(set(self.ids) - {row['image_id'] for row in kept}),
        }


def open_coco(folder: str | Path, masks: bool = False) -> tuple[CocoSplit, CocoSplit]:
    """Open the training and the validation split of a folder, which have the same categories."""
    train, val = CocoSplit(folder, 'train', masks), CocoSplit(folder, 'val', masks)
    for split, other in ((train, val), (val, train)):
        missing = other.names.keys() - split.names.keys()
        if missing:
            raise UserError(f'{split.file}: has no category {min(missing)}, which {other.file.name} has')
    return train, val


def metric_names(masks: bool) -> tuple[str, ...]:
    """Name all metrics: box_ap, box_ap50, ..., and mask_ap, ... if there are masks."""
    return tuple(f'{kind}_{name}' for kind in (KINDS if masks else ('box',)) for name in METRICS)


def to_results(output: dict[str, Tensor], target: dict[str, Any], split: CocoSplit) -> list[dict[str, Any]]:
    """Bring detections in an image to COCO's format of results, a row each, in the pixels of the image itself.

    Args:
        output: boxes [N, 4] as corners on the canvas, labels [N], scores [N], maybe masks [N, 1, S, S] in 0 to 1.
        target: Of the image, with `fitted` of `loading.FitCanvas`.
        split: Of the image.
    """
    image, (high, wide), categories = split.coco.imgs[target['image_id']], target['fitted'], list(split.names)
    height, width = image['height'], image['width']
    boxes = output['boxes'].cpu().double() / torch.tensor([wide / width, high / height] * 2, dtype=torch.float64)
    boxes = box_convert(clip_boxes_to_image(boxes, (height, width)), 'xyxy', 'xywh')
    rows = [
        {'image_id': target['image_id'], 'category_id': categories[label - 1], 'bbox': box, 'score': score}
        for box, label, score in zip(boxes.tolist(), output['labels'].tolist(), output['scores'].tolist())
    ]
    for row, mask in zip(rows, output.get('masks', ())):
        from pycocotools.mask import encode

        soft = mask.cpu().float()[None, :, :high, :wide]
        hard = interpolate(soft, (height, width), mode='bilinear', align_corners=False)[0, 0] >= 0.5
        row['segmentation'] = encode(np.asfortranarray(hard.numpy().astype(np.uint8)))
    return rows


def evaluate_results(split: CocoSplit, results: list[dict[str, Any]]) -> dict[str, float]:
    """Compute COCOeval's numbers, 0 to 1, from the results of all images of a split.

    They are those of `metric_names` that exist, as a size of which there is no object has none, and `box_ap/NAME` and
    `mask_ap/NAME` of each category that has objects.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in KINDS if split.masks else ('box',):
            # With a box beside it COCO's tools take the box's area for the mask's.
            unwanted = 'segmentation' if kind == 'box' else 'bbox'
            rows = [{key: value for key, value in row.items() if key != unwanted} for row in results]
            detections = split.coco.loadRes(rows) if rows else COCO()
            if not rows:  # which loadRes does not take
                detections.dataset = {**split.coco.dataset, 'annotations': []}
                detections.createIndex()
            evaluation = COCOeval(split.coco, detections, KINDS[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics.update({f'{kind}_{name}': float(v) for name, v in zip(METRICS, evaluation.stats) if v >= 0})
            # [thresholds, recalls, categories, areas, most detections]: of all areas, with 100 detections
            precision = evaluation.eval['precision'][:, :, :, 0, -1]
            for i, name in enumerate(split.names.values()):
                known = precision[:, :, i][precision[:, :, i] > -1]
                if known.size:
                    metrics[f'{kind}_ap/{name}'] = float(known.mean())
    return metrics
