"""The pictures of dynamics: the trade-off, its path, the information plane, over-compression; runs overlaid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .style import COLORS, GRAY, MARKERS, drawing, literal, save

# isort: split
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Trajectory = tuple[str, str, str]
GEOMETRY = {
    'effective_rank': 'effective rank',
    'spread': 'within / between spread',
    'alignment': 'alignment, same class',
    'uniformity': 'uniformity (log)',
}


def first_column(probes: Sequence[str]) -> str:
    """The column of the first probe's top-1 accuracy."""
    return {'knn': 'knn-20', 'sgd': 'sgd-last'}.get(probes[0], probes[0]) + '_top1'


def by_trajectory(rows: Sequence[dict[str, Any]]) -> dict[Trajectory, list[dict[str, Any]]]:
    """Rows of each run on each set, in the order of epochs, by (run, 'source', 'target' or 'detection', data set)."""
    found: dict[Trajectory, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row['epoch']):
        found.setdefault((row['run'], row['set'], row['dataset']), []).append(row)
    order = list(dict.fromkeys((row['run'], row['set'], row['dataset']) for row in rows))
    return {key: found[key] for key in order}


def plot_dynamics(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw everything that the rows allow.

    Args:
        results: What results.json holds: runs, targets, probes, information, rows.
        folder: Where the pictures go.

    Returns:
        The pictures: tradeoff.png, compression.png, path.png if there are targets with probes, and information.png if
        it was measured.
    """
    drawn: dict[str, Callable[[dict[str, Any]], Figure]] = {
        'tradeoff': _tradeoff,
        **({'path': _path} if results['targets'] else {}),
        'compression': _compression,
    }
    if results['information'] != 'none':
        drawn['information'] = _information
    with drawing():
        return [save(draw(results), folder / f'{name}.png') for name, draw in drawn.items()]


def _looks(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Color and marker of each run."""
    names = [run['name'] for run in results['runs']]
    return {
        name: {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def _sets(results: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The source, whatever it is of each run, and each target."""
    return [('source', None), *(('target', name) for name in results['targets'])]


def _of(results: dict[str, Any], kind: str, dataset: str | None) -> dict[str, list[dict[str, Any]]]:
    """The trajectory of each run on a set."""
    found = by_trajectory(results['rows'])
    return {run: rows for (run, k, name), rows in found.items() if k == kind and dataset in (None, name)}


def _title(results: dict[str, Any], kind: str, dataset: str | None) -> str:
    if dataset is None:
        names = dict.fromkeys(row['dataset'] for row in results['rows'] if row['set'] == 'source')
        dataset = ', '.join(Path(name).name for name in names)
    return f'{kind}: {literal(Path(dataset).name)}'


def _mark_changes(ax: Axes, results: dict[str, Any]) -> None:
    """A line in each run's color where its temporal stage starts."""
    for run in results['runs']:
        if run['stage_change'] is not None:
            ax.axvline(run['stage_change'], color=_looks(results)[run['name']]['color'], linestyle='-.', linewidth=1)


def _legend(figure: Figure, ax: Axes, results: dict[str, Any]) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if any(run['stage_change'] is not None for run in results['runs']):
        (line,) = ax.plot([], [], color=GRAY, linestyle='-.', linewidth=1)
        handles, labels = [*handles, line], [*labels, 'temporal stage starts']
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 3))


def _tradeoff(results: dict[str, Any]) -> Figure:
    sets = [*_sets(results), *(('detection', name) for name in results.get('detection', ()))]
    figure, panels = plt.subplots(len(sets), 1, figsize=(7, 2.6 * len(sets) + 0.6), sharex=True, squeeze=False)
    looks = _looks(results)
    probe = first_column(results['probes'])
    for ax, (kind, dataset) in zip(panels.flat, sets):
        column = {'source': 'top1', 'detection': 'box_ap'}.get(kind, probe)
        for run, rows in _of(results, kind, dataset).items():
            epochs = [row['epoch'] for row in rows]
            ax.plot(epochs, [row[column] for row in rows], **looks[run], markersize=4, label=literal(run))
            if kind != 'detection':
                bounds = ([row[f'{column}_{end}'] for row in rows] for end in ('low', 'high'))
                ax.fill_between(epochs, *bounds, color=looks[run]['color'], alpha=0.15, linewidth=0)
        _mark_changes(ax, results)
        if kind == 'detection':
            ax.set_title(f'{_title(results, kind, dataset)} (Faster R-CNN on the frozen body)', fontsize=10)
            ax.set_ylabel('box AP (%)')
            continue
        how = 'own classifier' if kind == 'source' else f'{probe.removesuffix("_top1")} on frozen features'
        ax.set_title(f'{_title(results, kind, dataset)} ({how}, 95% interval)', fontsize=10)
        ax.set_ylabel('top-1 accuracy (%)')
    panels[-1, 0].set_xlabel('epoch')
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, panels[0, 0], results)
    return figure


def _path(results: dict[str, Any]) -> Figure:
    targets = results['targets']
    figure, panels = plt.subplots(1, len(targets), figsize=(5.2 * len(targets) + 0.6, 5), squeeze=False)
    looks = _looks(results)
    probe = first_column(results['probes'])
    source = _of(results, 'source', None)
    changes = {run['name']: run['stage_change'] for run in results['runs']}
    for ax, target in zip(panels.flat, targets):
        for run, rows in _of(results, 'target', target).items():
            x = [row['top1'] for row in source[run]]
            y = [row[probe] for row in rows]
            color = looks[run]['color']
            ax.plot(x, y, **looks[run], markersize=4, linewidth=1.2, alpha=0.8, label=literal(run))
            ax.plot(x[0], y[0], 'o', markersize=11, markerfacecolor='none', color=color)
            ax.plot(x[-1], y[-1], '*', markersize=15, color=color, markeredgecolor='black')
            if changes[run] is not None:
                at = next(i for i, row in enumerate(rows) if row['epoch'] > changes[run])
                ax.plot(x[at - 1 : at], y[at - 1 : at], 'x', markersize=11, markeredgewidth=2.5, color='black')
        ax.set_xlabel('source top-1 accuracy (%)')
        ax.set_ylabel(f'target top-1 accuracy (%), {probe.removesuffix("_top1")}')
        ax.set_title(_title(results, 'target', target), fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    for marker, label in (('o', 'first epoch'), ('x', 'end of instance stage'), ('*', 'last epoch')):
        if marker != 'x' or any(change is not None for change in changes.values()):
            hollow = {'markerfacecolor': 'none'} if marker == 'o' else {}
            handles += panels[0, 0].plot([], [], marker, color=GRAY, markersize=9, **hollow)
            labels.append(label)
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 3))
    return figure


def _information(results: dict[str, Any]) -> Figure:
    sets = _sets(results)
    figure, panels = plt.subplots(1, len(sets), figsize=(4.6 * len(sets) + 1, 4.6), squeeze=False)
    looks = _looks(results)
    epochs = [row['epoch'] for row in results['rows']]
    points = None
    for ax, (kind, dataset) in zip(panels.flat, sets):
        for run, rows in _of(results, kind, dataset).items():
            x, y = ([row[f'information_{name}'] for row in rows] for name in ('xt', 'ty'))
            ax.plot(x, y, color=looks[run]['color'], linewidth=1, alpha=0.6)
            points = ax.scatter(
                x,
                y,
                c=[row['epoch'] for row in rows],
                cmap='cividis',
                vmin=min(epochs),
                vmax=max(epochs),
                marker=looks[run]['marker'],
                edgecolors=looks[run]['color'],
                s=45,
                label=literal(run),
                zorder=3,
            )
        ax.set_xlabel('I(X;T) (nats)')
        ax.set_ylabel('I(T;Y) (nats)')
        ax.set_title(f'{_title(results, kind, dataset)}, {results["information"]}', fontsize=10)
    assert points is not None
    figure.colorbar(points, ax=panels[0, -1], label='epoch')
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 3))
    return figure


def _compression(results: dict[str, Any]) -> Figure:
    sets = _sets(results)
    size = (4.2 * len(sets) + 0.6, 2.2 * len(GEOMETRY) + 0.6)
    figure, panels = plt.subplots(len(GEOMETRY), len(sets), figsize=size, sharex=True, squeeze=False)
    looks = _looks(results)
    for column, (kind, dataset) in enumerate(sets):
        for ax, (name, label) in zip(panels[:, column], GEOMETRY.items()):
            for run, rows in _of(results, kind, dataset).items():
                ax.plot(
                    [r['epoch'] for r in rows], [r[name] for r in rows], **looks[run], markersize=4, label=literal(run)
                )
            _mark_changes(ax, results)
            if column == 0:
                ax.set_ylabel(label)
        panels[0, column].set_title(_title(results, kind, dataset), fontsize=10)
        panels[-1, column].set_xlabel('epoch')
        panels[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, panels[0, 0], results)
    return figure
