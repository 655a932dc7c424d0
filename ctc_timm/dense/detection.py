"""Detection: torchvision's detectors on any backbone, trained and evaluated on a COCO-format folder.

Images come as squares of one size, so that the detectors resize and pad nothing. Each level has anchors of one size a
stride: `anchor_scale` times the stride, 8 for R-CNN (32 pixels at stride 4, as published) and 4 for RetinaNet (32 at
stride 8), which adds sizes between.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ..measure.plots.style import COLORS, Axes, drawing, literal, save
from ..measure.results import table
from ..runs import Run
from ..utils.errors import UserError, nearest, one_line
from .coco import METRICS, evaluate_results, metric_names, open_coco, to_results
from .loading import Batch, FitCanvas
from .pyramid import Pyramid, open_pyramid
from .settings import DetectorSettings, DetectSettings
from .training import DenseEvaluator, DenseTask, draw_panels, open_data, train_dense


def detect(settings: DetectSettings) -> Run:
    """Train a detector; results.json and plots/detections.png are of the last epoch."""
    kind, size = settings.detector.detector, settings.canvas.img_size
    settings, accelerator, (train, val) = open_data(settings, lambda folder, _: open_coco(folder, kind == 'maskrcnn'))
    extra = extra_levels(kind, settings.backbone.fpn_channels)
    pyramid = open_pyramid(settings.source, settings.backbone, size, extra)
    if pyramid.in_chans != 3:
        raise UserError(f'`model`: takes images of {pyramid.in_chans} channels, detection has color images')
    mean, std = pyramid.normalization(settings.canvas)
    model = create_detector(settings.detector, pyramid, len(train.names), size, mean, std)
    return train_dense(
        settings,
        DetectionTask(model, accelerator.device),
        pyramid,
        train,
        DetectionEvaluator(val, FitCanvas(size, mean), settings.loader, accelerator),
        facts={'detector': kind, 'categories': len(train.names)},
        results={'put_in_order': {'train': train.counts, 'val': val.counts}},
        drawn_images=settings.detector.drawn_images,
    )


class DetectionTask(DenseTask):
    """A torchvision detector with the sum of its losses."""

    stage = 'detect'
    boxes = True

    def run_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch, and its parts."""
        losses = self.trainable_module(*batch)
        return {'loss': torch.stack(list(losses.values())).sum(), **losses}


class DetectionEvaluator(DenseEvaluator):
    """COCO's metrics of a detector, see `coco.evaluate_results`."""

    best_metric = 'box_ap'

    @property
    def columns(self) -> tuple[str, ...]:
        return metric_names(self.split.masks)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        rows = [row for rows in self.detections(model) for row in rows]
        return evaluate_results(self.split, gather_object(rows) if self.accelerator.num_processes > 1 else rows)

    def detections(self, model: nn.Module, indices: range | None = None) -> Iterator[list[dict[str, Any]]]:
        """The detections in each image, see `coco.to_results`; `indices` as of `outputs`."""
        return (to_results(output, target, self.split) for output, target in self.outputs(model, indices))

    def draw(self, model: nn.Module, run: Run, indices: range) -> None:
        split, numbers = self.split, list(self.split.names)
        images, predicted = [np.asarray(split[i][0]) for i in indices], list(self.detections(model, indices))
        with drawing():
            figure, axes = draw_panels([{'annotated': image, 'predicted': image} for image in images])
            for i, (annotated, below) in zip(indices, axes.T):
                confident = [row for row in predicted[i] if row['score'] >= 0.5]
                for ax, rows in ((annotated, split.coco.imgToAnns[split.ids[i]]), (below, confident)):
                    for row in rows:
                        color = COLORS[numbers.index(row['category_id']) % len(COLORS)]
                        _draw_object(ax, row, color, literal(split.names[row['category_id']]))
            save(figure, run.plots / 'detections.png')

    def summarize(self, metrics: dict[str, float]) -> str:
        columns = dict(zip(METRICS, ('AP', 'AP50', 'AP75', 'small', 'medium', 'large')))
        rows = [
            {'%': kind, **{name: 100 * metrics[f'{kind}_{name}'] for name in METRICS if f'{kind}_{name}' in metrics}}
            for kind in ('box', 'mask')
            if f'{kind}_ap' in metrics
        ]
        return table(rows, {'%': '%', **columns})


def _draw_object(ax: Axes, row: dict[str, Any], color: str, label: str) -> None:
    """Draw an object in COCO's format, or one that was detected."""
    left, top, width, height = row['bbox']
    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=1.5))
    if 'score' in row:
        label += f' {row["score"]:.2f}'
    ax.text(left, top, label, color='white', fontsize=7, va='bottom', bbox={'facecolor': color, 'pad': 0.8, 'lw': 0})
    if 'score' in row and 'segmentation' in row:
        from pycocotools import mask

        ax.contour(mask.decode(row['segmentation']), levels=[0.5], colors=[color], linewidths=1)


def extra_levels(detector: str, channels: int) -> ExtraFPNBlock:
    """The levels that a detector adds to the pyramid: one by a maximum for R-CNN, two by convolutions for RetinaNet."""
    return LastLevelP6P7(channels, channels) if detector == 'retinanet' else LastLevelMaxPool()


def create_detector(
    settings: DetectorSettings, pyramid: Pyramid, num_classes: int, img_size: int, mean: list[float], std: list[float]
) -> Any:
    """Create a detector with new heads, for `num_classes` without background, on a pyramid with its `extra_levels`.

    In training mode detector(images, targets) gives losses by name; in evaluation mode detector(images) gives `boxes`,
    `labels`, `scores` and, of Mask R-CNN, `masks` of each image.
    """
    kinds: dict[str, Any] = {'fasterrcnn': FasterRCNN, 'maskrcnn': MaskRCNN, 'retinanet': RetinaNet}
    detector = kinds[settings.detector]
    known = list(inspect.signature(detector).parameters)
    unknown = next((name for name in settings.detector_kwargs if name not in known), None)
    if unknown:  # or its transform would take it without a word
        raise UserError(
            f"`detector_kwargs`: torchvision's {detector.__name__} has no {unknown}{nearest(unknown, known)}"
        )
    dense = settings.detector == 'retinanet'
    scale, steps = settings.anchor_scale or (4 if dense else 8), 3 if dense else 1
    strides = [*pyramid.strides, *(pyramid.strides[-1] * factor for factor in ((2, 4) if dense else (2,)))]
    sizes = tuple(tuple(scale * stride * 2 ** (i / 3) for i in range(steps)) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    names, channels, width = [str(i) for i in range(len(pyramid.strides))], pyramid.out_channels, settings.head_channels
    if dense:
        options: dict[str, Any] = {'num_classes': num_classes + 1, 'anchor_generator': anchors}
    else:
        options = {
            'rpn_anchor_generator': anchors,
            'box_roi_pool': MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            'box_head': TwoMLPHead(channels * 7 * 7, width),
            'box_predictor': FastRCNNPredictor(width, num_classes + 1),
        }
    if settings.detector == 'maskrcnn':
        inner = min(256, channels)
        options |= {
            'mask_roi_pool': MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            'mask_head': MaskRCNNHeads(channels, (inner,) * 4, 1),
            'mask_predictor': MaskRCNNPredictor(inner, inner, num_classes + 1),
        }
    options |= {'min_size': img_size, 'max_size': img_size, 'image_mean': mean, 'image_std': std}
    options |= {'size_divisible': 1, '_skip_resize': True, **settings.detector_kwargs}
    try:
        return detector(pyramid, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f'`detector_kwargs`: {one_line(error)}') from None
