"""The picture of fine-tuning: accuracy against the part of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from .style import BLUE, GRAY, drawing, error_lengths, literal, plt, save


def plot_finetune(results: dict[str, Any], folder: Path) -> Path:
    """Draw top-1 accuracy against training fraction: each run, and the mean of each fraction with its interval.

    Args:
        results: What results.json holds: target, rows, summary.
        folder: Where the picture goes.

    Returns:
        finetune.png.
    """
    means, rows = results['summary'], results['rows']
    several = any(mean['seeds'] > 1 for mean in means)
    fractions = [mean['train_fraction'] for mean in means]
    label = 'mean over seeds, 95% interval' if several else 'a run, 95% interval over test images'
    lengths = error_lengths(means if several else rows)
    with drawing():
        figure, ax = plt.subplots(figsize=(6, 4))
        style: dict[str, Any] = {'color': BLUE, 'marker': 'o', 'capsize': 4}
        ax.errorbar(fractions, [mean['top1'] for mean in means], yerr=lengths, label=label, **style)
        if several:
            runs = [row['train_fraction'] for row in rows], [row['top1'] for row in rows]
            ax.plot(*runs, color=GRAY, marker='x', linestyle='none', label='a run')
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
