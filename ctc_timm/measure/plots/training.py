"""A training run's pictures: loss parts, accuracy and learning rate over the epochs, and what its monitor saw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ...runs import Run
from ...utils.errors import UserError
from .style import (
    BLUE,
    GRAY,
    GREEN,
    PURPLE,
    VERMILION,
    drawing,
    epoch_axis,
    literal,
    look,
    mark_stage_change,
    plt,
    save,
)

Rows = list[dict[str, Any]]
_MONITORED = {
    'eval_monitor_ridge_top1': 'target top-1 accuracy (%),\nridge on frozen features',
    'eval_monitor_effective_rank': 'effective rank\nof target features',
    'eval_monitor_spread': 'within / between spread\nof target classes',
}


def plot_run(run: str | os.PathLike) -> list[Path]:
    """Draw loss parts, metrics and learning rate of a run over the epochs, the stage change marked.

    Returns plots/training.png and where a target was monitored plots/monitor.png. A UserError: files that are damaged,
    or hold no epoch.
    """
    run = Run(run)
    rows: Rows = list(run.rows())
    if not rows:
        raise UserError(f'{run.summary_file}: holds no epoch')
    change, pictures = stage_change(run), [run.plots / 'training.png']
    has_contrast = 'train_ctc_loss' in rows[0]
    with _panels(pictures[0], run, 3 + has_contrast, change) as axes:
        loss = 'train_task_loss' if 'train_task_loss' in rows[0] else 'train_loss'
        for column, linestyle, label in ((loss, '-', 'training'), ('eval_loss', ':', 'validation')):
            _plot(axes[0], rows, column, 'task loss (nats)', color=BLUE, linestyle=linestyle, label=label)
        axes[0].legend(loc='upper right')
        if change is not None:
            for text, side in (('instance stage  ', 'right'), ('  temporal stage', 'left')):
                place: dict[str, Any] = {'xy': (change, 1.0), 'xycoords': ('data', 'axes fraction')}
                axes[0].annotate(text, **place, ha=side, va='bottom', color=GRAY, annotation_clip=False)
        if has_contrast and change is None:
            _plot(axes[1], rows, 'train_ctc_loss', 'CTC term (nats)', color=VERMILION)
        elif has_contrast:  # the two stages' terms are different sums, each with its line and scale
            for stage, ax, options in (
                ('instance', axes[1], {'color': VERMILION, 'marker': 'o'}),
                ('temporal', _right(axes[1]), {'color': PURPLE, 'marker': 's', 'linestyle': '--'}),
            ):
                part = [row for row in rows if (float(row['epoch']) > (change or 0)) is (stage == 'temporal')]
                _plot(ax, part, 'train_ctc_loss', f'{stage} term (nats)', **options, markersize=3)
                ax.yaxis.label.set_color(options['color'])
        metrics = [name for name in rows[0] if name.startswith('eval_') and name not in (*_MONITORED, 'eval_loss')]
        metrics = [name for name in metrics if not name.startswith('eval_keep_')]  # which have a picture of their own
        ylabel = 'validation accuracy (%)' if 'eval_top1' in metrics else 'validation'
        for i, column in enumerate(metrics):
            _plot(axes[-2], rows, column, ylabel, label=literal(column.removeprefix('eval_')), **look(i))
        if axes[-2].lines:
            axes[-2].legend(ncols=2, fontsize=8)
        _plot(axes[-1], rows, 'lr', 'learning rate', color=GREEN, drawstyle='steps-mid')
        axes[-1].set_yscale('log' if all(float(row.get('lr') or 1) > 0 for row in rows) else 'linear')
    if all(column in rows[0] for column in _MONITORED):
        pictures.append(run.plots / 'monitor.png')
        with _panels(pictures[1], run, 3, change) as axes:
            for ax, (column, ylabel) in zip(axes, _MONITORED.items()):
                _plot(ax, rows, column, ylabel, color=VERMILION, marker='o', markersize=4)
            source = _right(axes[0])
            _plot(source, rows, 'eval_top1', 'source top-1 accuracy (%)', color=BLUE, linestyle='--')
            source.yaxis.label.set_color(BLUE)
            axes[0].yaxis.label.set_color(VERMILION)
    return pictures


def stage_change(run: Run) -> float | None:
    """Return between which epochs the temporal stage starts, or None for a run of one stage."""
    stages = {row['epoch']: row['stage'] for row in run.log_rows() if 'stage' in row}
    temporal = [epoch for epoch, stage in stages.items() if stage == 'temporal']
    return min(temporal) - 0.5 if temporal and len(temporal) < len(stages) else None


@contextmanager
def _panels(picture: Path, run: Run, count: int, change: float | None) -> Iterator[Any]:
    """Give panels over the epochs, one above the other, to draw in; then save them."""
    with drawing():
        figure, axes = plt.subplots(count, 1, figsize=(7, 2.55 * count), sharex=True)
        yield axes
        for ax in axes:
            mark_stage_change(ax, change)
        epoch_axis(axes[-1])
        figure.suptitle(literal(run.path.name), fontsize=11)
        save(figure, picture)


def _plot(ax: Axes, rows: Rows, column: str, ylabel: str, **options: Any) -> None:
    """Draw a column over the epochs, if and where it has a value."""
    points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
    ax.set_ylabel(ylabel)
    if points:
        ax.plot(*zip(*points), **options)


def _right(ax: Axes) -> Axes:
    """Add an axis on the right."""
    right = ax.twinx()
    right.grid(False)
    right.spines['right'].set_visible(True)
    return right
