#!/usr/bin/env python3
"""Images a second through data loading, and through plain training, against timm's own parts doing the same work.

Loading is timed in processor seconds of one process, so that a busy machine does not show; training in seconds,
an epoch of each kind in turn, and the figure is the median over rounds of the ratio to the same round's.

    python benchmarks/throughput.py -c recipes/cifar100_small.yaml --dataset hfds/FOLDER --train-split 'train[:2000]'
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader
from timm.task import ClassificationTask
from torchvision import transforms
from tqdm import tqdm

from ctc_timm.cli.arguments import Parser, parse, positive_int, run_script
from ctc_timm.cli.training_flags import add_arguments
from ctc_timm.data.datasets import open_split
from ctc_timm.data.training_loader import TrainLoader, cached
from ctc_timm.data.transforms import data_config, worker_count
from ctc_timm.training.trainer import Trainer

CPU = torch.device('cpu')


def timms_loader(args: argparse.Namespace, config: dict[str, Any], workers: int) -> Iterable:
    """timm's training loader by the same flags, without indices and seeds."""
    dataset = open_split(args, args.train_split).dataset
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        re_prob=args.reprob,
        interpolation=args.train_interpolation,
        mean=config['mean'],
        std=config['std'],
        num_workers=workers,
        device=CPU,
    )
    if args.crop_padding:
        size = config['input_size'][-2:]
        dataset.transform.transforms.insert(0, transforms.RandomCrop(size, args.crop_padding, pad_if_needed=True))
    return loader


def loading(args: argparse.Namespace, rounds: int) -> dict[str, float]:
    """Images a processor second of one process, by kind."""
    single = argparse.Namespace(**{**vars(args), 'workers': 0})
    config = data_config(args, timm.create_model(args.model, num_classes=args.num_classes or 10))
    source = open_split(args, args.train_split)
    kinds: dict[str, Iterable] = {
        "timm's loader": timms_loader(args, config, 0),
        'this loader': TrainLoader(open_split(args, args.train_split).dataset, single, config, CPU),
        'this loader, --cache-dataset': TrainLoader(cached(args, source, quiet=True).dataset, single, config, CPU),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process; threads that wait for each other would count
    for _ in tqdm(range(rounds), 'loading'):
        for name, loader in kinds.items():
            started, count = time.process_time(), 0
            for images, *_ in loader:
                count += len(images)
            rates[name].append(count / (time.process_time() - started))
    torch.set_num_threads(threads)
    return {name: statistics.median(found) for name, found in rates.items()}


def epoch_of(trainer: Trainer, epoch: int) -> None:
    """One epoch of a run, without its evaluation and its files."""
    trainer._train_epoch(epoch)
    trainer.at.next_epoch()


def training(args: argparse.Namespace, rounds: int) -> dict[str, list[float]]:
    """Seconds an epoch of plain training, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Callable[[int], Any]] = {}
        for name, keep in (('this loop', False), ('this loop, --cache-dataset', True)):
            own = {'mode': 'vanilla', 'output': folder, 'experiment': name, 'cache_dataset': keep}
            trainer = Trainer(argparse.Namespace(**{**vars(args), **own}))
            kinds[name] = partial(epoch_of, trainer)
        config, classes = trainer.config, trainer.num_classes

        task = ClassificationTask(timm.create_model(args.model, num_classes=classes))
        optimizer = torch.optim.SGD(
            task.get_trainable_module().parameters(), lr=0.05, momentum=args.momentum, weight_decay=args.weight_decay
        )
        loader = timms_loader(args, config, worker_count(args))

        def timms_epoch(epoch: int) -> None:
            task.train()
            for images, targets in loader:
                loss = task(images, targets)['loss']
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        kinds = {"timm's parts": timms_epoch, **kinds}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for epoch in tqdm(range(rounds + 1), 'training'):
            for name, run in kinds.items():
                started = time.perf_counter()
                run(epoch)
                if epoch:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    group = parser.add_argument_group('Benchmark')
    group.add_argument('--rounds', type=positive_int, default=5, metavar='N', help='of each kind')
    group.add_argument('--save', default='', metavar='FILE.json', help='keep the numbers')
    args = parse(parser)
    rates = loading(args, args.rounds)
    base = rates['this loader']
    print(f'images a second per core, decode and augmentation ({args.train_split}):')
    for name, rate in rates.items():
        print(f'  {name:30} {rate:8.0f}   {rate / base:5.2f} of this loader')
    seconds = training(args, args.rounds)
    print("plain training, throughput over that of timm's loader and task in a loop:")
    for name, found in seconds.items():
        ratio = statistics.median(plain / own for plain, own in zip(seconds["timm's parts"], found))
        print(f'  {name:30} {statistics.median(found):8.2f} s an epoch   {ratio:5.2f}')
    if args.save:
        Path(args.save).write_text(json.dumps({'loading': rates, 'training': seconds}, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
