"""Semantic segmentation on any backbone, trained and evaluated on a folder of masks.

B: batch. C: channels of the images. S: side of the canvas. K: classes. D: channels of maps. H, W: of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from ..measure.plots.style import drawing, literal, save
from ..measure.results import table
from ..runs import Run
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from .loading import IGNORE, Batch, FitCanvas
from .masks import METRICS, confusion, open_masks, scores, voc_palette
from .pyramid import Pyramid, open_pyramid
from .settings import SegmentSettings
from .training import DenseEvaluator, DenseTask, draw_panels, open_data, train_dense


def segment(settings: SegmentSettings) -> Run:
    """Train a segmenter; results.json and plots/masks.png are of the last epoch."""
    chosen, size = settings.segmenter, settings.canvas.img_size
    if chosen.head == 'deeplabv3' and settings.loader.batch_size < 2:
        raise UserError('`batch_size` 1: the batch norm of deeplabv3 needs two images at least')
    settings, accelerator, (train, val) = open_data(
        settings, lambda folder, acc: open_masks(folder, chosen, lambda pairs: progress_bar(pairs, 'read masks', acc))
    )
    stride = chosen.output_stride
    options = {} if stride is None else {'output_stride': stride}
    pyramid = open_pyramid(settings.source, settings.backbone, size, **options)
    last = pyramid.strides[-1]
    if stride not in (None, last):  # of stems that are not of stride 4, which timm counts with
        raise UserError(f'`output_stride` {stride}: the last map of {pyramid.name} has stride {last} with it')
    if pyramid.in_chans not in (1, 3):
        raise UserError(f'`model`: takes images of {pyramid.in_chans} channels; use one of 1 or 3')
    train.mode = val.mode = 'RGB' if pyramid.in_chans == 3 else 'L'
    mean, std = pyramid.normalization(settings.canvas)
    model = Segmenter(chosen.head, pyramid, len(train.names), mean, std, chosen.head_channels)
    return train_dense(
        settings,
        SegmentationTask(model, accelerator.device),
        pyramid,
        train,
        SegmentationEvaluator(val, FitCanvas(size, mean), settings.loader, accelerator),
        facts={'head': chosen.head, 'num_classes': len(train.names)},
        results={'unlabeled': {'train': train.unlabeled, 'val': val.unlabeled}, 'classes': val.names},
        drawn_images=chosen.drawn_images,
    )


class SegmentationTask(DenseTask):
    """A segmenter with the mean cross-entropy over the pixels that count; 0 where none does."""

    stage = 'segment'
    boxes = False

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

    def draw(self, model: nn.Module, run: Run, indices: range) -> None:
        names, colors = self.split.names, voc_palette()
        if len(names) <= 11:  # matplotlib's ten colors differ more than VOC's, which get ever darker
            colors[1:11] = np.rint(255 * np.asarray(colormaps['tab10'].colors))  # type: ignore[attr-defined]
        colors[IGNORE] = 255
        masks = [[mask.cpu().numpy().astype(np.uint8) for mask in pair] for pair in self.predictions(model, indices)]
        columns = [
            {'image': np.asarray(self.split[i][0]), 'annotated': colors[truth], 'predicted': colors[predicted]}
            for i, (predicted, truth) in zip(indices, masks)
        ]
        present = sorted({int(k) for pair in masks for mask in pair for k in np.unique(mask)} - {IGNORE})
        with drawing():
            figure, _ = draw_panels(columns)
            if len(present) <= 24:
                looks = [(colors[k] / 255, literal(names[k])) for k in present]
                patches = [Patch(facecolor=color, edgecolor='gray', label=label) for color, label in looks]
                figure.legend(handles=patches, loc='outside lower center', ncols=min(len(patches), 6), fontsize=8)
            save(figure, run.plots / 'masks.png')

    def summarize(self, metrics: dict[str, float]) -> str:
        rows = [{'class': name[4:], 'iou': 100 * value} for name, value in metrics.items() if name.startswith('iou/')]
        rows.append({'class': 'mean', 'iou': 100 * metrics['miou']})
        pixels, classes = (100 * metrics[f'{name}_accuracy'] for name in ('pixel', 'mean'))
        columns = {'class': 'class', 'iou': 'IoU %'}
        return f'{table(rows, columns)}\npixel accuracy {pixels:.2f}%, mean over classes {classes:.2f}%'


class SemanticFPN(nn.Module):
    """The semantic head of Kirillov et al. 2019, Panoptic Feature Pyramid Networks, section 3.1 and figure 3.

    Every level, each half as large as the one before, goes through as many blocks (3x3 convolution to D channels, group
    norm, ReLU, twice as large) as bring it to the size of the finest; their sum is classified.
    """

    def __init__(self, in_channels: int, num_levels: int, num_classes: int, channels: int = 128) -> None:
        super().__init__()
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels >= 4 * g or g == 1)

        def block(first: int) -> nn.Module:
            convolution = nn.Conv2d(first, channels, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.GroupNorm(groups, channels), nn.ReLU())

        self.branches: Any = nn.ModuleList(
            nn.ModuleList(block(channels if i else in_channels) for i in range(max(1, level)))
            for level in range(num_levels)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Scores [B, K, H, W] at the size of the finest level; levels are [B, in_channels, H, W], the finest first."""
        total: Any = 0
        for level, branch in enumerate(self.branches):
            x = levels[level]
            for step, block in enumerate(branch):
                x = block(x)
                if level:
                    x = interpolate(x, size=levels[level - step - 1].shape[-2:], mode='bilinear', align_corners=False)
            total = total + x
        return self.classifier(total)


class Segmenter(nn.Module):
    """A backbone with a head, 'fpn' or 'deeplabv3', which takes the last map and drops the rest of the pyramid."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, head: str, pyramid: Pyramid, num_classes: int, mean: list[float], std: list[float], head_channels: int
    ) -> None:
        super().__init__()
        self.backbone = pyramid
        self.on_levels = head == 'fpn'
        if self.on_levels:
            self.head: Any = SemanticFPN(pyramid.out_channels, len(pyramid.channels), num_classes, head_channels)
        else:
            self.head = DeepLabHead(pyramid.channels[-1], num_classes)
            del pyramid.fpn, pyramid.resample
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: list[Tensor]) -> Tensor:
        """Scores [B, K, S, S] of images, B of [C, S, S], 0 to 1."""
        pixels = (torch.stack(images) - self.mean) / self.std
        maps = list(self.backbone(pixels).values()) if self.on_levels else self.backbone.maps(pixels)
        scores = self.head(maps if self.on_levels else maps[-1])
        return interpolate(scores, size=pixels.shape[-2:], mode='bilinear', align_corners=False)
