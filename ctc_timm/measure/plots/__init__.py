"""Every picture, drawn from the saved numbers."""

from .style import BLUE, COLORS, GRAY, GREEN, MARKERS, ORANGE, PURPLE, STYLE, VERMILION
from .training import plot_run, stage_change

__all__ = [
    'BLUE',
    'COLORS',
    'GREEN',
    'GRAY',
    'MARKERS',
    'ORANGE',
    'PURPLE',
    'STYLE',
    'VERMILION',
    'plot_run',
    'stage_change',
]
