"""Semantic segmentation on any backbone, trained on a folder of masks and evaluated by intersection over union.

B: batch. S: side of the canvas. K: classes. H, W: of an image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ..measure.results import table
from ..runs import Run
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from .loading import IGNORE, Batch, FitCanvas
from .masks import METRICS, confusion, open_masks, scores
from .pictures import draw_masks
from .pyramid import open_pyramid
from .segmenters import Segmenter
from .settings import SegmentSettings
from .training import DenseEvaluator, DenseTask, open_data, train_dense


class SegmentationTask(DenseTask):
    """A segmenter with the mean cross-entropy over the pixels that count; 0 where none does."""

    stage = 'segment'

    def run_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch."""
        images, targets = batch
        truth_BSS = torch.stack([target['mask'] for target in targets]).long()
        scores_BKSS = self.trainable_module(images).float()
        total = cross_entropy(scores_BKSS, truth_BSS, ignore_index=IGNORE, reduction='sum')
        return {'loss': total / (truth_BSS != IGNORE).sum().clamp(min=1)}


class SegmentationEvaluator(DenseEvaluator):
    """The metrics of a segmenter, see `masks.scores`."""

    best_metric = 'miou'
    columns = METRICS

    def __call__(self, model: nn.Module) -> dict[str, float]:
        classes = len(self.split.names)
        matrix_KK = torch.zeros(classes, classes, dtype=torch.int64, device=self.accelerator.device)
        for predicted_HW, truth_HW in self.predictions(model):
            matrix_KK += confusion(predicted_HW, truth_HW, classes)
        return scores(self.accelerator.reduce(matrix_KK, 'sum'), self.split.names)

    def predictions(self, model: nn.Module, indices: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true classes of images, [H, W] at their own sizes; `indices` as of `outputs`."""
        for scores_KSS, target in self.outputs(model, indices):
            (high, wide), truth_HW = target['fitted'], target['mask'].to(scores_KSS.device)
            scores = scores_KSS.float()[None, :, :high, :wide]
            if truth_HW.shape != (high, wide):
                scores = interpolate(scores, size=truth_HW.shape, mode='bilinear', align_corners=False)
            yield scores[0].argmax(0), truth_HW


def segment(settings: SegmentSettings) -> Run:
    """Train a segmenter; results.json and plots/masks.png are of the last epoch.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    choices, size = settings.segmenter, settings.canvas.img_size
    if choices.head == 'deeplabv3' and settings.loader.batch_size < 2:
        raise UserError('`batch_size` 1: the batch norm of deeplabv3 needs two images at least')
    settings, accelerator, (train, val) = open_data(
        settings, lambda folder, acc: open_masks(folder, choices, lambda pairs: progress_bar(pairs, 'read masks', acc))
    )
    stride = choices.output_stride
    options = {} if stride is None else {'output_stride': stride}
    pyramid = open_pyramid(settings.source, settings.backbone, size, **options)
    if stride not in (None, pyramid.strides[-1]):  # of stems that are not of stride 4, which timm counts with
        last = pyramid.strides[-1]
        raise UserError(f'`output_stride` {stride}: the last map of {pyramid.name} has stride {last} with it')
    if pyramid.in_chans not in (1, 3):
        raise UserError(f'`model`: takes images of {pyramid.in_chans} channels; use one of 1 or 3')
    train.mode = val.mode = 'RGB' if pyramid.in_chans == 3 else 'L'
    mean, std = pyramid.normalization(settings.canvas)
    model = Segmenter(choices.head, pyramid, len(train.names), mean, std, choices.head_channels)
    evaluator = SegmentationEvaluator(val, FitCanvas(size, mean), settings.loader, accelerator)

    def draw(run: Run) -> None:
        shown = range(min(choices.drawn_images, len(val)))
        masks = [[mask.cpu().numpy().astype(np.uint8) for mask in pair] for pair in evaluator.predictions(model, shown)]
        predicted, truths = zip(*masks)
        draw_masks([val[i][0] for i in shown], truths, predicted, val.names, run.plots / 'masks.png')

    return train_dense(
        settings,
        SegmentationTask(model, accelerator.device),
        pyramid,
        train,
        evaluator,
        boxes=False,
        facts={'head': choices.head, 'num_classes': len(train.names)},
        results={
            'head': choices.head,
            'images': {'train': len(train), 'val': len(val)},
            'unlabeled': {'train': train.unlabeled, 'val': val.unlabeled},
            'classes': val.names,
        },
        draw=draw,
        summarize=_summarize,
    )


def _summarize(metrics: dict[str, float]) -> str:
    """Make a table of the metrics."""
    rows = [{'class': name[4:], 'iou': 100 * value} for name, value in metrics.items() if name.startswith('iou/')]
    rows.append({'class': 'mean', 'iou': 100 * metrics['miou']})
    pixels, classes = (100 * metrics[f'{name}_accuracy'] for name in ('pixel', 'mean'))
    columns = {'class': 'class', 'iou': 'IoU %'}
    return f'{table(rows, columns)}\npixel accuracy {pixels:.2f}%, mean over classes {classes:.2f}%'
