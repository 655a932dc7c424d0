#!/usr/bin/env python3
"""Time of a training step with CTC over the time of a plain one, side by side in one run.

Every round takes one step of each kind in turn, so that a busy machine slows them alike. A step is forward,
losses, drawing of negatives, backward, SGD with momentum and, in training, the banks' update; images are made
beforehand. The figure is the median over rounds of the ratio to the same round's plain step.

    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
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

    def ctc(negatives: str) -> CTCTask:
        body = timm.create_model(model, num_classes=CLASSES)
        return CTCTask(body, labels, num_negatives=args.num_negatives, negatives=negatives, verbose=False)

    kinds = {
        'vanilla': stepper(
            ClassificationTask(timm.create_model(model, num_classes=CLASSES), verbose=False), batches, contrast=False
        ),
        'instance': stepper(ctc('shared'), batches, contrast=True),
    }
    for negatives in ('sampled', 'shared'):
        task = ctc(negatives)
        task.start_temporal_stage([])  # the banks' first values do as well for timing
        kinds[f'temporal, {negatives}'] = stepper(task, batches, contrast=True)
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
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    for model in args.models:
        kinds = tasks(model, args)
        for step in kinds.values():
            step(0)
            step(1)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in tqdm(range(args.rounds), model, leave=False):
            for kind, step in kinds.items():
                start = time.perf_counter()
                step(i)
                seconds[kind].append(time.perf_counter() - start)
        numbers[model] = {}
        for kind, times in seconds.items():
            ratios = [t / plain for t, plain in zip(times, seconds['vanilla'])]
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            numbers[model][kind] = {
                'ratio': statistics.median(ratios),
                'quarter': quarters[0],
                'three_quarters': quarters[2],
                'milliseconds': statistics.median(times) * 1e3,
            }
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, '
          f'N = {args.instances:,}, K = {args.num_negatives:,}, {args.rounds} rounds\n')  # fmt: skip
    print('| model | step | over vanilla | middle half of rounds | ms |\n| --- | --- | --- | --- | --- |')
    for model, kinds_of in numbers.items():
        for kind, n in kinds_of.items():
            middle = f'{n["quarter"]:.2f} to {n["three_quarters"]:.2f}'
            print(f'| {model} | {kind} | {n["ratio"]:.2f} | {middle} | {n["milliseconds"]:.0f} |')
    if args.output:
        Path(args.output).write_text(json.dumps({'settings': vars(args), 'numbers': numbers}, indent=2) + '\n')


if __name__ == '__main__':
    main()
