"""The picture of what a run keeps: source accuracy against mean transfer, from the start to the last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ...runs import Run
from .style import BLUE, GRAY, VERMILION, drawing, literal, plt, save


def plot_kept(run: Run, columns: Sequence[str]) -> Path:
    """Draw plots/kept.png of a run; these columns of its summary.csv and of its start are the sets' accuracies."""
    start, names = run.start(), ', '.join(column.removeprefix('keep_') for column in columns)
    points = [
        (float(row['eval_top1']), fmean(float(row[f'eval_{column}']) for column in columns))
        for row in run.rows()
        if row.get('eval_top1') and all(row.get(f'eval_{column}') for column in columns)
    ]
    before = (float(start.get('top1') or 0.0), fmean(start[column] for column in columns))
    picture = run.plots / 'kept.png'
    with drawing():
        figure, ax = plt.subplots(figsize=(6, 4.5))
        ax.axhline(before[1], color=GRAY, linestyle='--', linewidth=1.2)
        ax.plot(*zip(*points), color=BLUE, marker='o', markersize=4, label='epochs')
        ax.plot(*before, color=VERMILION, marker='s', markersize=8, linestyle='none', label='the start')
        if points:
            arrow = {'arrowstyle': '->', 'color': VERMILION, 'linewidth': 1.5, 'shrinkA': 6, 'shrinkB': 6}
            ax.annotate('', points[-1], before, arrowprops=arrow)
        ax.set_xlabel('source top-1 accuracy (%)')
        ax.set_ylabel(f'ridge accuracy (%), mean of {literal(names)}', fontsize=9)
        ax.legend()
        figure.suptitle(literal(run.path.name), fontsize=11)
        save(figure, picture)
    return picture
