"""The picture of a comparison: accuracies over the epochs, and target against source accuracy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tradeoff_report import interval, pick

from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save

SHOWN = {
    'vanilla': 'vanilla',
    'ctc-early-past': 'CTC, early past',
    'ctc-discriminability': 'CTC, discriminability',
    'ctc-transferability': 'CTC, transferability',
}
Curve = tuple[list[int], list[float], list[float]]  # epochs, means over seeds, half widths of 95% intervals


def curve(results: dict[str, Any], method: str, *path: str) -> Curve:
    """A number at each kept epoch."""
    by_epoch: dict[int, dict[int, Any]] = {}
    for run in results['runs']:
        for row in run['trajectory'] if run['method'] == method else ():
            by_epoch.setdefault(row['epoch'] + 1, {})[run['seed']] = row
    points = [interval(list(pick(rows, path).values())) for rows in by_epoch.values()]
    return list(by_epoch), [mean for mean, _ in points], [half or 0.0 for _, half in points]


def draw(results: dict[str, Any], picture: Path) -> None:
    """Write a PNG file: each target over the epochs, the source likewise, and the first target against the source."""
    methods = [method for method in SHOWN if any(run['method'] == method for run in results['runs'])]
    seeds = max((sum(run['method'] == method for run in results['runs']) for method in methods), default=0)
    spread = f'mean of up to {seeds} seeds with 95% intervals' if seeds > 1 else 'one seed'
    curves = {target: ('targets', target, 'ridge') for target in results['targets']}
    curves[results['source']] = ('source', 'top1')
    with drawing():
        rows = math.ceil(len(results['targets']) / 2) + 1
        figure, axes = plt.subplots(rows, 2, figsize=(10.5, 3.8 * rows))
        *panels, source_panel, across = axes.flat
        for unused in panels[len(results['targets']) :]:
            unused.set_axis_off()
        panels = [*panels[: len(results['targets'])], source_panel]
        for method in methods:
            index = list(SHOWN).index(method)  # a method has one color in all pictures
            style: dict[str, Any] = {'color': COLORS[index], 'marker': MARKERS[index], 'markersize': 4}
            found = [curve(results, method, *path) for path in curves.values()]
            for panel, (epochs, means, halves) in zip(panels, found, strict=True):
                panel.plot(epochs, means, **style, label=SHOWN[method])
                # no accuracy lies outside of 0 to 100, where an interval of few seeds may reach
                low, high = ([min(max(m + side * h, 0.0), 100.0) for m, h in zip(means, halves)] for side in (-1, 1))
                panel.fill_between(epochs, low, high, color=style['color'], alpha=0.15, linewidth=0)
            (_, y, y_half), (_, x, x_half) = found[0], found[-1]
            across.plot(x, y, **style, linewidth=1.2, alpha=0.7)
            style |= {'marker': '*', 'markersize': 15, 'markeredgecolor': 'black', 'capsize': 3, 'zorder': 5}
            across.errorbar(x[-1:], y[-1:], xerr=x_half[-1:], yerr=y_half[-1:], **style)
        for panel, name in zip(panels, curves, strict=True):
            panel.axvline(results['temporal_start_epoch'], color=GRAY, linestyle='-.', linewidth=1)
            panel.set(xlabel='epoch (dash-dotted: CTC starts its temporal stage)', ylabel=f'{name} top-1 (%)')
            panel.set_title('target: ridge on frozen features', fontsize=10)
        source_panel.set_title('source: the model itself, on validation rows', fontsize=10)
        across.set(xlabel=source_panel.get_ylabel(), ylabel=panels[0].get_ylabel())
        across.set_title('target against source; star: last epoch', fontsize=10)
        handles, labels = source_panel.get_legend_handles_labels()
        title = f'{results["settings"]["model"]}, {spread}'
        figure.legend(handles, labels, loc='outside upper center', ncols=4, title=title)
        save(figure, picture)
