#!/usr/bin/env python3
"""Calibration of the estimators of mutual information, and what they cost.

    gaussian   correlated Gaussians in 2 x 20 dimensions with 2 to 10 nats, 50,000 samples
    finite     the same with as few samples as a test split has, 2,000 and 10,000, and 0, 2 or 6 nats
    channel    symmetric channels over M symbols: labels y, and features that are a noisy code of the received symbol
    exact      Donsker and Varadhan's bound with the true density ratio for critic, on batches of 512 to 5,000
    cost       seconds a checkpoint takes; for long trainings from 20 steps

    python benchmarks/information.py                      # prints the tables of docs/information.md
    python benchmarks/information.py --picture docs/information.png
    python benchmarks/information.py --quick              # a few minutes, to see that all works

Rows that the output file holds already are not measured again. Seconds are processor time on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ctc_timm.measure.bounds import donsker_varadhan
from ctc_timm.measure.information import create_estimator
from ctc_timm.measure.plots.style import COLORS, GRAY, MARKERS, drawing, plt, save

DIMENSION = 20
CODE_DIM, CODE_NOISE = 64, 0.1
# What a row's estimator is created with, by the name in the table.
VARIANTS: dict[str, dict[str, Any]] = {
    'mine': {},
    'mine, in-sample': {'held_out': 0.0},
    'infonce': {},
    'smile': {},
    'renyi': {},
    'renyi, shuffles=1': {'shuffles': 1},
}


class Case(NamedTuple):
    """One row: an estimator on one sample."""

    part: str
    estimator: str
    sample: str  # 'gaussian' or 'M/flip' of a channel
    images: int
    truth: float
    seed: int


def gaussians(nats: float, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and t, [N, 20], with I = -20 / 2 * log(1 - correlation^2)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = math.exp(-nats / DIMENSION)
    x, own = torch.randn(2, images, DIMENSION, generator=generator)
    return x, math.sqrt(1 - noise**2) * x + noise * own


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
    few = range(min(seeds, 2))
    for estimator in ('mine', 'infonce', 'smile', 'renyi'):
        images = 2000 if estimator == 'renyi' else 50_000
        for truth in (2, 4, 6, 8, 10):
            yield from (Case('gaussian', estimator, 'gaussian', images, truth, seed) for seed in range(seeds))
    for truth in (2, 6):
        yield from (Case('gaussian', 'mine, in-sample', 'gaussian', 50_000, truth, seed) for seed in few)
    for estimator, images in (
        ('mine', 2000), ('mine', 10_000), ('mine, in-sample', 2000), ('mine, in-sample', 10_000), ('infonce', 2000),
        ('smile', 2000), ('renyi', 2000), ('renyi, shuffles=1', 2000),
    ):  # fmt: skip
        for truth in (0, 2, 6):
            yield from (Case('finite', estimator, 'gaussian', images, truth, seed) for seed in few)
    for estimator in ('mine', 'infonce', 'smile', 'renyi', 'renyi, shuffles=1'):
        images = 2000 if estimator.startswith('renyi') else 10_000
        for symbols, flip in ((10, 0.9), (10, 0.1), (100, 0.2)):
            truth = round(channel_nats(symbols, flip), 4) + 0.0
            yield from (Case('channel', estimator, f'{symbols}/{flip}', images, truth, seed) for seed in few)
    for images in (512, 1024, 5000):
        yield from (Case('exact', 'true density ratio', 'gaussian', images, truth, 0) for truth in (2, 4, 6, 8, 10))


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


def measured(case: Case, quick: bool) -> dict[str, Any]:
    """One row of the results."""
    if case.part == 'exact':
        start = time.process_time()
        nats, error = exact(case.truth, case.images, 20 if quick else 200)
        return {**case._asdict(), 'nats': round(nats, 4), 'standard_error': round(error, 4),
                'seconds': round(time.process_time() - start, 2)}  # fmt: skip
    if case.sample == 'gaussian':
        x, t = gaussians(case.truth, case.images, case.seed)
    else:
        symbols, flip = case.sample.split('/')
        x, t = channel(int(symbols), float(flip), case.images, case.seed)
    options = dict(VARIANTS[case.estimator], seed=case.seed)
    name = case.estimator.split(',')[0]
    if quick and name != 'renyi':
        options.update(steps=200, window=50)
    start = time.process_time()
    estimate = create_estimator(name, **options).estimate(x, t)
    seconds = time.process_time() - start
    return {**case._asdict(), 'nats': round(estimate.nats, 4), 'standard_error': round(estimate.standard_error, 4),
            'seconds': round(seconds, 2)}  # fmt: skip


def costs() -> Iterator[tuple[str, str, dict[str, Any], tuple[int, ...], int, int]]:
    """What is timed: name, estimator, options, shape of x, D (0 for labels), N."""
    pixels = (3, 32, 32)
    for D in (64, 512):
        yield f'renyi, I(X;T), D={D}', 'renyi', {}, pixels, D, 2000
        yield f'renyi, I(T;Y), D={D}', 'renyi', {}, (D,), 0, 2000
    for name in ('mine', 'infonce', 'smile'):
        yield f'{name}, I(X;T), D=64', name, {}, pixels, 64, 10_000
        yield f'{name}, I(T;Y), D=64', name, {}, (64,), 0, 10_000
    yield 'mine published_xt, D=64', 'mine', {'preset': 'published_xt'}, pixels, 64, 10_000
    yield 'mine published_ty, D=64', 'mine', {'preset': 'published_ty'}, (64,), 0, 10_000


def cost(name: str, options: dict[str, Any], shape: tuple[int, ...], D: int, images: int) -> dict[str, Any]:
    """Processor seconds of an estimate, and whether they were reckoned from the first 20 steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, *shape, generator=generator)
    t = torch.rand(images, D, generator=generator) if D else torch.arange(images) % 10
    steps = getattr(create_estimator(name, **options), 'training', None)
    marks: list[float] = []
    estimator = create_estimator(name, **options, **({'steps': 21, 'window': 20} if steps else {}))
    start = time.process_time()
    estimator.estimate(x, t, progress=lambda done, of: marks.append(time.process_time()))
    if not steps:
        return {'seconds': round(time.process_time() - start, 2), 'steps': 0}
    per_step = (marks[-1] - marks[0]) / (len(marks) - 1)
    return {'seconds': round(per_step * steps.steps, 1), 'steps': steps.steps, 'seconds_a_step': round(per_step, 4)}


def calibration_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for all seeds of an estimator at one truth."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row['estimator'], row['sample'], row['images'], row['truth']), []).append(row)
    lines = [
        '| estimator | sample | N | truth | mean | bias | bias, % | spread over seeds | error claimed | seconds |',
        '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for (estimator, sample, images, truth), group in groups.items():
        values = [row['nats'] for row in group]
        mean = statistics.mean(values)
        spread = f'{statistics.stdev(values):.3f}' if len(values) > 1 else ''
        percent = f'{100 * (mean - truth) / truth:+.0f}' if truth else ''
        claimed, seconds = (statistics.mean(row[key] for row in group) for key in ('standard_error', 'seconds'))
        lines.append(
            f'| {estimator} | {sample} | {images:,} | {truth:.2f} | {mean:.2f} | {mean - truth:+.2f} | {percent} '
            f'| {spread} | {claimed:.3f} | {seconds:.1f} |'
        )
    return '\n'.join(lines)


def cost_table(measurements: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a checkpoint costs."""
    lines = ['| what | steps | ms a step | a checkpoint |', '| --- | ---: | ---: | ---: |']
    for name, row in measurements.items():
        step = f'{1e3 * row["seconds_a_step"]:.0f}' if row['steps'] else ''
        seconds = row['seconds']
        whole = f'{seconds / 3600:.1f} h' if seconds > 3600 else f'{seconds:.1f} s'
        lines.append(f'| {name} | {row["steps"] or ""} | {step} | {whole} |')
    return '\n'.join(lines)


def draw(rows: list[dict[str, Any]], picture: str) -> None:
    """Estimates against known information, for the large Gaussian samples."""
    with drawing():
        figure, axes = plt.subplots(figsize=(5.2, 4.4))
        axes.plot([2, 10], [2, 10], color=GRAY, linestyle=':', label='truth')
        for name, color, marker in zip(('mine', 'infonce', 'smile', 'renyi'), COLORS, MARKERS):
            chosen = [row for row in rows if row['part'] == 'gaussian' and row['estimator'] == name]
            truths = sorted({row['truth'] for row in chosen})
            means = [statistics.mean(row['nats'] for row in chosen if row['truth'] == truth) for truth in truths]
            axes.plot(truths, means, color=color, marker=marker, label=name)
        axes.axhline(math.log(512), color=GRAY, linewidth=1, linestyle='--')
        axes.text(2, math.log(512) + 0.1, "log 512, infonce's ceiling", color=GRAY, fontsize=9)
        axes.set(xlabel='true information (nats)', ylabel='estimate (nats)', title='Correlated Gaussians, 2 x 20')
        axes.legend(loc='upper left', bbox_to_anchor=(0, 0.98))
        save(figure, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('gaussian', 'finite', 'channel', 'exact', 'cost')
    parser.add_argument('--parts', nargs='+', default=parts, choices=parts)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--quick', action='store_true', help='one seed and 200 steps; writes nothing')
    parser.add_argument('--output', default='docs/results/information.json', help='JSON file to continue')
    parser.add_argument('--picture', default='', metavar='PNG', help='draw the Gaussians from the output file')
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(args.output)
    results: dict[str, Any] = {'rows': [], 'cost': {}}
    if path.exists() and not args.quick:
        results = json.loads(path.read_text())

    order = {tuple(case): position for position, case in enumerate(cases(args.seeds))}

    def write() -> None:
        if args.quick:
            return
        results['torch'] = torch.__version__
        results['rows'].sort(key=lambda row: order.get(tuple(row[field] for field in Case._fields), len(order)))
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ',\n'.join(f'    {json.dumps(row)}' for row in results['rows'])
        rest = {key: value for key, value in results.items() if key != 'rows'}
        path.write_text(json.dumps(rest, indent=2)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n')

    done = {tuple(row[field] for field in Case._fields) for row in results['rows']}
    wanted = [case for case in cases(1 if args.quick else args.seeds) if case.part in args.parts]
    for case in tqdm([case for case in wanted if tuple(case) not in done], 'calibration', disable=None):
        results['rows'].append(measured(case, args.quick))
        write()
    if 'cost' in args.parts:
        for name, *what in tqdm(list(costs()), 'cost', disable=None):
            published = 'published' in name
            if name not in results['cost'] and not (args.quick and published):
                results['cost'][name] = cost(*what)
                write()

    write()
    print(f'torch {torch.__version__}, one thread')
    for part in args.parts:
        rows = [row for row in results['rows'] if row['part'] == part]
        print(f'\n## {part}\n\n{cost_table(results["cost"]) if part == "cost" else calibration_table(rows)}')
    if args.picture:
        draw(results['rows'], args.picture)


if __name__ == '__main__':
    main()
