"""A picture of what a detector found, beside what there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..measure.plots.style import COLORS, drawing, literal, save

# isort: split
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


def draw_detections(
    images: Sequence[Image.Image],
    truths: Sequence[Sequence[dict[str, Any]]],
    found: Sequence[Sequence[dict[str, Any]]],
    names: dict[int, str],
    picture: Path,
    threshold: float = 0.5,
) -> Path:
    """Draw images in two rows: annotated above, as found below.

    Args:
        images: At their own sizes.
        truths: Annotations of each image, as COCO writes them.
        found: Detections of each image, as `coco_metrics.to_results` writes them.
        names: Of the categories by id.
        picture: Where it goes.
        threshold: Detections of a lower score are left out.
    """
    count = len(images)
    colors = {number: COLORS[i % len(COLORS)] for i, number in enumerate(sorted(names))}
    with drawing():
        figure, panels = plt.subplots(2, count, figsize=(2.4 * count, 5.2), squeeze=False)
        for i, image in enumerate(images):
            sure = [row for row in found[i] if row['score'] >= threshold]
            for ax, rows, title in ((panels[0, i], truths[i], 'annotated'), (panels[1, i], sure, 'found')):
                ax.imshow(np.asarray(image))
                ax.set_axis_off()
                ax.autoscale(False)  # a box that reaches beyond the image doesn't shrink it
                for row in rows:
                    _draw(ax, row, colors[row['category_id']], names)
                if i == 0:
                    ax.set_title(title, fontsize=10, loc='left', pad=12)
        return save(figure, picture)


def _draw(ax: Axes, row: dict[str, Any], color: str, names: dict[int, str]) -> None:
    left, top, width, height = row['bbox']
    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=1.5))
    label = literal(names[row['category_id']]) + (f' {row["score"]:.2f}' if 'score' in row else '')
    ax.text(left, top, label, color='white', fontsize=7, va='bottom', bbox={'facecolor': color, 'pad': 0.8, 'lw': 0})
    if 'score' in row and isinstance(row.get('segmentation'), dict):
        from pycocotools import mask

        ax.contour(mask.decode(row['segmentation']), levels=[0.5], colors=[color], linewidths=1)
