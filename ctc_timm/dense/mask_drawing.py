"""A picture of semantic masks: images, what they show, and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..measure.plots.style import drawing, literal, save
from .masks import IGNORE, voc_palette

# isort: split
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

_LEGEND = 24  # classes
_APART = 11  # classes that matplotlib's ten colors tell apart better than VOC's, which get ever darker


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
        picture: Where it goes.
    """
    count = len(images)
    colors = voc_palette()
    if len(names) <= _APART:
        colors[1:_APART] = np.rint(255 * np.asarray(colormaps['tab10'].colors))  # type: ignore[attr-defined]
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
