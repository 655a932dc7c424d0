"""How every picture looks.

Colors are Okabe and Ito's, which color-blind people can tell apart; lines differ in style and marker too, so
that a print in gray still reads.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ...utils.text import sanitize

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GRAY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#666666'
STYLE: dict[Any, Any] = {
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.constrained_layout.use': True,
    'font.size': 10,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
}
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, '#56B4E9', '#000000')
MARKERS = 'osD^vPX'


def drawing() -> AbstractContextManager:
    """The settings to draw under."""
    return plt.rc_context(STYLE)


def literal(name: str) -> str:
    """A name from outside as a label, in which two dollar signs begin no formula."""
    return sanitize(name).replace('$', r'\$')


def save(figure: Figure, picture: str | os.PathLike) -> Path:
    """Write a picture where a complete one appears or none, and forget the figure."""
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f'.{picture.name}')
    figure.savefig(temporary, dpi=130, format='png')
    plt.close(figure)
    os.replace(temporary, picture)
    return picture
