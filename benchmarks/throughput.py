#!/usr/bin/env python3
"""Images a second through data loading, and through supervised training, against timm's own parts doing the same work.

Loading is timed in CPU seconds of one process, so that other work on the machine does not show; training in seconds, an
epoch of each kind a round. Figures are medians over rounds, of ratios within a round.

    python benchmarks/throughput.py -c cifar100_small --dataset hfds/FOLDER --train-split 'train[:2000]'
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm
import torch
from timm.task import ClassificationTask
from torchvision.transforms import RandomCrop

from ctc_timm.data.cached import cache_split
from ctc_timm.data.datasets import open_split
from ctc_timm.data.loaders import StreamLoader, TrainLoader
from ctc_timm.data.transforms import data_config
from ctc_timm.training.build import build_trainer
from ctc_timm.training.settings import TrainSettings
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.settings import build, replace
from harness import Table, read_flags, show, timing_table

CPU = torch.device('cpu')


def timms_loader(settings: TrainSettings, config: dict[str, Any]) -> StreamLoader:
    """timm's own training loader by the same settings, without indices and seeds."""
    dataset, padding = open_split(settings.data, settings.data.train_split).dataset, settings.augmentation.crop_padding
    loader = StreamLoader(dataset, settings.loader, settings.augmentation, config, CPU)
    if padding:
        dataset.transform.transforms.insert(0, RandomCrop(config['input_size'][-2:], padding, pad_if_needed=True))
    return loader


def loading(settings: TrainSettings, config: dict[str, Any], rounds: int) -> Table:
    """Images a CPU second of one process, by kind of loader."""
    settings = replace(settings, workers=0)
    splits = [open_split(settings.data, settings.data.train_split) for _ in range(2)]
    options = (settings.loader, settings.augmentation, config, CPU, settings.run.seed)
    kinds: dict[str, Iterable] = {
        "timm's loader": timms_loader(settings, config),
        'this loader': TrainLoader(splits[0].dataset, *options),
        'this loader, --cache-dataset': TrainLoader(cache_split(splits[1], quiet=True).dataset, *options),
    }
    steps = {name: partial(deque, loader, maxlen=0) for name, loader in kinds.items()}
    threads, images = torch.get_num_threads(), settings.loader.batch_size * len(kinds['this loader'])
    torch.set_num_threads(1)  # as in a loader process; threads that wait for each other would count
    table = timing_table(steps, rounds, 'loading', warmup=0, clock=time.process_time)
    torch.set_num_threads(threads)
    return {name: row | {'images/s': 1e3 * images / row['ms']} for name, row in table.items()}


def epoch_of(trainer: Trainer) -> None:
    """One epoch of a run, without its evaluation and its files."""
    trainer._train_epoch(trainer.state.epoch)
    trainer.state.next_epoch()


def training(settings: TrainSettings, config: dict[str, Any], rounds: int) -> Table:
    """Time of an epoch of supervised training, over that of timm's loader and task in a loop."""
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], None]] = {}
        for name, cached in (('this trainer', False), ('this trainer, --cache-dataset', True)):
            place = {'output': folder, 'experiment': name}
            trainer = build_trainer(replace(settings, mode='vanilla', cache_dataset=cached, **place))
            steps[name] = partial(epoch_of, trainer)
        task = ClassificationTask(timm.create_model(settings.model.model, num_classes=trainer.facts['num_classes']))
        stepping, loader = settings.optimizer, timms_loader(settings, config)
        sgd = torch.optim.SGD(task.parameters(), 0.05, stepping.momentum, weight_decay=stepping.weight_decay)

        def timms_epoch() -> None:
            task.train()
            for images, targets, _ in loader:
                task(images, targets)['loss'].backward()
                sgd.step()
                sgd.zero_grad()

        return timing_table({"timm's parts": timms_epoch, **steps}, rounds, 'training')


if __name__ == '__main__':
    args = read_flags(__doc__, settings=TrainSettings, rounds=5)
    settings, rounds = build(TrainSettings, args.values), args.rounds
    config = data_config(settings.data, timm.create_model(settings.model.model, num_classes=2))
    show({'Images a CPU second of one process': loading(settings, config, rounds)})
    show({'Supervised training': training(settings, config, rounds)})
