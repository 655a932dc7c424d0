"""A training run's picture: loss parts, accuracy and learning rate over the epochs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...runs import read_metrics, read_summary
from ...utils.errors import UserError
from .style import BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION, drawing, literal, save


def plot_run(run: str | os.PathLike) -> list[Path]:
    """Draw a training run: loss parts, accuracy and learning rate over the epochs, the stage change marked.

    Args:
        run: The run's folder, with summary.csv and metrics.jsonl.

    Returns:
        The pictures written, in the run's plots/; one more where a target was monitored.

    Raises:
        UserError: Files that are damaged, or hold no epoch.
    """
    run = Path(run)
    rows = read_summary(run / 'summary.csv')
    if not rows:
        raise UserError(f'{run / "summary.csv"}: holds no epoch')
    change = stage_change(run / 'metrics.jsonl')
    with drawing():
        has_contrast = 'train_ctc_loss' in rows[0]
        figure, panels = plt.subplots(4 if has_contrast else 3, 1, figsize=(7, 10 if has_contrast else 8), sharex=True)
        axes = list(panels)
        _task_loss(axes[0], rows)
        if has_contrast:
            _contrast(axes[1], rows, change)
        _accuracy(axes[-2], rows)
        _learning_rate(axes[-1], rows)
        for ax in axes:
            if change is not None:
                ax.axvline(change, color=GRAY, linestyle='-.', linewidth=1.2)
        if change is not None:
            for text, side in (('instance stage  ', 'right'), ('  temporal stage', 'left')):
                place = {'xy': (change, 1.0), 'xycoords': ('data', 'axes fraction')}
                axes[0].annotate(text, **place, ha=side, va='bottom', color=GRAY, annotation_clip=False)
        figure.suptitle(literal(run.name), fontsize=11)
        pictures = [save(figure, run / 'plots' / 'training.png')]
    if 'eval_monitor_ridge_top1' in rows[0]:
        pictures.append(_plot_monitor(run, rows, change))
    return pictures


def _plot_monitor(run: Path, rows: list[dict[str, Any]], change: float | None) -> Path:
    """Transfer and over-compression as they were watched while training."""
    panels_of = {
        'eval_monitor_ridge_top1': 'target top-1 accuracy (%),\nridge on frozen features',
        'eval_monitor_effective_rank': 'effective rank\nof target features',
        'eval_monitor_spread': 'within / between spread\nof target classes',
    }
    with drawing():
        figure, panels = plt.subplots(3, 1, figsize=(7, 7.5), sharex=True)
        for ax, (column, label) in zip(panels, panels_of.items()):
            ax.plot(*_series(rows, column), color=VERMILION, marker='o', markersize=4, label='target')
            ax.set_ylabel(label)
            if change is not None:
                ax.axvline(change, color=GRAY, linestyle='-.', linewidth=1.2)
        source = panels[0].twinx()
        source.grid(False)
        source.spines['right'].set_visible(True)
        source.plot(*_series(rows, 'eval_top1'), color=BLUE, linestyle='--', label='source')
        source.set_ylabel('source top-1 accuracy (%)', color=BLUE)
        panels[0].yaxis.label.set_color(VERMILION)
        panels[-1].set_xlabel('epoch')
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(literal(run.name), fontsize=11)
        return save(figure, run / 'plots' / 'monitor.png')


def _task_loss(ax: Axes, rows: list[dict[str, Any]]) -> None:
    training = 'train_task_loss' if 'train_task_loss' in rows[0] else 'train_loss'
    ax.plot(*_series(rows, training), color=BLUE, label='training')
    ax.plot(*_series(rows, 'eval_loss'), color=BLUE, linestyle=':', label='validation')
    ax.set_ylabel('task loss (nats)')
    ax.legend(loc='upper right')


def _contrast(ax: Axes, rows: list[dict[str, Any]], change: float | None) -> None:
    """The two stages' terms are different sums, so each has a line and a scale of its own."""
    epochs, values = _series(rows, 'train_ctc_loss')
    if change is None:
        ax.plot(epochs, values, color=VERMILION)
        ax.set_ylabel('CTC term (nats)')
        return
    before = sum(epoch < change for epoch in epochs)
    after = ax.twinx()
    after.grid(False)
    after.spines['right'].set_visible(True)
    panels: tuple[tuple[Axes, slice, dict[str, Any], str], ...] = (
        (ax, slice(before), {'color': VERMILION, 'marker': 'o', 'markersize': 3}, 'instance'),
        (after, slice(before, None), {'color': PURPLE, 'linestyle': '--', 'marker': 's', 'markersize': 3}, 'temporal'),
    )
    for target, part, style, side in panels:
        target.plot(epochs[part], values[part], **style)
        target.set_ylabel(f'{side} term (nats)', color=style['color'])


def _accuracy(ax: Axes, rows: list[dict[str, Any]]) -> None:
    ax.plot(*_series(rows, 'eval_top1'), color=BLUE, marker='o', markersize=3, label='top-1')
    ax.plot(*_series(rows, 'eval_top5'), color=ORANGE, linestyle='--', marker='s', markersize=3, label='top-5')
    ax.set_ylabel('validation accuracy (%)')
    ax.legend(loc='lower right')


def _learning_rate(ax: Axes, rows: list[dict[str, Any]]) -> None:
    epochs, rates = _series(rows, 'lr')
    ax.plot(epochs, rates, color=GREEN, drawstyle='steps-mid')
    ax.set_ylabel('learning rate')
    ax.set_yscale('log' if all(rate > 0 for rate in rates) else 'linear')
    ax.set_xlabel('epoch')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _series(rows: list[dict[str, Any]], column: str) -> tuple[list[int], list[float]]:
    """Epochs and values of a column, where it has a value."""
    points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
    return [p[0] for p in points], [p[1] for p in points]


def stage_change(metrics: Path) -> float | None:
    """Between which epochs the temporal stage starts, or None if the run has one stage only.

    Args:
        metrics: The run's metrics.jsonl.
    """
    if not metrics.is_file():
        return None
    stages = {}
    for row in read_metrics(metrics):
        if 'stage' in row:
            stages[row['epoch']] = row['stage']
    temporal = [epoch for epoch, stage in stages.items() if stage == 'temporal']
    return min(temporal) - 0.5 if temporal and len(temporal) < len(stages) else None
