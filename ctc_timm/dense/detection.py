"""Detection: a detector on any backbone, trained on a COCO-format folder and evaluated by COCO's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..measure.results import table
from ..runs import Run
from ..utils.errors import UserError
from .coco import METRICS, evaluate_results, metric_names, open_coco, to_results
from .detectors import create_detector, extra_levels
from .loading import Batch, FitCanvas
from .pictures import draw_detections
from .pyramid import open_pyramid
from .settings import DetectSettings
from .training import DenseEvaluator, DenseTask, open_data, train_dense


class DetectionTask(DenseTask):
    """A torchvision detector with the sum of its losses."""

    stage = 'detect'

    def run_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch, and its parts."""
        losses = self.trainable_module(*batch)
        return {'loss': torch.stack(list(losses.values())).sum(), **losses}


class DetectionEvaluator(DenseEvaluator):
    """COCO's metrics of a detector, see `coco.evaluate_results`."""

    best_metric = 'box_ap'

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return metric_names(self.split.masks)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        rows = [row for rows in self.detections(model) for row in rows]
        return evaluate_results(self.split, gather_object(rows) if self.accelerator.num_processes > 1 else rows)

    def detections(self, model: nn.Module, indices: range | None = None) -> Iterator[list[dict[str, Any]]]:
        """The detections in each image, see `coco.to_results`; `indices` as of `outputs`."""
        return (to_results(output, target, self.split) for output, target in self.outputs(model, indices))


def detect(settings: DetectSettings) -> Run:
    """Train a detector; results.json and plots/detections.png are of the last epoch.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    kind, size = settings.detector.detector, settings.canvas.img_size
    settings, accelerator, (train, val) = open_data(settings, lambda folder, _: open_coco(folder, kind == 'maskrcnn'))
    extra = extra_levels(kind, settings.backbone.fpn_channels)
    pyramid = open_pyramid(settings.source, settings.backbone, size, extra)
    if pyramid.in_chans != 3:
        raise UserError(f'`model`: takes images of {pyramid.in_chans} channels, detection has color images')
    mean, std = pyramid.normalization(settings.canvas)
    model = create_detector(settings.detector, pyramid, len(train.names), size, mean, std)
    evaluator = DetectionEvaluator(val, FitCanvas(size, mean), settings.loader, accelerator)

    def draw(run: Run) -> None:
        shown = range(min(settings.detector.drawn_images, len(val)))
        images, truths = [val[i][0] for i in shown], [val.coco.imgToAnns[val.ids[i]] for i in shown]
        draw_detections(
            images, truths, list(evaluator.detections(model, shown)), val.names, run.plots / 'detections.png'
        )

    return train_dense(
        settings,
        DetectionTask(model, accelerator.device),
        pyramid,
        train,
        evaluator,
        boxes=True,
        facts={'detector': kind, 'categories': len(train.names)},
        results={
            'detector': kind,
            'images': {'train': len(train), 'val': len(val)},
            'put_in_order': {'train': train.counts, 'val': val.counts},
        },
        draw=draw,
        summarize=_summarize,
    )


def _summarize(metrics: dict[str, float]) -> str:
    """Make a table of the metrics."""
    rows = [
        {'what': kind, **{name: 100 * metrics[f'{kind}_{name}'] for name in METRICS if f'{kind}_{name}' in metrics}}
        for kind in ('box', 'mask')
        if f'{kind}_ap' in metrics
    ]
    headings = ('AP', 'AP50', 'AP75', 'small', 'medium', 'large')
    return table(rows, {'what': '%', **dict(zip(METRICS, headings))})
