"""The picture of frozen-feature probes: accuracy by probe, and by the number of shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .style import BLUE, Axes, drawing, error_lengths, literal, look, plt, save


def plot_probes(results: dict[str, Any], folder: Path) -> Path:
    """Draw the probes of one model on one target, from what results.json holds.

    Returns:
        The picture, probes.png.
    """
    full = [row for row in results['rows'] if 'shots' not in row]
    few = [row for row in results['rows'] if 'shots' in row]
    with drawing():
        figure, panels = plt.subplots(1, 2 if few else 1, figsize=(11 if few else 6, 4.2), squeeze=False)
        _by_probe(panels[0, 0], full)
        if few:
            _by_shots(panels[0, 1], few)
        figure.suptitle(f'{results["model"]} on {literal(Path(results["target"]).name)}, frozen features', fontsize=11)
        return save(figure, folder / 'probes.png')


def _by_probe(ax: Axes, rows: list[dict[str, Any]]) -> None:
    accuracies = [row['top1'] for row in rows]
    ax.errorbar(accuracies, range(len(rows)), xerr=error_lengths(rows), fmt='o', color=BLUE, capsize=3)
    ax.set_yticks(range(len(rows)), [row['method'] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel('top-1 accuracy (%), 95% interval over test images')


def _by_shots(ax: Axes, rows: list[dict[str, Any]]) -> None:
    methods = list(dict.fromkeys(row['method'] for row in rows))
    for i, method in enumerate(methods):
        curve = sorted((row for row in rows if row['method'] == method), key=lambda row: row['shots'])
        beside = 1.02 ** (i - (len(methods) - 1) / 2)  # so that the intervals do not lie on one another
        shots, accuracies = [row['shots'] * beside for row in curve], [row['top1'] for row in curve]
        style = {'linewidth': 1.2, 'elinewidth': 0.9, 'capsize': 2, **look(i)}
        ax.errorbar(shots, accuracies, yerr=error_lengths(curve), label=method, **style)
    ax.set_xscale('log')
    ticks = sorted({row['shots'] for row in rows})
    ax.set_xticks(ticks, [str(shots) for shots in ticks])
    ax.minorticks_off()
    ax.set_xlabel('training images a class')
    ax.set_ylabel('top-1 accuracy (%), 95% interval over draws')
    ax.legend()
