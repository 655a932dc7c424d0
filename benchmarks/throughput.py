#!/usr/bin/env python3
"""Images a second through data loading, and through supervised training, against timm's own parts doing the same work.

Loading is timed in CPU seconds of one process, so that other work on the machine does not show; training in seconds, an
epoch of each kind a round. Figures are medians over rounds, of ratios within a round.

    python benchmarks/throughput.py -c cifar100_small --dataset hfds/FOLDER --train-split 'train[:2000]'
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import timm
import torch
from harness import Step, main_of, median_ratio, paired_seconds, show
from timm.data import create_loader
from timm.task import ClassificationTask
from torchvision import transforms

from ctc_timm.cli.flags import Parser, add_settings, read_flags
from ctc_timm.data.cached import cache_split
from ctc_timm.data.datasets import open_split
from ctc_timm.data.loaders import TrainLoader
from ctc_timm.data.transforms import data_config, worker_count
from ctc_timm.training.build import build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.settings import build, replace
from ctc_timm.utils.yaml_files import read_recipe

CPU = torch.device('cpu')


def timms_loader(settings: TrainSettings, config: dict[str, Any], workers: int) -> Iterable:
    """timm's training loader by the same settings, without indices and seeds."""
    dataset, augmentation = open_split(settings.data, settings.data.train_split).dataset, settings.augmentation
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=settings.loader.batch_size,
        is_training=True,
        no_aug=augmentation.no_aug,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.aa,
        re_prob=augmentation.reprob,
        interpolation=augmentation.train_interpolation,
        mean=config['mean'],
        std=config['std'],
        num_workers=workers,
        device=CPU,
    )
    if augmentation.crop_padding:
        crop = transforms.RandomCrop(config['input_size'][-2:], augmentation.crop_padding, pad_if_needed=True)
        dataset.transform.transforms.insert(0, crop)
    return loader


def loading(settings: TrainSettings, config: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Images a CPU second of one process, by kind of loader."""
    splits = [open_split(settings.data, settings.data.train_split) for _ in range(2)]
    parts = (replace(settings.loader, workers=0), settings.augmentation, config, CPU, settings.run.seed)
    loaders: dict[str, Iterable] = {
        "timm's loader": timms_loader(settings, config, 0),
        'this loader': TrainLoader(splits[0].dataset, *parts),
        'this loader, --cache-dataset': TrainLoader(cache_split(splits[1], quiet=True).dataset, *parts),
    }
    images: dict[str, int] = {}

    def one_pass(name: str) -> None:
        images[name] = sum(len(batch[0]) for batch in loaders[name])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process; threads that wait for each other would count
    steps = {name: partial(one_pass, name) for name in loaders}
    seconds = paired_seconds(steps, rounds, 'loading', warmup=0, clock=time.process_time)
    torch.set_num_threads(threads)
    rates = {name: images[name] / statistics.median(times) for name, times in seconds.items()}
    return {name: {'images/s': rate, 'of this loader': rate / rates['this loader']} for name, rate in rates.items()}


def epoch_of(trainer: Trainer) -> None:
    """One epoch of a run, without its evaluation and its files."""
    trainer._train_epoch(trainer.state.epoch)
    trainer.state.next_epoch()


def training(settings: TrainSettings, config: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds an epoch of supervised training, and throughput over that of timm's loader and task in a loop."""
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Step] = {}
        for name, cached in (('this trainer', False), ('this trainer, --cache-dataset', True)):
            place = {'output': folder, 'experiment': name}
            trainer = build_trainer(replace(settings, mode='vanilla', cache_dataset=cached, **place))
            steps[name] = partial(epoch_of, trainer)
        classes, optimizer = trainer.task.get_eval_model().num_classes, settings.optimizer
        task = ClassificationTask(timm.create_model(settings.model.model, num_classes=classes), verbose=False)
        sgd = torch.optim.SGD(
            task.parameters(), lr=0.05, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
        loader = timms_loader(settings, config, worker_count(settings.loader.workers))

        def timms_epoch() -> None:
            task.train()
            for images, targets in loader:
                task(images, targets)['loss'].backward()
                sgd.step()
                sgd.zero_grad()

        seconds = paired_seconds({"timm's parts": timms_epoch, **steps}, rounds, 'training')
    plain = seconds["timm's parts"]
    return {
        name: {'s an epoch': statistics.median(times), 'throughput ratio': median_ratio(plain, times)}
        for name, times in seconds.items()
    }


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='of each kind')
    add_settings(parser, TrainSettings)
    given = read_flags(parser, TrainSettings)
    rounds, recipe = given.pop('rounds'), given.pop('config', '')
    settings = build(TrainSettings, {**(read_recipe(recipe) if recipe else {}), **given})
    config = data_config(settings.data, timm.create_model(settings.model.model, num_classes=2))
    show({'Images a CPU second of one process': loading(settings, config, rounds)})
    show({'Supervised training': training(settings, config, rounds)})


if __name__ == '__main__':
    main_of(main)
