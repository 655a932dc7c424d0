"""`transfer/finetune.py`: what a model is worth as the start of training on another set, all of it or part of it.

Every fraction of the training set with every seed is a run of its own, by the same loop as any other run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import random_seed
from torch import Tensor
from tqdm import tqdm

from ..data import digits
from ..data import mixup as mixing
from ..data.datasets import DatasetSplit, is_streaming, open_split
from ..data.subsets import draw, part_of
from ..data.transforms import data_config
from ..measure.features import SplitImages, weights_hash
from ..measure.probes import score_columns
from ..measure.results import write_json
from ..measure.scores import bootstrap_scores
from ..measure.sets import Labeled, check_sets
from ..measure.transfer_sets import slug
from ..models import creation as models
from ..models.backbones import architecture, has_classification_head
from ..models.loading import LoadedModel, load_model, named_source
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError, one_line
from ..utils.progress import clock
from . import finetune_results, freezing
from .finetune_flags import NOT_SETTINGS
from .trainer import Trainer


def finetune(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, print, write and draw.

    Returns:
        What results.json holds.

    Raises:
        UserError: A model or a target that cannot be had, or that do not fit each other. Finished rows stay.
    """
    return FineTuning(args).run()


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        folder: Where it goes.
        fraction: Of the training images.
        seed: Of the draw, the head and the order.
        index_n: The images.
        batch_size: Of each process.
        passes: How often an epoch goes over them.
        cost: In images through the network, forwards and backwards.
    """

    folder: Path
    fraction: float
    seed: int
    index_n: Tensor
    batch_size: int
    passes: int
    cost: float


class FineTuning:
    """A model and a target, opened and checked, with the runs to make.

    Args:
        args: Of `finetune_flags.add_arguments`.

    Raises:
        UserError: See `finetune`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args = copy.copy(args)
        self.accelerator: Accelerator = create_accelerator(args)
        self.loaded = self._load()
        if not args.dataset and not args.data_dir:
            args.dataset = digits.NAME
        if args.in_chans is None and not args.input_size:
            args.in_chans = getattr(self.loaded.model, 'in_chans', 3)
        self.target = args.dataset or args.data_dir
        if is_streaming(args.dataset):
            raise UserError(
                f'--dataset {self.target}: a streaming set does not tell its classes, of which each --train-fraction '
                f'gets its share; use a map-style reader such as hfds/NAME or --data-dir FOLDER'
            )
        with self.accelerator.main_process_first():
            self.train = open_split(args, args.train_split, is_training=True)
            self.test = open_split(args, args.val_split, unsplit=False)
        self.num_classes = self._check_classes(self.train, self.test)
        self.method = 'finetune' if args.freeze == 'none' else f'finetune-{args.freeze}-frozen'
        self.folder = Path(args.output) if args.output else self._default_folder(self.loaded)
        self.settings = {
            'architecture': architecture(self.loaded.model),
            'weights': weights_hash(self.loaded.model),
            'processes': self.accelerator.num_processes,
            **{key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS},
        }
        finetune_results.check_settings(self.folder, self.settings)
        fractions = sorted(set(args.train_fraction))
        self.plans = [self._plan(f, args.seed + i) for f in fractions for i in range(args.seeds)]
        self._test_images: SplitImages | None = None

    def _load(self) -> LoadedModel:
        args = self.args
        source, architecture, flag = named_source(args)
        loaded = load_model(source, architecture, flag, **models.model_options(args, args))
        size = args.input_size[1:] if args.input_size else [args.img_size] * 2 if args.img_size else None
        if size and hasattr(loaded.model, 'set_input_size'):
            try:
                loaded.model.set_input_size(img_size=tuple(size))
            except (AssertionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f'--img-size: {flag} {source} cannot take {size[0]}x{size[1]}: {one_line(error)}'
                ) from None
        return loaded

    def _default_folder(self, loaded: LoadedModel) -> Path:
        weights = Path(loaded.weights).stem
        name = slug(self.target) if loaded.run is None or weights == 'best' else f'{slug(self.target)}-{weights}'
        return (loaded.run or Path('results') / loaded.name) / self.method / name

    def _check_classes(self, train: DatasetSplit, test: DatasetSplit) -> int:
        assert train.labels_N is not None and test.labels_N is not None
        classes = max(train.num_classes or 0, test.num_classes or 0)
        known = {**test.class_names, **train.class_names}
        names = [known.get(i, str(i)) for i in range(classes)]
        fitted, measured = (Labeled(torch.empty(len(labels), 0), labels) for labels in (train.labels_N, test.labels_N))
        flag = '--dataset' if self.args.dataset else '--data-dir'
        check_sets(fitted, measured, classes, f'{flag} {self.target}', names)
        return classes

    def _plan(self, fraction: float, seed: int) -> Plan:
        args, processes = self.args, self.accelerator.num_processes
        assert self.train.labels_N is not None and self.test.labels_N is not None
        index_n = draw(self.train.labels_N, round(fraction * len(self.train.labels_N)), seed)
        count, total = len(index_n), len(self.train.labels_N)
        batch = min(args.batch_size, count // processes)
        if mixing.is_active(args):
            batch -= batch % 2
        if not batch:
            raise UserError(f'--train-fraction {fraction:g}: {count} images are too few for {processes} process(es)')

        of_all = total // (min(args.batch_size, total // processes) * processes)
        wanted = min(of_all, math.ceil(args.min_updates * args.grad_accum_steps / args.epochs))  # batches an epoch
        passes = max(1, math.ceil(wanted * batch * processes / count))
        cost = args.epochs * (3 * count * passes + len(self.test.labels_N))
        folder = self.folder / f'fraction-{fraction:g}-seed-{seed}'
        return Plan(folder, fraction, seed, index_n, batch, passes, cost)

    def run(self) -> dict[str, Any]:
        """Make the runs that are not finished, and write all that are.

        Returns:
            What results.json holds.

        Raises:
            UserError: Flags that training refuses.
        """
        pending = {i: plan for i, plan in enumerate(self.plans, 1) if not finetune_results.is_finished(plan.folder)}
        if len(pending) < len(self.plans):
            self.say(f'{len(self.plans) - len(pending)} of {len(self.plans)} runs are finished and kept')
        started, left, spent = time.monotonic(), sum(plan.cost for plan in pending.values()), 0.0
        for number, plan in pending.items():
            self._announce(number, plan, (time.monotonic() - started) / spent * left if spent else None)
            row = self._train(plan)
            if self.accelerator.is_main_process:
                write_json(plan.folder / finetune_results.FILE, row)
                finetune_results.write(self.folder, self.about())
            left, spent = left - plan.cost, spent + plan.cost
        if self.accelerator.is_main_process:
            finetune_results.write(self.folder, self.about())
            print(finetune_results.conclude(self.folder))
        self.accelerator.wait_for_everyone()
        return finetune_results.read(self.folder)

    def about(self) -> dict[str, Any]:
        """What results.json says beside its rows."""
        return {
            'model': architecture(self.loaded.model),
            'weights': self.loaded.weights,
            'parameters': sum(p.numel() for p in self.loaded.model.parameters()),
            'target': self.target,
            'num_classes': self.num_classes,
            'input_size': list(data_config(self.args, self.loaded.model)['input_size']),
            'settings': self.settings,
        }

    def say(self, text: str) -> None:
        """Print a line, from the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _announce(self, number: int, plan: Plan, seconds: float | None) -> None:
        parts = [
            f'run {number} of {len(self.plans)}: fraction {plan.fraction:g}',
            f'{len(plan.index_n):,} images',
            f'seed {plan.seed}',
        ]
        if plan.batch_size < self.args.batch_size:
            parts.append(f'--batch-size cut to {plan.batch_size}')
        if plan.passes > 1:
            parts.append(f'{plan.passes} passes an epoch')
        if seconds is not None:
            parts.append(f'{clock(seconds)} left')
        self.say(', '.join(parts))

    def _model(self, seed: int) -> Any:
        """The loaded model with a new head, the same in all processes."""
        model: Any = copy.deepcopy(self.loaded.model)
        random_seed(seed)
        with contextlib.suppress(AttributeError, NotImplementedError, TypeError):  # an encoder, told below
            model.reset_classifier(self.num_classes)
        if not has_classification_head(model) or model.num_classes != self.num_classes:
            raise UserError(f'{self.loaded.weights}: {architecture(model)} takes no new classification head')
        return model

    def trainer(self, plan: Plan) -> Trainer:
        """A run at its start, or where it was interrupted.

        Raises:
            UserError: What the flags ask for cannot be trained.
        """
        args = argparse.Namespace(**vars(self.args))
        args.output, args.experiment, args.resume = str(self.folder), plan.folder.name, 'auto'
        args.train_fraction, args.seed, args.batch_size = plan.fraction, plan.seed, plan.batch_size
        model = self._model(plan.seed)
        frozen = freezing.freeze(model, args.freeze)
        part = part_of(self.train, plan.index_n.repeat(plan.passes))
        return Trainer(args, model=model, data=(part, self.test), frozen=frozen)

    def _train(self, plan: Plan) -> dict[str, Any]:
        """Make a run, or what is left of it, and measure its last epoch."""
        trainer = self.trainer(plan)
        if self.accelerator.is_main_process:
            finetune_results.write_settings(self.folder, self.settings)
        trainer.fit(quiet=True)
        trained: Any = trainer.task.get_eval_model(ema=trainer.task.has_ema())
        logits_NC, labels_N = self._measure(trained, trainer.config)
        row: dict[str, Any] = {
            'target': self.target,
            'split': self.args.val_split,
            'num_train': len(plan.index_n),
            'num_test': len(labels_N),
            'method': self.method,
            'freeze': self.args.freeze,
            'train_fraction': plan.fraction,
            'seed': plan.seed,
            'epoch': trainer.at.epoch - 1,
        }
        row |= score_columns(bootstrap_scores(logits_NC, labels_N))
        if trainer.at.best is not None:
            row |= {'best_epoch_top1': trainer.at.best[0], 'best_epoch': trainer.at.best[1]}
        trainer.accelerator.free_memory()
        return row

    @torch.no_grad()
    def _measure(self, model: Any, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and labels [N] of the test images, which are decoded once for all runs."""
        if self._test_images is None:
            self._test_images = SplitImages(self.test, self.args, config, self.accelerator)
        model.eval()
        logits, labels = [], []
        for images, targets in self._test_images.batches('measure'):
            if self.args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.accelerator.autocast():
                logits.append(model(images).float())
            labels.append(targets)
        return self._test_images.gather(logits), self._test_images.gather(labels)
