"""COCO's metrics by pycocotools: average precision of boxes and masks, at IoU 0.5 and 0.75, and by size.

N: detections in an image. H, W: sides of the image, not of the canvas. h, w: of what the image covers of the canvas.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from .coco import NEEDED, CocoSplit, coco_masks

METRICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')  # as the first of COCOeval's stats
KINDS = {'box': 'bbox', 'mask': 'segm'}


def metric_names(masks: bool) -> list[str]:
    """The names of all metrics: box_ap, box_ap50, ..., and mask_ap, ... if there are masks."""
    return [f'{kind}_{name}' for kind in (KINDS if masks else ('box',)) for name in METRICS]


def check_installed() -> None:
    """Refuse to begin what can't be measured.

    Raises:
        UserError: pycocotools is not installed.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise UserError(f'COCO metrics: {NEEDED}') from None


def to_results(
    output: dict[str, Tensor], target: dict[str, Any], image: dict[str, Any], category_ids: list[int]
) -> list[dict[str, Any]]:
    """A detector's output for one image as COCO writes results, back in the pixels of the image itself.

    Args:
        output: boxes [N, 4] as corners on the canvas, labels [N], scores [N], maybe masks [N, 1, S, S] in 0 to 1.
        target: With scale and fitted of `augment.FitCanvas`.
        image: Its entry in the annotations.
        category_ids: Of each class, from class 1 on.

    Returns:
        A row a detection: image_id, category_id, bbox, score, and segmentation in run-length code.
    """
    across, down = target['scale']
    height, width = image['height'], image['width']
    boxes = output['boxes'].detach().cpu().double() / torch.tensor([across, down, across, down], dtype=torch.float64)
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    boxes[:, 2:] -= boxes[:, :2]
    rows = [
        {'image_id': image['id'], 'category_id': category_ids[label - 1], 'bbox': box, 'score': score}
        for box, label, score in zip(boxes.tolist(), output['labels'].tolist(), output['scores'].tolist())
    ]
    if 'masks' in output:
        for row, mask in zip(rows, output['masks'].detach().cpu()):
            row['segmentation'] = _encode(mask, target['fitted'], height, width)
    return rows


def _encode(mask: Tensor, fitted: tuple[int, int], height: int, width: int) -> dict[str, Any]:
    """A soft mask on the canvas, [1, S, S], as run-length code of [H, W]."""
    inside = mask[None, :, : fitted[0], : fitted[1]].float()
    resized = torch.nn.functional.interpolate(inside, (height, width), mode='bilinear', align_corners=False)
    hard = np.asfortranarray((resized[0, 0] >= 0.5).numpy().astype(np.uint8))
    return coco_masks().encode(hard)


def measure(split: CocoSplit, results: list[dict[str, Any]], masks: bool = False) -> dict[str, float]:
    """COCOeval's numbers, as shares of 1.

    Args:
        split: Of all images that results are of.
        results: Of `to_results`, of all images.
        masks: Whether masks are measured too.

    Returns:
        Those of `metric_names` that exist: a size of which there is no object has none. `box_ap/NAME` and
        `mask_ap/NAME` are of each category that has objects.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**split.content(), 'info': {}}
        truth.createIndex()
        for kind in KINDS if masks else ('box',):
            # With a box beside it COCO's tools take the box's area for the mask's.
            unwanted = 'segmentation' if kind == 'box' else 'bbox'
            rows = [{key: value for key, value in row.items() if key != unwanted} for row in results]
            evaluation = COCOeval(truth, truth.loadRes(rows) if rows else _nothing(truth), KINDS[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found.update({f'{kind}_{name}': float(v) for name, v in zip(METRICS, evaluation.stats) if v >= 0})
            # [thresholds, recalls, categories, areas, most detections]: of all areas, with 100 detections
            precision = evaluation.eval['precision'][:, :, :, 0, -1]
            for i, category in enumerate(split.categories):
                known = precision[:, :, i][precision[:, :, i] > -1]
                if known.size:
                    found[f'{kind}_ap/{category["name"]}'] = float(known.mean())
    return found


def _nothing(truth: Any) -> Any:
    """No results, which pycocotools' own reader does not take."""
    from pycocotools.coco import COCO

    empty = COCO()
    empty.dataset = {**truth.dataset, 'annotations': []}
    empty.createIndex()
    return empty
