"""A training run's pictures: loss parts, accuracy and learning rate over the epochs, and what its monitor saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...runs import Run
from ...utils.errors import UserError
from .style import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    Axes,
    drawing,
    epoch_axis,
    literal,
    look,
    mark_stage_change,
    plt,
    save,
    second_axis,
)

Rows = list[dict[str, Any]]
_MONITORED = {
    'monitor_ridge_top1': 'target top-1 accuracy (%),\nridge on frozen features',
    'monitor_effective_rank': 'effective rank\nof target features',
    'monitor_spread': 'within / between spread\nof target classes',
}


def plot_run(run: str | os.PathLike) -> list[Path]:
    """Draw loss parts, accuracy and learning rate of a run over the epochs, the stage change marked.

    Returns:
        The pictures, plots/training.png and where a target was monitored plots/monitor.png.

    Raises:
        UserError: Files that are damaged, or hold no epoch.
    """
    run = Run(run)
    rows: Rows = list(run.rows())
    if not rows:
        raise UserError(f'{run.path / "summary.csv"}: holds no epoch')
    change = stage_change(run)
    panels: list[Callable[[Axes], None]] = [partial(_task_loss, rows=rows, change=change)]
    if 'train_ctc_loss' in rows[0]:
        panels.append(partial(_contrast, rows=rows, change=change))
    panels += [partial(_accuracy, rows=rows), partial(_learning_rate, rows=rows)]
    pictures = [_draw(run, 'training.png', change, panels)]
    if 'eval_monitor_ridge_top1' in rows[0]:
        monitored = [partial(_monitored, rows=rows, column=column) for column in _MONITORED]
        pictures.append(_draw(run, 'monitor.png', change, monitored))
    return pictures


def stage_change(run: Run) -> float | None:
    """Return between which epochs the temporal stage starts, or None for a run of one stage."""
    stages = {row['epoch']: row['stage'] for row in run.log_rows() if 'stage' in row}
    temporal = [epoch for epoch, stage in stages.items() if stage == 'temporal']
    return min(temporal) - 0.5 if temporal and len(temporal) < len(stages) else None


def _draw(run: Run, name: str, change: float | None, panels: Sequence[Callable[[Axes], None]]) -> Path:
    with drawing():
        figure, axes = plt.subplots(len(panels), 1, figsize=(7, 2.55 * len(panels)), sharex=True)
        for ax, draw in zip(axes, panels):
            draw(ax)
            mark_stage_change(ax, change)
        epoch_axis(axes[-1])
        figure.suptitle(literal(run.path.name), fontsize=11)
        return save(figure, run.path / 'plots' / name)


def _task_loss(ax: Axes, rows: Rows, change: float | None) -> None:
    training = 'train_task_loss' if 'train_task_loss' in rows[0] else 'train_loss'
    ax.plot(*_series(rows, training), color=BLUE, label='training')
    if 'eval_loss' in rows[0]:
        ax.plot(*_series(rows, 'eval_loss'), color=BLUE, linestyle=':', label='validation')
    ax.set_ylabel('task loss (nats)')
    ax.legend(loc='upper right')
    if change is not None:
        for text, side in (('instance stage  ', 'right'), ('  temporal stage', 'left')):
            place: dict[str, Any] = {'xy': (change, 1.0), 'xycoords': ('data', 'axes fraction')}
            ax.annotate(text, **place, ha=side, va='bottom', color=GRAY, annotation_clip=False)


def _contrast(ax: Axes, rows: Rows, change: float | None) -> None:
    """Draw the two stages' terms, which are different sums, each with its line and scale."""
    epochs, values = _series(rows, 'train_ctc_loss')
    if change is None:
        ax.plot(epochs, values, color=VERMILION)
        ax.set_ylabel('CTC term (nats)')
        return
    before = sum(epoch < change for epoch in epochs)
    styles: dict[str, dict[str, Any]] = {
        'instance': {'color': VERMILION, 'marker': 'o', 'markersize': 3},
        'temporal': {'color': PURPLE, 'linestyle': '--', 'marker': 's', 'markersize': 3},
    }
    for stage, part, side in (('instance', slice(before), ax), ('temporal', slice(before, None), second_axis(ax))):
        side.plot(epochs[part], values[part], **styles[stage])
        side.set_ylabel(f'{stage} term (nats)', color=styles[stage]['color'])


def _accuracy(ax: Axes, rows: Rows) -> None:
    if 'eval_top1' not in rows[0]:  # of another task than classification
        columns = [name for name in rows[0] if name.startswith('eval_') and _series(rows, name)[0]]
        for i, name in enumerate(columns):
            ax.plot(*_series(rows, name), label=literal(name.removeprefix('eval_')), **look(i))
        ax.set_ylabel('validation')
        ax.legend(ncols=2, fontsize=8)
        return
    ax.plot(*_series(rows, 'eval_top1'), color=BLUE, marker='o', markersize=3, label='top-1')
    ax.plot(*_series(rows, 'eval_top5'), color=ORANGE, linestyle='--', marker='s', markersize=3, label='top-5')
    ax.set_ylabel('validation accuracy (%)')
    ax.legend(loc='lower right')


def _learning_rate(ax: Axes, rows: Rows) -> None:
    epochs, rates = _series(rows, 'lr')
    ax.plot(epochs, rates, color=GREEN, drawstyle='steps-mid')
    ax.set_ylabel('learning rate')
    ax.set_yscale('log' if all(rate > 0 for rate in rates) else 'linear')


def _monitored(ax: Axes, rows: Rows, column: str) -> None:
    """Draw a number of the target; beside its accuracy that of the source, on a scale of its own."""
    ax.plot(*_series(rows, f'eval_{column}'), color=VERMILION, marker='o', markersize=4)
    ax.set_ylabel(_MONITORED[column])
    if column == 'monitor_ridge_top1':
        ax.yaxis.label.set_color(VERMILION)
        source = second_axis(ax)
        source.plot(*_series(rows, 'eval_top1'), color=BLUE, linestyle='--')
        source.set_ylabel('source top-1 accuracy (%)', color=BLUE)


def _series(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    """Return epochs and values of a column, where it has a value."""
    points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
    return [p[0] for p in points], [p[1] for p in points]
