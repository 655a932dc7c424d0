#!/usr/bin/env python3
"""Time of a training step with CTC over the time of a plain one, side by side in one run.

Every round takes one step of each kind in turn, so that a busy machine slows them alike. A step is forward,
losses, drawing of negatives, backward, SGD with momentum and, in training, the banks' update; images are made
beforehand. The figure is the median over rounds of the ratio to the same round's plain step.

    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --output steps.json
    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --compare steps.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from tables import Tables, finish
from timm.task import ClassificationTask
from tqdm import tqdm

from ctc_timm import CTCTask

CLASSES = 100


def stepper(task: torch.nn.Module, batches: list, contrast: bool) -> Callable[[int], None]:
    """A function that takes the i-th step of a task."""
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    task.train()

    def step(i: int) -> None:
        images, targets, index = batches[i % len(batches)]
        result = task(images, targets, index) if contrast else task(images, targets)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()

    return step


def tasks(model: str, args: argparse.Namespace) -> dict[str, Callable[[int], None]]:
    """The kinds of step to compare, the plain one first."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)
        index = torch.randint(args.instances, (args.batch_size,), generator=generator)
        batches.append((images, index % CLASSES, index))
    labels = torch.arange(args.instances) % CLASSES

    def ctc(negatives: str, past_features: str = 'model') -> CTCTask:
        body = timm.create_model(model, num_classes=CLASSES)
        options = {'num_negatives': args.num_negatives, 'negatives': negatives, 'past_features': past_features}
        return CTCTask(body, labels, **options, verbose=False)

    kinds = {
        'vanilla': stepper(
            ClassificationTask(timm.create_model(model, num_classes=CLASSES), verbose=False), batches, contrast=False
        ),
        'instance': stepper(ctc('shared'), batches, contrast=True),
    }
    ways = [(negatives, 'model') for negatives in ('sampled', 'shared', 'all')]
    for negatives, past_features in [*ways, ('shared', 'bank'), ('all', 'bank')]:
        task = ctc(negatives, past_features)
        task.start_temporal_stage([])  # the banks' first values do as well for timing
        past = ', past features of the bank' if past_features == 'bank' else ''
        kinds[f'temporal, {negatives}{past}'] = stepper(task, batches, contrast=True)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['cifar_resnet20', 'cifar_resnet18'])
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--instances', type=int, default=50_000, help='N')
    parser.add_argument('--num-negatives', type=int, default=16_384, help='K')
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--threads', type=int, default=0, help='processor threads, 0 for all')
    parser.add_argument('--output', default='', help='JSON file for the numbers')
    parser.add_argument('--compare', default='', help='JSON file of an earlier --output')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tables: Tables = {}
    for model in args.models:
        kinds = tasks(model, args)
        for step in kinds.values():
            step(0)
            step(1)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in tqdm(range(args.rounds), model, leave=False, disable=None):
            for kind, step in kinds.items():
                start = time.perf_counter()
                step(i)
                seconds[kind].append(time.perf_counter() - start)
        tables[model] = {}
        for kind, times in seconds.items():
            ratios = [t / plain for t, plain in zip(times, seconds['vanilla'])]
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            tables[model][kind] = {
                'over vanilla': statistics.median(ratios),
                'lower quarter': quarters[0],
                'upper quarter': quarters[2],
                'ms': statistics.median(times) * 1e3,
            }
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, '
          f'N = {args.instances:,}, K = {args.num_negatives:,}, {args.rounds} rounds')  # fmt: skip
    finish(tables, vars(args), args.output, args.compare)


if __name__ == '__main__':
    main()
