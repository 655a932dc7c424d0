#!/usr/bin/env python3
"""Calibration of the estimators of mutual information, as in docs/information.md.

    python benchmarks/information.py                      # prints the tables
    python benchmarks/information.py --picture docs/information.png

Rows that the output file holds already are not measured again. Seconds are CPU time on one thread.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctc_timm.measure.information import create_estimator
from ctc_timm.measure.neural import donsker_varadhan
from ctc_timm.measure.plots.style import GRAY, drawing, look, plt, save
from ctc_timm.measure.results import write_json
from harness import Table, read_flags, show

FIELDS = ('part', 'estimator', 'sample', 'images', 'truth', 'seed', 'nats', 'standard_error', 'seconds')
COLUMNS = ('mean', 'bias', 'bias, %', 'spread over seeds', 'error claimed', 'seconds')
OPTIONS: dict[str, dict[str, Any]] = {'': {}, 'in-sample': {'held_out': 0.0}, 'shuffles=1': {'shuffles': 1}}
TEN, LOW = ([('gaussian', nats) for nats in levels] for levels in ((2, 4, 6, 8, 10), (0, 2, 6)))
# Symbols M and share p flipped, and log M + (1 - p) log(1 - p) + p log(p / (M - 1)) nats.
CHANNELS = [('10/0.9', 0.0), ('10/0.1', 1.7578), ('100/0.2', 3.1857)]
# Part, estimator with its key of `OPTIONS`, images, samples with their nats, seeds.
ROWS: list[tuple[str, str, int, Any, int]] = [
    *(('gaussian', name, images, TEN, 3) for name, images in (('mine', 50_000), ('renyi', 2000))),
    ('gaussian', 'mine, in-sample', 50_000, TEN[:3:2], 2),
    *(('finite', name, images, LOW, 2) for name in ('mine', 'mine, in-sample') for images in (2000, 10_000)),
    *(('finite', name, 2000, LOW, 2) for name in ('renyi', 'renyi, shuffles=1')),
    ('channel', 'mine', 10_000, CHANNELS, 2),
    *(('channel', name, 2000, CHANNELS, 2) for name in ('renyi', 'renyi, shuffles=1')),
    *(('exact', 'true density ratio', images, TEN, 1) for images in (512, 1024, 5000)),
]


def gaussians(nats: float, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw x and t, [N, 20], with I = -20 / 2 * log(1 - correlation^2)."""
    noise = math.exp(-nats / 20)
    x, independent = torch.randn(2, images, 20, generator=torch.Generator().manual_seed(1000 + seed))
    return x, math.sqrt(1 - noise**2) * x + noise * independent


def channel(symbols: int, flip: float, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw features [N, 64], the received symbols' random unit codes with a little noise, and the labels sent, [N]."""
    generator = torch.Generator().manual_seed(2000 + seed)
    labels = torch.randint(symbols, (images,), generator=generator)
    other = (labels + torch.randint(1, symbols, (images,), generator=generator)) % symbols
    received = torch.where(torch.rand(images, generator=generator) < flip, other, labels)
    codes = torch.nn.functional.normalize(torch.randn(symbols, 64, generator=generator), dim=1)
    return codes[received] + 0.1 * torch.randn(images, 64, generator=generator), labels


def exact(truth: float, batch: int, seed: int) -> float:
    """Compute Donsker and Varadhan's bound on a batch of Gaussians for the best of all critics."""
    (x, t), noise = gaussians(truth, batch, seed), math.exp(-truth / 20)
    pairs = ((y, (y - math.sqrt(1 - noise**2) * x) / noise) for y in (t, t.roll(1, dims=0)))
    joint_B, marginal_B = (truth + (y.square() - error.square()).sum(dim=1) / 2 for y, error in pairs)
    return float(donsker_varadhan(joint_B, marginal_B))


def measure(part: str, estimator: str, sample: str, images: int, truth: float, seed: int) -> tuple[float, ...]:
    """Measure a row: nats, their standard error and seconds of an estimator on one sample."""
    (name, _, variant), (symbols, _, flip) = estimator.partition(', '), sample.partition('/')
    x, t = channel(int(symbols), float(flip), images, seed) if flip else gaussians(truth, images, seed)
    start = time.process_time()
    if part == 'exact':
        values = [exact(truth, images, i) for i in range(200)]
        nats, error = fmean(values), stdev(values) / math.sqrt(200)
    else:
        estimate = create_estimator(name, **OPTIONS[variant], seed=seed).estimate(x, t)
        nats, error = estimate.nats, estimate.standard_error
    return round(nats, 4), round(error, 4), round(time.process_time() - start, 2)


if __name__ == '__main__':
    args = read_flags(__doc__, output=Path('docs/results/information.json'), picture='')
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {'rows': []}
    known = {tuple(row[field] for field in FIELDS[:6]): row for row in results['rows']}
    tables: dict[str, Table] = {part: {} for part, *_ in ROWS}
    with drawing():
        figure, axes = plt.subplots(figsize=(5.2, 4.4))
        axes.plot([2, 10], [2, 10], color=GRAY, linestyle=':', label='truth')
        for i, (part, estimator, images, levels, seeds) in enumerate(tqdm(ROWS, 'calibration', disable=None)):
            curve = []
            for sample, truth in levels:
                keys = [(part, estimator, sample, images, truth, seed) for seed in range(seeds)]
                for key in keys:
                    if key not in known:
                        known[key] = dict(zip(FIELDS, (*key, *measure(*key))))
                        write_json(args.output, {**results, 'rows': list(known.values()), 'torch': torch.__version__})
                mean, error, cost = (fmean(known[key][name] for key in keys) for name in FIELDS[6:])
                spread = stdev(known[key]['nats'] for key in keys) if seeds > 1 else None
                percent = 100 * (mean / truth - 1) if truth else None
                line = dict(zip(COLUMNS, (mean, mean - truth, percent, spread, error, cost)))
                tables[part][f'{estimator}, {sample}, N = {images:,}, {truth:.2f} nats'] = line
                curve.append((truth, mean))
            if part == 'gaussian' and ',' not in estimator:
                axes.plot(*zip(*curve), label=estimator, **look(i))
        show({**tables, 'cost of a checkpoint, measured once': results.get('cost', {})})
        axes.set(xlabel='true information (nats)', ylabel='estimate (nats)', title='Correlated Gaussians, 2 x 20')
        axes.legend(loc='upper left')
        if args.picture:
            save(figure, args.picture)
