"""How every picture looks.

Colors are Okabe and Ito's, which color-blind people can distinguish; lines differ in style and marker too, so that a
print in gray still reads.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...utils.text import sanitize

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GRAY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#666666'
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, '#56B4E9', '#000000')
MARKERS = 'osD^vPX'
STYLE: dict[Any, Any] = {'axes.grid': True, 'axes.spines.right': False, 'axes.spines.top': False, 'font.size': 10}
STYLE |= {'figure.constrained_layout.use': True, 'grid.alpha': 0.3, 'legend.frameon': False, 'lines.linewidth': 1.8}


def drawing() -> AbstractContextManager:
    """Return a context with the settings to draw under."""
    return plt.rc_context(STYLE)


def look(i: int) -> dict[str, Any]:
    """Return color and marker of the i-th of several lines."""
    return {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)], 'markersize': 4}


def literal(name: str) -> str:
    """Make a label of a name of other people, in which two dollar signs begin no formula."""
    return sanitize(name).replace('$', r'\$')


def epoch_axis(ax: Axes) -> None:
    """Label the x axis as epochs, with whole numbers."""
    ax.set_xlabel('epoch')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def mark_stage_change(ax: Axes, change: float | None, color: str = GRAY) -> None:
    """Draw a line where the temporal stage starts, if it does."""
    if change is not None:
        ax.axvline(change, color=color, linestyle='-.', linewidth=1.2)


def error_lengths(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Return the lengths of top-1 error bars below and above, zero where a row has no interval."""
    ends = ('top1_low', 'top1_high')
    return [[0.0 if row[end] is None else abs(row['top1'] - row[end]) for row in rows] for end in ends]


def save(figure: Figure, picture: str | os.PathLike) -> Path:
    """Write a picture that is complete or not there, and close the figure."""
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f'.{picture.name}')
    figure.savefig(temporary, dpi=130, format='png')
    plt.close(figure)
    os.replace(temporary, picture)
    return picture
