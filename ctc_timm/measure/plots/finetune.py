"""The picture of fine-tuning: accuracy against the part of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .style import BLUE, GRAY, drawing, literal, save

# isort: split
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator


def plot_finetune(results: dict[str, Any], folder: Path) -> Path:
    """Draw top-1 accuracy against training fraction: each run, and the mean of each fraction with its interval.

    Args:
        results: What results.json holds: target, rows, summary.
        folder: Where the picture goes.

    Returns:
        finetune.png.
    """
    means = results['summary']
    several = any(mean['seeds'] > 1 for mean in means)
    fractions = [mean['train_fraction'] for mean in means]
    if several:
        label, ends = 'mean over seeds, 95% interval', means
    else:
        label, ends = 'a run, 95% interval over test images', results['rows']
    below, above = zip(*(_lengths(end) for end in ends))
    with drawing():
        figure, ax = plt.subplots(figsize=(6, 4))
        ax.errorbar(
            fractions,
            [mean['top1'] for mean in means],
            yerr=(below, above),
            color=BLUE,
            marker='o',
            capsize=4,
            label=label,
        )
        if several:
            runs = [(row['train_fraction'], row['top1']) for row in results['rows']]
            ax.plot(*zip(*runs), color=GRAY, marker='x', linestyle='none', label='a run')
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 101))  # the interval of two seeds can reach far beyond
        ax.set_xscale('log')
        ax.set_xlim(min(fractions) / 1.3, max(fractions) * 1.3)
        ax.xaxis.set_major_locator(FixedLocator(fractions))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f'{100 * mean["train_fraction"]:g}%\n{mean["num_train"]:,}' for mean in means])
        ax.set_xlabel('training images, share and number')
        ax.set_ylabel('top-1 accuracy (%)')
        figure.legend(loc='outside lower center', ncols=2)
        target = results['target'].rstrip('/').split('/')[-1]
        figure.suptitle(f'{means[0]["method"]}: {results["model"]} on {literal(target)}', fontsize=11)
        return save(figure, folder / 'finetune.png')


def _lengths(row: dict[str, Any]) -> tuple[float, float]:
    """Of the interval below and above a value; none where there is no interval."""
    if row['top1_low'] is None:
        return 0.0, 0.0
    return max(row['top1'] - row['top1_low'], 0.0), max(row['top1_high'] - row['top1'], 0.0)
