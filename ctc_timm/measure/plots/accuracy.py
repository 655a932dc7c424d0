"""The pictures of accuracy: of probes on frozen features, and of fine-tuning on parts of a training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .style import BLUE, GRAY, Axes, drawing, error_lengths, literal, look, plt, save

Rows = list[dict[str, Any]]


def plot_probes(results: dict[str, Any], folder: Path) -> Path:
    """Draw the probes of one model on one target, from what results.json holds, to probes.png."""
    full = [row for row in results['rows'] if 'shots' not in row]
    few = [row for row in results['rows'] if 'shots' in row]
    with drawing():
        figure, panels = plt.subplots(1, 2 if few else 1, figsize=(11 if few else 6, 4.2), squeeze=False)
        ax, accuracies = panels[0, 0], [row['top1'] for row in full]
        ax.errorbar(accuracies, range(len(full)), xerr=error_lengths(full), fmt='o', color=BLUE, capsize=3)
        ax.set_yticks(range(len(full)), [row['method'] for row in full])
        ax.set_ylim(len(full) - 0.5, -0.5)
        ax.set_xlabel('top-1 accuracy (%), 95% interval over test images')
        if few:
            _plot_shots(panels[0, 1], few)
        figure.suptitle(f'{results["model"]} on {_last(results["target"])}, frozen features', fontsize=11)
        return save(figure, folder / 'probes.png')


def _plot_shots(ax: Axes, rows: Rows) -> None:
    """Draw accuracy by the number of shots."""
    methods = list(dict.fromkeys(row['method'] for row in rows))
    for i, method in enumerate(methods):
        curve = sorted((row for row in rows if row['method'] == method), key=lambda row: row['shots'])
        beside = 1.02 ** (i - (len(methods) - 1) / 2)  # so that the intervals do not lie on one another
        shots, accuracies = [row['shots'] * beside for row in curve], [row['top1'] for row in curve]
        style = {'linewidth': 1.2, 'elinewidth': 0.9, 'capsize': 2, **look(i)}
        ax.errorbar(shots, accuracies, yerr=error_lengths(curve), label=method, **style)
    ticks = sorted({row['shots'] for row in rows})
    _log_axis(ax, ticks, [str(shots) for shots in ticks])
    ax.set_xlabel('training images a class')
    ax.set_ylabel('top-1 accuracy (%), 95% interval over draws')
    ax.legend()


def plot_finetune(results: dict[str, Any], folder: Path) -> Path:
    """Draw top-1 accuracy against training fraction, from what results.json holds, to finetune.png.

    Each run, and the mean of each fraction with its interval.
    """
    means, rows = results['summary'], results['rows']
    several = any(mean['seeds'] > 1 for mean in means)
    fractions = [mean['train_fraction'] for mean in means]
    with drawing():
        figure, ax = plt.subplots(figsize=(6, 4))
        label = 'mean over seeds, 95% interval' if several else 'a run, 95% interval over test images'
        style: dict[str, Any] = {'color': BLUE, 'marker': 'o', 'capsize': 4, 'label': label}
        ax.errorbar(fractions, [m['top1'] for m in means], yerr=error_lengths(means if several else rows), **style)
        if several:
            runs = [row['train_fraction'] for row in rows], [row['top1'] for row in rows]
            ax.plot(*runs, color=GRAY, marker='x', linestyle='none', label='a run')
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 101))  # the interval of two seeds can reach far beyond
        _log_axis(ax, fractions, [f'{100 * mean["train_fraction"]:g}%\n{mean["num_train"]:,}' for mean in means])
        ax.set_xlim(min(fractions) / 1.3, max(fractions) * 1.3)
        ax.set_xlabel('training images, share and number')
        ax.set_ylabel('top-1 accuracy (%)')
        figure.legend(loc='outside lower center', ncols=2)
        figure.suptitle(f'{means[0]["method"]}: {results["model"]} on {_last(results["target"])}', fontsize=11)
        return save(figure, folder / 'finetune.png')


def _log_axis(ax: Axes, ticks: list[Any], labels: list[str]) -> None:
    ax.set_xscale('log')
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()


def _last(name: str) -> str:
    """Return the end of a path or of a data set's name, as a label."""
    return literal(Path(name.rstrip('/')).name)
