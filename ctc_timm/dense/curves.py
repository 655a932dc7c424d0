"""The picture of a dense run: its loss and its metrics over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..measure.plots.style import BLUE, COLORS, GREEN, MARKERS, drawing, literal, save
from ..runs import Run

# isort: split
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


def plot_fitting(run: Run, columns: Sequence[str]) -> Path:
    """Draw training loss, metrics and learning rate of each epoch.

    Args:
        run: The run's folder.
        columns: Metrics of summary.csv, without eval_.

    Returns:
        plots/training.png.
    """
    rows = run.rows()
    epochs = [int(row['epoch']) for row in rows]
    with drawing():
        figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(7, 8), sharex=True)
        top.plot(epochs, [float(row['train_loss']) for row in rows], color=BLUE)
        top.set_ylabel('training loss')
        for i, name in enumerate(columns):
            seen = [row for row in rows if row.get(f'eval_{name}')]
            if not seen:  # say, no object of that size
                continue
            x, y = [int(row['epoch']) for row in seen], [float(row[f'eval_{name}']) for row in seen]
            look = {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)], 'markersize': 3}
            middle.plot(x, y, label=literal(name), **look)
        middle.set_ylabel('validation')
        middle.legend(ncols=2, fontsize=8)
        bottom.plot(epochs, [float(row['lr']) for row in rows], color=GREEN, drawstyle='steps-mid')
        bottom.set_ylabel('learning rate')
        bottom.set_xlabel('epoch')
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(literal(run.path.name), fontsize=11)
        return save(figure, run.plots / 'training.png')
