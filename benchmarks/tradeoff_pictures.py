"""The picture of a comparison: accuracies over the epochs, and target against source accuracy."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from scipy import stats

from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save

SHOWN = {
    'vanilla': 'vanilla',
    'ctc-early-past': 'CTC, early past',
    'ctc-discriminability': 'CTC, discriminability',
    'ctc-transferability': 'CTC, transferability',
}
Curve = tuple[list[int], list[float], list[float]]  # epochs, means, halves of 95% intervals


def curve(results: dict[str, Any], method: str, *path: str) -> Curve:
    """The mean over seeds of a number at each kept epoch, with its interval."""
    by_epoch: dict[int, list[float]] = {}
    for run in results['runs']:
        if run['method'] == method:
            for row in run['trajectory']:
                value: Any = row
                for key in path:
                    value = value[key]
                by_epoch.setdefault(row['epoch'] + 1, []).append(value)
    means = [statistics.fmean(values) for values in by_epoch.values()]
    return list(by_epoch), means, [_half(values) for values in by_epoch.values()]


def _half(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def draw(results: dict[str, Any], picture: Path) -> Path:
    """Write the picture.

    Args:
        results: What docs/results holds of one comparison.
        picture: PNG file.
    """
    methods = [method for method in SHOWN if any(run['method'] == method for run in results['runs'])]
    seeds = max((sum(run['method'] == method for run in results['runs']) for method in methods), default=0)
    targets = results['targets']
    with drawing():
        # each target over the epochs, the source over the epochs, and the first target against the source
        rows = math.ceil(len(targets) / 2) + 1
        figure, axes = plt.subplots(rows, 2, figsize=(10.5, 3.8 * rows))
        *panels, source_panel, across = axes.flat
        for unused in panels[len(targets) :]:
            unused.set_axis_off()
        for method in methods:
            index = list(SHOWN).index(method)  # a method has one color in all pictures
            source = curve(results, method, 'source', 'top1')
            transfers = [curve(results, method, 'targets', target, 'ridge') for target in targets]
            for panel, transfer in zip(panels, transfers):
                _over_epochs(panel, transfer, index, SHOWN[method])
            _over_epochs(source_panel, source, index, SHOWN[method])
            _across(across, source, transfers[0], index)
        for panel, target in zip(panels, targets):
            panel.set_ylabel(f'{target} top-1 (%)')
            panel.set_title('target: ridge on frozen features', fontsize=10)
        for panel in (*panels[: len(targets)], source_panel):
            panel.axvline(results['temporal_start_epoch'], color=GRAY, linestyle='-.', linewidth=1)
            panel.set_xlabel('epoch (dash-dotted: CTC starts its temporal stage)')
        source_panel.set_ylabel(f'{results["source"]} top-1 (%)')
        source_panel.set_title('source: the model itself, on validation rows', fontsize=10)
        across.set_xlabel(f'{results["source"]} top-1 (%)')
        across.set_ylabel(f'{targets[0]} top-1 (%)')
        across.set_title('target against source; star: last epoch', fontsize=10)
        title = f'{results["settings"]["model"]}, one seed'
        if seeds > 1:
            title = f'{results["settings"]["model"]}, mean of up to {seeds} seeds with 95% intervals'
        handles, labels = source_panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside upper center', ncols=4, title=title)
        return save(figure, picture)


def _over_epochs(ax: Axes, found: Curve, index: int, label: str) -> None:
    epochs, means, halves = found
    ax.plot(epochs, means, color=COLORS[index], marker=MARKERS[index], markersize=4, label=label)
    # no accuracy lies outside of 0 to 100, where an interval of few seeds may reach
    bounds = ([min(max(mean + side * half, 0.0), 100.0) for mean, half in zip(means, halves)] for side in (-1, 1))
    ax.fill_between(epochs, *bounds, color=COLORS[index], alpha=0.15, linewidth=0)


def _across(ax: Axes, source: Curve, target: Curve, index: int) -> None:
    x, y = source[1], target[1]
    ax.plot(x, y, color=COLORS[index], marker=MARKERS[index], markersize=4, linewidth=1.2, alpha=0.7)
    ax.errorbar(
        x[-1:], y[-1:], xerr=source[2][-1:], yerr=target[2][-1:],
        color=COLORS[index], marker='*', markersize=15, markeredgecolor='black', capsize=3, zorder=5,
    )  # fmt: skip
