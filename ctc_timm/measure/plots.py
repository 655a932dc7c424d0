"""Every picture, drawn from the saved numbers.

Colours are Okabe and Ito's, which colour-blind people can tell apart; lines differ in style too, so that a
print in grey still reads.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#666666'
STYLE = {
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.constrained_layout.use': True,
    'font.size': 10,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
}


def plot_run(run: str | os.PathLike) -> list[Path]:
    """Draw a training run: loss parts, accuracy and learning rate over the epochs, the stage change marked.

    Args:
        run: The run's folder, with summary.csv and metrics.jsonl.

    Returns:
        The pictures written, in the run's plots/.
    """
    run = Path(run)
    with (run / 'summary.csv').open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    change = _stage_change(run / 'metrics.jsonl')
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(7, 8), sharex=True)
        _losses(axes[0], rows)
        _accuracy(axes[1], rows)
        axes[2].plot(*_series(rows, 'lr'), color=GREY, drawstyle='steps-mid')
        axes[2].set_ylabel('learning rate')
        axes[2].set_yscale('log' if all(float(row['lr']) > 0 for row in rows) else 'linear')
        axes[2].set_xlabel('epoch')
        axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in axes:
            _mark(ax, change)
        if change is not None:
            for text, side in (('instance stage ', 'right'), (' temporal stage', 'left')):
                axes[0].annotate(
                    text,
                    (change, 1.0),
                    xycoords=('data', 'axes fraction'),
                    ha=side,
                    va='bottom',
                    color=GREY,
                    annotation_clip=False,
                )
        figure.suptitle(run.name, fontsize=11)
        file_path = run / 'plots' / 'training.png'
        file_path.parent.mkdir(exist_ok=True)
        figure.savefig(file_path, dpi=130)
        plt.close(figure)
    return [file_path]


def _losses(ax: Axes, rows: list[dict[str, Any]]) -> None:
    if 'train_ctc_loss' in rows[0]:
        ax.plot(*_series(rows, 'train_task_loss'), color=BLUE, label='task, training')
        ax.plot(*_series(rows, 'eval_loss'), color=BLUE, linestyle=':', label='task, validation')
        ax.set_ylabel('task loss (nats)')
        other = ax.twinx()
        other.spines['right'].set_visible(True)
        other.grid(False)
        other.plot(*_series(rows, 'train_ctc_loss'), color=VERMILION, linestyle='--', label='CTC term (right axis)')
        other.set_ylabel('CTC term (nats)', color=VERMILION)
        lines = [*ax.get_lines(), *other.get_lines()]
        ax.legend(lines, [str(line.get_label()) for line in lines], loc='upper right')
        return
    ax.plot(*_series(rows, 'train_loss'), color=BLUE, label='training')
    ax.plot(*_series(rows, 'eval_loss'), color=BLUE, linestyle=':', label='validation')
    ax.set_ylabel('loss (nats)')
    ax.legend(loc='upper right')


def _accuracy(ax: Axes, rows: list[dict[str, Any]]) -> None:
    ax.plot(*_series(rows, 'eval_top1'), color=BLUE, marker='o', markersize=3, label='top-1')
    ax.plot(*_series(rows, 'eval_top5'), color=ORANGE, linestyle='--', marker='s', markersize=3, label='top-5')
    ax.set_ylabel('validation accuracy (%)')
    ax.legend(loc='lower right')


def _series(rows: list[dict[str, Any]], column: str) -> tuple[list[int], list[float]]:
    """Epochs and values of a column, where it has a value."""
    points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
    return [p[0] for p in points], [p[1] for p in points]


def _stage_change(metrics: Path) -> float | None:
    """Between which epochs the temporal stage starts, or None if the run has one stage only."""
    stages = {}
    for line in metrics.read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        if 'stage' in row:
            stages[row['epoch']] = row['stage']
    temporal = [epoch for epoch, stage in stages.items() if stage == 'temporal']
    return min(temporal) - 0.5 if temporal and len(temporal) < len(stages) else None


def _mark(ax: Axes, change: float | None) -> None:
    if change is not None:
        ax.axvline(change, color=GREY, linestyle='-.', linewidth=1.2)
