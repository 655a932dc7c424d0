"""The picture of frozen-feature probes: accuracy by probe, and by the number of shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .style import BLUE, COLORS, MARKERS, drawing, literal, save

# isort: split
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def plot_probes(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the probes of one model on one target.

    Args:
        results: What results.json holds.
        folder: Where the picture goes.

    Returns:
        The picture, probes.png.
    """
    whole = [row for row in results['rows'] if 'shots' not in row]
    few = [row for row in results['rows'] if 'shots' in row]
    with drawing():
        figure, panels = plt.subplots(1, 2 if few else 1, figsize=(11 if few else 6, 4.2), squeeze=False)
        _by_probe(panels[0, 0], whole)
        if few:
            _by_shots(panels[0, 1], few)
        figure.suptitle(f'{results["model"]} on {literal(Path(results["target"]).name)}, frozen features', fontsize=11)
        return [save(figure, folder / 'probes.png')]


def _by_probe(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row['method'] for row in rows]
    ax.errorbar(
        [row['top1'] for row in rows],
        range(len(rows)),
        xerr=[[row['top1'] - row['top1_low'] for row in rows], [row['top1_high'] - row['top1'] for row in rows]],
        fmt='o',
        color=BLUE,
        capsize=3,
    )
    ax.set_yticks(range(len(rows)), names)
    ax.invert_yaxis()
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel('top-1 accuracy (%), 95% interval over test images')


def _by_shots(ax: Axes, rows: list[dict[str, Any]]) -> None:
    methods = list(dict.fromkeys(row['method'] for row in rows))
    for i, method in enumerate(methods):
        mine = sorted((row for row in rows if row['method'] == method), key=lambda row: row['shots'])
        beside = 1.02 ** (i - (len(methods) - 1) / 2)  # so that the intervals do not lie on one another
        ax.errorbar(
            [row['shots'] * beside for row in mine],
            [row['top1'] for row in mine],
            yerr=[[_reach(row, 'low') for row in mine], [_reach(row, 'high') for row in mine]],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.9,
            capsize=2,
            label=method,
        )
    ax.set_xscale('log')
    ticks = sorted({row['shots'] for row in rows})
    ax.set_xticks(ticks, [str(shots) for shots in ticks])
    ax.minorticks_off()
    ax.set_xlabel('training images a class')
    ax.set_ylabel('top-1 accuracy (%), 95% interval over draws')
    ax.legend()


def _reach(row: dict[str, Any], end: str) -> float:
    """From the mean to an end of its interval, which a single draw does not have."""
    bound = row[f'top1_{end}']
    return 0.0 if bound is None else abs(bound - row['top1'])
