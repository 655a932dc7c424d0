"""Every picture, drawn from the saved numbers."""

from .training import plot_run, stage_change

__all__ = ['plot_run', 'stage_change']
