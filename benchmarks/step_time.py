#!/usr/bin/env python3
"""Time of a training step with CTC over the time of a supervised one, side by side in one run.

A step is forward, losses, drawing of negatives, backward, SGD with momentum and the banks' update; images are made
beforehand. Every round takes one step of each kind, and the figure is the median over rounds of the ratio within a
round.

    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --output steps.json
    python benchmarks/step_time.py --models cifar_resnet20 cifar_resnet18 --compare steps.json
    python benchmarks/step_time.py --models resnet50 --img-size 224 --batch-size 256 --instances 1281167 \
        --device cuda --amp bfloat16 --channels-last --compile --profile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from typing import Any

import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch.profiler import ProfilerActivity, profile

from ctc_timm import CTCTask
from ctc_timm.models.layout import use_layout
from ctc_timm.utils.memory import keep_freed_memory
from harness import finish, read_flags, timing_table

CLASSES = 100


def train_step(
    task: TrainingTask, batches: list[tuple[torch.Tensor, ...]], args: argparse.Namespace
) -> Callable[[], None]:
    """A function that takes the next step of a task."""
    if args.compile:
        task.compile()
    amp = torch.autocast(args.device, getattr(torch, args.amp or 'bfloat16'), enabled=bool(args.amp))
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    source = cycle(batches)
    task.train()

    def step() -> None:
        with amp:
            loss = task(*next(source))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps_of(model: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The kinds of step to compare, the supervised one first."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)
        index = torch.randint(args.instances, (args.batch_size,), generator=generator)
        batches.append(tuple(tensor.to(device) for tensor in (images, index % CLASSES, index)))
    labels = torch.arange(args.instances) % CLASSES

    def network() -> Any:
        made = timm.create_model(model, num_classes=CLASSES)
        return use_layout(made.to(device), args.channels_last or None, device)

    def ctc(negatives: str, past_features: str = 'model') -> CTCTask:
        options = {'num_negatives': args.num_negatives, 'negatives': negatives, 'past_features': past_features}
        options |= {'temporal_projector': args.temporal_projector}
        return CTCTask(network(), labels, **options, device=device, verbose=False)

    supervised = ClassificationTask(network(), device=device, verbose=False)
    steps = {'supervised': train_step(supervised, [batch[:2] for batch in batches], args)}
    steps['instance'] = train_step(ctc('shared'), batches, args)
    ways = [(negatives, 'model') for negatives in ('sampled', 'shared', 'all')]
    for negatives, past in [*ways, ('shared', 'bank'), ('all', 'bank')]:
        name = f'temporal, {negatives}{", past features of the bank" * (past == "bank")}'
        if any(args.kinds) and name not in args.kinds:
            continue
        task = ctc(negatives, past)
        task.start_temporal_stage([])  # the banks' first values do as well for timing
        steps[name] = train_step(task, batches, args)
    return steps


def print_profile(step: Callable[[], None], device: str) -> None:
    """Print where the time of three steps goes, by operation."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == 'cuda' else [])]
    with profile(activities=kinds) as record:
        for _ in range(3):
            step()
    print(
        record.key_averages().table(
            sort_by=f'self_{"device" if device == "cuda" else "cpu"}_time_total', row_limit=14, max_name_column_width=60
        )
    )


if __name__ == '__main__':
    args = read_flags(
        __doc__, models=['cifar_resnet20', 'cifar_resnet18'], batch_size=64, instances=50_000, num_negatives=16_384,
        img_size=32, temporal_projector='separate', rounds=20, threads=0, device='cpu', amp='', channels_last=False,
        compile=False, kinds=[''], profile=False, output='', compare='',
    )  # fmt: skip
    keep_freed_memory()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    tables = {}
    for model in args.models:
        steps = steps_of(model, args)
        tables[model] = timing_table(steps, args.rounds, model, warmup=2, memory=args.device == 'cuda')
        if args.profile:
            print_profile(list(steps.values())[-1], args.device)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, '
          f'N = {args.instances:,}, K = {args.num_negatives:,}, {args.rounds} rounds')  # fmt: skip
    finish(tables, args)
