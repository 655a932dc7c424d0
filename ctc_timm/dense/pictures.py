"""Pictures of images with what is annotated and what is predicted.

H, W: sides of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..measure.plots.style import COLORS, drawing, literal, save
from .masks import IGNORE, voc_palette

# isort: split
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

_LEGEND = 24  # classes
_DISTINCT = 11  # classes for which matplotlib's ten colors differ more than VOC's, which get ever darker


def draw_detections(
    images: Sequence[Image.Image],
    truths: Sequence[Sequence[dict[str, Any]]],
    predicted: Sequence[Sequence[dict[str, Any]]],
    names: dict[int, str],
    picture: Path,
    threshold: float = 0.5,
) -> Path:
    """Draw images in two rows: annotated above, as predicted below.

    Args:
        images: At their own sizes.
        truths: Annotations of each image in COCO's format.
        predicted: Detections of each image in COCO's format of results.
        names: Of the categories by id.
        picture: The file.
        threshold: Detections of a lower score are left out.
    """
    count = len(images)
    colors = {number: COLORS[i % len(COLORS)] for i, number in enumerate(sorted(names))}
    with drawing():
        figure, panels = plt.subplots(2, count, figsize=(2.4 * count, 5.2), squeeze=False)
        for i, image in enumerate(images):
            confident = [row for row in predicted[i] if row['score'] >= threshold]
            for ax, rows, title in ((panels[0, i], truths[i], 'annotated'), (panels[1, i], confident, 'predicted')):
                ax.imshow(np.asarray(image))
                ax.set_axis_off()
                ax.autoscale(False)  # a box that reaches beyond the image doesn't shrink it
                for row in rows:
                    _draw_object(ax, row, colors[row['category_id']], names[row['category_id']])
                if i == 0:
                    ax.set_title(title, fontsize=10, loc='left', pad=12)
        return save(figure, picture)


def _draw_object(ax: Axes, row: dict[str, Any], color: str, name: str) -> None:
    left, top, width, height = row['bbox']
    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=1.5))
    label = literal(name) + (f' {row["score"]:.2f}' if 'score' in row else '')
    ax.text(left, top, label, color='white', fontsize=7, va='bottom', bbox={'facecolor': color, 'pad': 0.8, 'lw': 0})
    if 'score' in row and 'segmentation' in row:
        from pycocotools import mask

        ax.contour(mask.decode(row['segmentation']), levels=[0.5], colors=[color], linewidths=1)


def draw_masks(
    images: Sequence[Image.Image],
    truths: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    names: Sequence[str],
    picture: Path,
) -> Path:
    """Draw images in three rows: as they are, annotated, as predicted; the first class black, ignored pixels white.

    Args:
        images: At their own sizes.
        truths: [H, W] classes each.
        predicted: [H, W] classes each.
        names: Of the classes.
        picture: The file.
    """
    count, colors = len(images), voc_palette()
    if len(names) <= _DISTINCT:
        colors[1:_DISTINCT] = np.rint(255 * np.asarray(colormaps['tab10'].colors))  # type: ignore[attr-defined]
    colors[IGNORE] = 255
    with drawing():
        figure, panels = plt.subplots(3, count, figsize=(max(1.8 * count, 5), 6.2), squeeze=False)
        for i in range(count):
            rows = (np.asarray(images[i]), colors[truths[i]], colors[predicted[i]])
            for ax, pixels, title in zip(panels[:, i], rows, ('image', 'annotated', 'predicted')):
                ax.imshow(pixels, cmap='gray', interpolation='nearest')
                ax.set_axis_off()
                if i == 0:
                    ax.set_title(title, fontsize=10, loc='left')
        present = sorted({int(k) for mask in (*truths, *predicted) for k in np.unique(mask)} - {IGNORE})
        if len(present) <= _LEGEND:
            patches = [Patch(facecolor=colors[k] / 255, edgecolor='gray', label=literal(names[k])) for k in present]
            figure.legend(handles=patches, loc='outside lower center', ncols=min(len(patches), 6), fontsize=8)
        return save(figure, picture)
