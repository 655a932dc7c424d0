"""The picture of a comparison: accuracies over the epochs, and target against source accuracy."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from scipy import stats

from ctc_timm.measure.plots.style import COLOURS, GREY, MARKERS, drawing, plt, save

SHOWN = {
    'vanilla': 'vanilla',
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
    target = results['targets'][0]
    paths = {results['source']: ('source', 'top1'), target: ('targets', target, 'ridge')}
    with drawing():
        figure, (over, source_panel, across) = plt.subplots(1, 3, figsize=(13, 4.3))
        for index, method in enumerate(methods):
            source = curve(results, method, *paths[results['source']])
            transfer = curve(results, method, *paths[target])
            _over_epochs(over, transfer, index, SHOWN[method])
            _over_epochs(source_panel, source, index, SHOWN[method])
            _across(across, source, transfer, index)
        for panel in (over, source_panel):
            panel.axvline(results['temporal_start_epoch'], color=GREY, linestyle='-.', linewidth=1)
            panel.set_xlabel('epoch (dash-dotted: CTC starts its temporal stage)')
        over.set_ylabel(f'{target} top-1 (%)')
        source_panel.set_ylabel(f'{results["source"]} top-1 (%)')
        across.set_xlabel(f'{results["source"]} top-1 (%)')
        across.set_ylabel(f'{target} top-1 (%)')
        over.set_title('target: ridge on frozen features', fontsize=10)
        source_panel.set_title('source: the model itself, on validation rows', fontsize=10)
        across.set_title('target against source; star: last epoch', fontsize=10)
        title = f'{results["settings"]["model"]}, one seed'
        if seeds > 1:
            title = f'{results["settings"]["model"]}, mean of up to {seeds} seeds with 95% intervals'
        handles, labels = over.get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside upper center', ncols=3, title=title)
        return save(figure, picture)


def _over_epochs(ax: Axes, found: Curve, index: int, label: str) -> None:
    epochs, means, halves = found
    ax.plot(epochs, means, color=COLOURS[index], marker=MARKERS[index], markersize=4, label=label)
    bounds = ([mean + side * half for mean, half in zip(means, halves)] for side in (-1, 1))
    ax.fill_between(epochs, *bounds, color=COLOURS[index], alpha=0.15, linewidth=0)


def _across(ax: Axes, source: Curve, target: Curve, index: int) -> None:
    x, y = source[1], target[1]
    ax.plot(x, y, color=COLOURS[index], marker=MARKERS[index], markersize=4, linewidth=1.2, alpha=0.7)
    ax.errorbar(
        x[-1:], y[-1:], xerr=source[2][-1:], yerr=target[2][-1:],
        color=COLOURS[index], marker='*', markersize=15, markeredgecolor='black', capsize=3, zorder=5,
    )  # fmt: skip
