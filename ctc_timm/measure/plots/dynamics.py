"""The pictures of dynamics: the trade-off, its path, the information plane, over-compression; runs overlaid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .style import GRAY, Axes, Figure, drawing, epoch_axis, literal, look, mark_stage_change, plt, save

Results = dict[str, Any]
Rows = list[dict[str, Any]]
GEOMETRY = {
    'effective_rank': 'effective rank',
    'spread': 'within / between spread',
    'alignment': 'alignment, same class',
    'uniformity': 'uniformity (log)',
}


def main_column(kind: str, probes: Sequence[str]) -> str:
    """Return the column of the accuracy on a set: top-1 of the model or of the first probe."""
    probe = {'knn': 'knn-20', 'sgd': 'sgd-last'}.get(probes[0], probes[0])
    return 'top1' if kind == 'source' else f'{probe}_top1'


def by_trajectory(rows: Rows) -> dict[tuple[str, str, str], Rows]:
    """Group rows by (run, 'source' or 'target', data set), each group in the order of epochs."""
    found: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        found.setdefault((row['run'], row['set'], row['dataset']), []).append(row)
    return {key: sorted(group, key=lambda row: row['epoch']) for key, group in found.items()}


def plot_dynamics(results: Results, folder: Path) -> list[Path]:
    """Draw what results.json holds: tradeoff.png, compression.png, path.png of targets, information.png if measured."""
    drawn = {'tradeoff': _tradeoff, 'compression': _compression}
    drawn |= {'path': _path} if results['targets'] else {}
    drawn |= {'information': _information} if results['information'] != 'none' else {}
    with drawing():
        return [save(draw(results), folder / f'{name}.png') for name, draw in drawn.items()]


def _sets(results: Results) -> list[tuple[str, str]]:
    """List the source, under no name as each run has its own, and the targets."""
    return [('source', ''), *(('target', name) for name in results['targets'])]


def _trajectories(results: Results, kind: str, dataset: str) -> Iterator[tuple[str, dict[str, Any], Rows]]:
    """Yield each run's name, the look of its line, and its rows on a set."""
    names = [run['name'] for run in results['runs']]
    for (run, found, name), rows in by_trajectory(results['rows']).items():
        if found == kind and dataset in ('', name):
            yield run, {**look(names.index(run)), 'label': literal(run)}, rows


def _title(ax: Axes, results: Results, kind: str, dataset: str, more: str = '') -> None:
    names = [dataset] if dataset else dict.fromkeys(row['dataset'] for row in results['rows'] if row['set'] == kind)
    ax.set_title(f'{kind}: {literal(", ".join(Path(name).name for name in names))}{more}', fontsize=10)


def _plot_over_epochs(ax: Axes, results: Results, kind: str, dataset: str, column: str) -> None:
    """Draw a column of every run, with its interval where it has one, and where the temporal stages start."""
    for _, style, rows in _trajectories(results, kind, dataset):
        epochs = [row['epoch'] for row in rows]
        ax.plot(epochs, [row[column] for row in rows], **style)
        if f'{column}_low' in rows[0]:
            low, high = ([row[f'{column}_{end}'] for row in rows] for end in ('low', 'high'))
            ax.fill_between(epochs, low, high, color=style['color'], alpha=0.15, linewidth=0)
    for i, run in enumerate(results['runs']):
        mark_stage_change(ax, run['stage_change'], look(i)['color'])


def _add_legend(figure: Figure, ax: Axes, more: dict[str, dict[str, Any]]) -> None:
    """Put the legend of a panel above all, with entries that no line of the panel has."""
    for label, style in more.items():
        ax.plot([], [], label=label, **{'color': GRAY, **style})
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 3))


def _stage_entry(results: Results) -> dict[str, dict[str, Any]]:
    changes = any(run['stage_change'] is not None for run in results['runs'])
    return {'temporal stage starts': {'linestyle': '-.', 'linewidth': 1}} if changes else {}


def _tradeoff(results: Results) -> Figure:
    sets = _sets(results)
    figure, panels = plt.subplots(len(sets), 1, figsize=(7, 2.6 * len(sets) + 0.6), sharex=True, squeeze=False)
    for ax, (kind, dataset) in zip(panels.flat, sets):
        column = main_column(kind, results['probes'])
        _plot_over_epochs(ax, results, kind, dataset, column)
        how = {
            'source': "model's classifier, 95% interval",
            'target': f'{column.removesuffix("_top1")} on frozen features, 95% interval',
        }[kind]
        _title(ax, results, kind, dataset, f' ({how})')
        ax.set_ylabel('top-1 accuracy (%)')
    epoch_axis(panels[-1, 0])
    _add_legend(figure, panels[0, 0], _stage_entry(results))
    return figure


def _path(results: Results) -> Figure:
    targets, column = results['targets'], main_column('target', results['probes'])
    figure, panels = plt.subplots(1, len(targets), figsize=(5.2 * len(targets) + 0.6, 5), squeeze=False)
    source = {run: rows for run, _, rows in _trajectories(results, 'source', '')}
    changes = {run['name']: run['stage_change'] for run in results['runs']}
    for ax, target in zip(panels.flat, targets):
        for run, style, rows in _trajectories(results, 'target', target):
            x, y = [row['top1'] for row in source[run]], [row[column] for row in rows]
            ax.plot(x, y, linewidth=1.2, alpha=0.8, **style)
            ax.plot(x[0], y[0], 'o', markersize=11, markerfacecolor='none', color=style['color'])
            ax.plot(x[-1], y[-1], '*', markersize=15, color=style['color'], markeredgecolor='black')
            if changes[run] is not None:
                i = sum(row['epoch'] < changes[run] for row in rows)
                ax.plot(x[i - 1 : i], y[i - 1 : i], 'x', markersize=11, markeredgewidth=2.5, color='black')
        ax.set_xlabel('source top-1 accuracy (%)')
        ax.set_ylabel(f'target top-1 accuracy (%), {column.removesuffix("_top1")}')
        _title(ax, results, 'target', target)
    marks: dict[str, dict[str, Any]] = {'first epoch': {'marker': 'o', 'markerfacecolor': 'none'}}
    marks |= {'end of instance stage': {'marker': 'x'}} if _stage_entry(results) else {}
    marks |= {'last epoch': {'marker': '*'}}
    _add_legend(figure, panels[0, 0], {k: {'linestyle': 'none', 'markersize': 9, **mark} for k, mark in marks.items()})
    return figure


def _information(results: Results) -> Figure:
    sets = _sets(results)
    figure, panels = plt.subplots(1, len(sets), figsize=(4.6 * len(sets) + 1, 4.6), squeeze=False)
    epochs = [row['epoch'] for row in results['rows']]
    scale: dict[str, Any] = {'cmap': 'cividis', 'vmin': min(epochs), 'vmax': max(epochs), 's': 45, 'zorder': 3}
    for ax, (kind, dataset) in zip(panels.flat, sets):
        for _, style, rows in _trajectories(results, kind, dataset):
            x, y, colors = ([row[name] for row in rows] for name in ('information_xt', 'information_ty', 'epoch'))
            ax.plot(x, y, color=style['color'], linewidth=1, alpha=0.6)
            shape = {'marker': style['marker'], 'edgecolors': style['color'], 'label': style['label']}
            points = ax.scatter(x, y, c=colors, **shape, **scale)
        ax.set_xlabel('I(X;T) (nats)')
        ax.set_ylabel('I(T;Y) (nats)')
        _title(ax, results, kind, dataset, f', {results["information"]}')
    figure.colorbar(points, ax=panels[0, -1], label='epoch')
    _add_legend(figure, panels[0, 0], {})
    return figure


def _compression(results: Results) -> Figure:
    sets = _sets(results)
    size = (4.2 * len(sets) + 0.6, 2.2 * len(GEOMETRY) + 0.6)
    figure, panels = plt.subplots(len(GEOMETRY), len(sets), figsize=size, sharex=True, squeeze=False)
    for i, (kind, dataset) in enumerate(sets):
        for ax, name in zip(panels[:, i], GEOMETRY):
            _plot_over_epochs(ax, results, kind, dataset, name)
        _title(panels[0, i], results, kind, dataset)
        epoch_axis(panels[-1, i])
    for ax, label in zip(panels[:, 0], GEOMETRY.values()):
        ax.set_ylabel(label)
    _add_legend(figure, panels[0, 0], _stage_entry(results))
    return figure
