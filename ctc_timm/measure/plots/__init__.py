"""Every picture, drawn from the saved numbers."""

from .style import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, PURPLE, STYLE, VERMILION
from .training import plot_run, stage_change

__all__ = [
    'BLUE',
    'COLOURS',
    'GREEN',
    'GREY',
    'MARKERS',
    'ORANGE',
    'PURPLE',
    'STYLE',
    'VERMILION',
    'plot_run',
    'stage_change',
]
