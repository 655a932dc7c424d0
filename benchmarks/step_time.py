#!/usr/bin/env python3
"""Time of a training step with CTC over the time of a supervised one, side by side in one run.

A step is forward, losses, drawing of negatives, backward, SGD with momentum and the banks' update; images are made
beforehand. Every round takes one step of each kind, and the figure is the median over rounds of the ratio within a
round.

    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --output steps.json
    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --compare steps.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle

import timm
import torch
from timm.task import ClassificationTask, TrainingTask

from ctc_timm import CTCTask
from harness import finish, read_flags, timing_table

CLASSES = 100


def train_step(task: TrainingTask, batches: list[tuple[torch.Tensor, ...]]) -> Callable[[], None]:
    """A function that takes the next step of a task."""
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    source = cycle(batches)
    task.train()

    def step() -> None:
        loss = task(*next(source))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps_of(model: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The kinds of step to compare, the supervised one first."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)
        index = torch.randint(args.instances, (args.batch_size,), generator=generator)
        batches.append((images, index % CLASSES, index))
    labels = torch.arange(args.instances) % CLASSES

    def ctc(negatives: str, past_features: str = 'model') -> CTCTask:
        options = {'num_negatives': args.num_negatives, 'negatives': negatives, 'past_features': past_features}
        options |= {'temporal_projector': args.temporal_projector}
        return CTCTask(timm.create_model(model, num_classes=CLASSES), labels, **options, verbose=False)

    supervised = ClassificationTask(timm.create_model(model, num_classes=CLASSES), verbose=False)
    steps = {'supervised': train_step(supervised, [batch[:2] for batch in batches])}
    steps['instance'] = train_step(ctc('shared'), batches)
    ways = [(negatives, 'model') for negatives in ('sampled', 'shared', 'all')]
    for negatives, past in [*ways, ('shared', 'bank'), ('all', 'bank')]:
        task = ctc(negatives, past)
        task.start_temporal_stage([])  # the banks' first values do as well for timing
        steps[f'temporal, {negatives}{", past features of the bank" * (past == "bank")}'] = train_step(task, batches)
    return steps


if __name__ == '__main__':
    args = read_flags(
        __doc__, models=['cifar_resnet20', 'cifar_resnet18'], batch_size=64, instances=50_000, num_negatives=16_384,
        img_size=32, temporal_projector='separate', rounds=20, threads=0, output='', compare='',
    )  # fmt: skip
    torch.set_num_threads(args.threads or torch.get_num_threads())
    tables = {model: timing_table(steps_of(model, args), args.rounds, model, warmup=2) for model in args.models}
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, '
          f'N = {args.instances:,}, K = {args.num_negatives:,}, {args.rounds} rounds')  # fmt: skip
    finish(tables, args)
