#!/usr/bin/env python3
"""Calibration of the estimators of mutual information.

    gaussian   correlated Gaussians in 2 x 20 dimensions with 2 to 10 nats, 50,000 samples
    finite     the same with as few samples as a test split has, 2,000 and 10,000, and 0, 2 or 6 nats
    channel    symmetric channels over M symbols: labels y, and features that are a noisy code of the received symbol
    exact      Donsker and Varadhan's bound with the true density ratio for critic, on batches of 512 to 5,000

    python benchmarks/information.py                      # prints the tables of docs/information.md
    python benchmarks/information.py --picture docs/information.png
    python benchmarks/information.py --parts exact --output exact.json

Rows that the output file holds already are not measured again. Seconds are CPU time on one thread.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Table, read_flags, show
from torch import Tensor
from tqdm import tqdm

from ctc_timm.measure.information import create_estimator
from ctc_timm.measure.neural import donsker_varadhan
from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save
from ctc_timm.measure.results import write_json

DIMENSION = 20
CODE_DIM, CODE_NOISE = 64, 0.1
Case = tuple[str, str, str, int, float, int]
FIELDS = ('part', 'estimator', 'sample', 'images', 'truth', 'seed')  # sample: 'gaussian' or 'M/flip' of a channel
ESTIMATORS = ('mine', 'infonce', 'smile', 'renyi')
PARTS = ['gaussian', 'finite', 'channel', 'exact']
# Options of a row's estimator, by what follows its name in the table.
OPTIONS: dict[str, dict[str, Any]] = {'': {}, 'in-sample': {'held_out': 0.0}, 'shuffles=1': {'shuffles': 1}}
TEN, LOW, CHANNELS, ALL = (2, 4, 6, 8, 10), (0, 2, 6), ('10/0.9', '10/0.1', '100/0.2'), 10**6
# Part, estimator, images, levels of nats or channels, most seeds.
ROWS: list[tuple[str, str, int, tuple[Any, ...], int]] = [
    *(('gaussian', name, 50_000, TEN, ALL) for name in ESTIMATORS[:3]),
    ('gaussian', 'renyi', 2000, TEN, ALL),
    ('gaussian', 'mine, in-sample', 50_000, (2, 6), 2),
    *(('finite', name, images, LOW, 2) for name in ('mine', 'mine, in-sample') for images in (2000, 10_000)),
    *(('finite', name, 2000, LOW, 2) for name in ('infonce', 'smile', 'renyi', 'renyi, shuffles=1')),
    *(('channel', name, 10_000, CHANNELS, 2) for name in ESTIMATORS[:3]),
    *(('channel', name, 2000, CHANNELS, 2) for name in ('renyi', 'renyi, shuffles=1')),
    *(('exact', 'true density ratio', images, TEN, 1) for images in (512, 1024, 5000)),
]


def gaussians(nats: float, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and t, [N, 20], with I = -20 / 2 * log(1 - correlation^2)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = math.exp(-nats / DIMENSION)
    x, independent = torch.randn(2, images, DIMENSION, generator=generator)
    return x, math.sqrt(1 - noise**2) * x + noise * independent


def channel_nats(symbols: int, flip: float) -> float:
    """log M + (1 - p) log(1 - p) + p log(p / (M - 1)), for symbols sent equally often."""
    return math.log(symbols) + (1 - flip) * math.log(1 - flip) + flip * math.log(flip / (symbols - 1))


def channel(symbols: int, flip: float, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and labels [N]: a label is received as another symbol with probability `flip`.

    A feature vector is the received symbol's random unit code and noise, small enough that the symbol can be read off.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    labels = torch.randint(symbols, (images,), generator=generator)
    other = (labels + torch.randint(1, symbols, (images,), generator=generator)) % symbols
    received = torch.where(torch.rand(images, generator=generator) < flip, other, labels)
    codes = torch.nn.functional.normalize(torch.randn(symbols, CODE_DIM, generator=generator), dim=1)
    return codes[received] + CODE_NOISE * torch.randn(images, CODE_DIM, generator=generator), labels


def cases(seeds: int) -> Iterator[Case]:
    """Every row of the calibration; fewer seeds and levels where a variant is only to be placed beside its parent."""
    for part, estimator, images, levels, most in ROWS:
        for level in levels:
            symbols, _, flip = str(level).partition('/')
            truth = round(channel_nats(int(symbols), float(flip)), 4) + 0.0 if flip else level
            for seed in range(min(seeds, most)):
                yield part, estimator, str(level) if flip else 'gaussian', images, truth, seed


def exact(truth: float, batch: int, batches: int) -> tuple[float, float]:
    """Mean and standard error of Donsker and Varadhan's bound on batches, for Gaussians and the best of all critics."""
    noise = math.exp(-truth / DIMENSION)

    def ratio(x: Tensor, t: Tensor) -> Tensor:
        error = (t - math.sqrt(1 - noise**2) * x) / noise
        return truth + (t.square() - error.square()).sum(dim=1) / 2

    values = []
    for seed in range(batches):
        x, t = gaussians(truth, batch, seed)
        values.append(float(donsker_varadhan(ratio(x, t), ratio(x, t.roll(1, dims=0)))))
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(batches)


def measure(case: Case) -> dict[str, Any]:
    """One row of the results."""
    part, estimator, sample, images, truth, seed = case
    name, _, variant = estimator.partition(', ')
    symbols, _, flip = sample.partition('/')
    start = time.process_time()
    if part == 'exact':
        nats, error = exact(truth, images, 200)
    else:
        x, t = channel(int(symbols), float(flip), images, seed) if flip else gaussians(truth, images, seed)
        start = time.process_time()
        estimate = create_estimator(name, **OPTIONS[variant], seed=seed).estimate(x, t)
        nats, error = estimate.nats, estimate.standard_error
    numbers = {'nats': round(nats, 4), 'standard_error': round(error, 4)}
    return {**dict(zip(FIELDS, case)), **numbers, 'seconds': round(time.process_time() - start, 2)}


def calibration(rows: Iterable[dict[str, Any]]) -> Table:
    """One row for all seeds of an estimator at one truth."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sample = f'{row["estimator"]}, {row["sample"]}, N = {row["images"]:,}, {row["truth"]:.2f} nats'
        groups.setdefault(sample, []).append(row)
    table: Table = {}
    for sample, group in groups.items():
        nats, truth = [row['nats'] for row in group], group[0]['truth']
        table[sample] = {'mean': (mean := statistics.fmean(nats)), 'bias': mean - truth}
        table[sample]['bias, %'] = 100 * (mean - truth) / truth if truth else None
        table[sample]['spread over seeds'] = statistics.stdev(nats) if len(nats) > 1 else None
        for name in ('standard_error', 'seconds'):
            table[sample][name] = statistics.fmean(row[name] for row in group)
    return table


def draw(rows: list[dict[str, Any]], picture: str) -> None:
    """Estimates against known information, for the large Gaussian samples."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.2, 4.4))
        axes.plot([2, 10], [2, 10], color=GRAY, linestyle=':', label='truth')
        for name, color, marker in zip(ESTIMATORS, COLORS, MARKERS):
            chosen = [row for row in rows if row['part'] == 'gaussian' and row['estimator'] == name]
            truths = sorted({row['truth'] for row in chosen})
            means = [statistics.mean(row['nats'] for row in chosen if row['truth'] == truth) for truth in truths]
            axes.plot(truths, means, color=color, marker=marker, label=name)
        axes.axhline(math.log(512), color=GRAY, linewidth=1, linestyle='--')
        axes.text(2, math.log(512) + 0.1, "log 512, infonce's ceiling", color=GRAY, fontsize=9)
        axes.set(xlabel='true information (nats)', ylabel='estimate (nats)', title='Correlated Gaussians, 2 x 20')
        axes.legend(loc='upper left', bbox_to_anchor=(0, 0.98))
        save(figure, picture)


if __name__ == '__main__':
    args = read_flags(__doc__, parts=PARTS, seeds=3, output=Path('docs/results/information.json'), picture='')
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {'rows': []}
    known = {tuple(row[field] for field in FIELDS): row for row in results['rows']}

    def write() -> None:
        write_json(args.output, {**results, 'rows': list(known.values()), 'torch': torch.__version__})

    wanted = [case for case in cases(args.seeds) if case[0] in args.parts and case not in known]
    for case in tqdm(wanted, 'calibration', disable=None):
        known[case] = measure(case)
        write()
    print(f'torch {torch.__version__}, one thread')
    for part in args.parts:
        rows = [row for row in known.values() if row['part'] == part]
        show({part: calibration(rows)})
    if 'cost' in results:
        show({'cost of a checkpoint, measured once': results['cost']})
    if args.picture:
        draw(list(known.values()), args.picture)
