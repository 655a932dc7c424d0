"""Fine-tuning: what a model is worth as the start of training on another set, all of it or part of it.

Every fraction of the training set with every seed is a run of its own, by the same trainer as any other run. A folder
holds all runs of the same settings: `fraction-F-seed-S/`, and results.json with a row for each.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from timm.utils import random_seed, unwrap_model
from torch import Tensor

from ..data import digits
from ..data.datasets import DatasetSplit, is_streaming, open_split, open_test
from ..data.loaders import RefreshLoader
from ..data.subsets import draw, part_of
from ..data.transforms import data_config, fit_channels
from ..measure.features import LabeledFeatures, SplitImages, compute_features
from ..measure.probes import fit_linear, hold_out
from ..measure.results import write_json
from ..measure.scores import bootstrap_scores
from ..measure.transfer_sets import check_sets, slug
from ..models.backbones import architecture, has_classification_head
from ..models.creation import model_options
from ..models.loading import load_model, named_source
from ..runs import Run
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError, one_line
from ..utils.progress import clock
from ..utils.settings import flatten, replace
from ..utils.weights_files import tensors_hash
from .build import build_trainer
from .finetune_results import RESULTS, SETTINGS, check_folder, conclude, plain, write_results
from .freezing import freeze
from .retention import average_with_start, set_classifier
from .settings import FinetuneSettings, FolderSettings, ModelSettings, TrainSettings
from .trainer import Trainer

# What tells two runs of the same settings apart, or does not change what is measured.
_NOT_COMPARED = {
    *('source', 'checkpoint', 'model', 'pretrained', 'output', 'seed', 'seeds', 'train_fraction'),
    *('workers', 'cache_dataset', 'pin_mem', 'validation_batch_size', 'dataset_download', 'log_with', 'log_interval'),
    *('checkpoint_hist', 'keep_every', 'monitor_target', 'monitor_every', 'monitor_images', 'keep_report'),
}

logger = get_logger(__name__)


def finetune(settings: FinetuneSettings) -> Run:
    """Train, measure, write and draw every run that is not finished yet.

    Returns:
        The run of the largest fraction and the first seed; results.json beside it holds the numbers of all.

    Raises:
        UserError: A model or a target that cannot be had, or that do not fit each other. Finished rows stay.
    """
    return FineTuning(settings).run()


@dataclass(frozen=True)
class Plan:
    """One run."""

    folder: Path
    fraction: float  # of the training images
    seed: int  # of the draw, the head and the order
    index_n: Tensor  # the images
    batch_size: int  # of each process
    passes: int  # how often an epoch goes over the images
    cost: float  # in images through the network, forwards and backwards


class FineTuning:
    """A model and a target, opened and checked as `finetune` says, with the runs to make."""

    def __init__(self, settings: FinetuneSettings) -> None:
        self.accelerator = create_accelerator(settings.precision)
        named, built = named_source(settings.source), model_options(settings.architecture, settings.data)
        self.loaded = load_model(**named, head=False, **built)
        self.settings = settings = _fit_model(settings, self.loaded.model, named['source'])
        data, plan = settings.data, settings.plan
        self.target = data.dataset or str(data.data_dir)
        if is_streaming(data.dataset):
            raise UserError(
                f'`dataset` {self.target}: a streaming set does not tell its classes, of which each `train_fraction` '
                f'gets its share; use a map-style reader such as hfds/NAME, or `data_dir`'
            )
        with self.accelerator.main_process_first():
            self.train = open_split(data, data.train_split, is_training=True)
            self.test = open_test(data, self.train.class_names)
        assert self.train.labels_N is not None and self.test.labels_N is not None
        self.labels = self.train.labels_N, self.test.labels_N
        self.num_classes = self._check_classes()
        self.method = 'finetune' if settings.ctc.mode == 'vanilla' else f'finetune-{settings.ctc.mode}'
        self.method += '' if plan.freeze == 'none' else f'-{plan.freeze}-frozen'
        self.folder = Path(plan.output) if plan.output else self._default_folder()
        self.compared = {
            'architecture': architecture(self.loaded.model),
            'weights': tensors_hash(self.loaded.model.state_dict()),
            'processes': self.accelerator.num_processes,
            **{key: value for key, value in sorted(flatten(settings).items()) if key not in _NOT_COMPARED},
        }
        check_folder(self.folder, self.compared)
        seeds = range(settings.run.seed, settings.run.seed + plan.seeds)
        self.plans = [self._plan(fraction, seed) for fraction in sorted(set(plan.train_fraction)) for seed in seeds]
        self.config = data_config(data, self.loaded.model)
        self.about = {
            'model': architecture(self.loaded.model),
            'weights': self.loaded.weights,
            'parameters': sum(p.numel() for p in self.loaded.model.parameters()),
            'target': self.target,
            'num_classes': self.num_classes,
            'input_size': list(self.config['input_size']),
        }
        self.test_images = SplitImages(self.test, settings.loader, self.config, self.accelerator)

    def _default_folder(self) -> Path:
        loaded, weights = self.loaded, Path(self.loaded.weights).stem
        name = slug(self.target) if loaded.run is None or weights == 'best' else f'{slug(self.target)}-{weights}'
        return (loaded.run or Path('results') / loaded.name) / self.method / name

    def _check_classes(self) -> int:
        classes = max(self.train.num_classes or 0, self.test.num_classes or 0)
        known = {**self.test.class_names, **self.train.class_names}
        names = [known.get(i, str(i)) for i in range(classes)]
        fitted, measured = (LabeledFeatures(torch.empty(len(labels_N), 0), labels_N) for labels_N in self.labels)
        name = 'dataset' if self.settings.data.dataset else 'data_dir'
        check_sets(fitted, measured, classes, f'`{name}` {self.target}', names)
        return classes

    def _plan(self, fraction: float, seed: int) -> Plan:
        settings, processes, (labels_N, test_labels) = self.settings, self.accelerator.num_processes, self.labels
        wanted, epochs, total = settings.loader.batch_size, settings.schedule.epochs, len(labels_N)
        index_n = draw(labels_N, round(fraction * total), seed)
        count = len(index_n)
        batch = min(wanted, count // processes)
        if settings.mixup.active:
            batch -= batch % 2
        if not batch:
            raise UserError(f'`train_fraction` {fraction:g}: {count} images are too few for {processes} process(es)')
        batches_of_all = total // (min(wanted, total // processes) * processes)
        updates = settings.plan.min_updates * settings.optimizer.grad_accum_steps
        batches = min(batches_of_all, math.ceil(updates / epochs))  # that an epoch should have
        passes = max(1, math.ceil(batches * batch * processes / count))
        cost = epochs * (3 * count * passes + len(test_labels))
        folder = self.folder / f'fraction-{fraction:g}-seed-{seed}'
        return Plan(folder, fraction, seed, index_n, batch, passes, cost)

    def run(self) -> Run:
        """Make the runs that are not finished, and write the results of all; see `finetune`."""
        main, count = self.accelerator.is_main_process, len(self.plans)
        pending = {i: plan for i, plan in enumerate(self.plans, 1) if not (plan.folder / RESULTS).is_file()}
        if len(pending) < count:
            logger.info(f'{count - len(pending)} of {count} runs are finished and kept')
        started, left, spent = time.monotonic(), sum(plan.cost for plan in pending.values()), 0.0
        for number, plan in pending.items():
            line = (
                f'run {number} of {count}: fraction {plan.fraction:g}, {len(plan.index_n):,} images, seed {plan.seed}'
            )
            if plan.batch_size < self.settings.loader.batch_size:
                line += f', batch size cut to {plan.batch_size}'
            line += f', {plan.passes} passes an epoch' * (plan.passes > 1)
            if spent:
                line += f', {clock((time.monotonic() - started) / spent * left)} left'
            logger.info(line)
            row = self._train(plan)
            if main:
                write_json(plan.folder / RESULTS, row)
                write_results(self.folder, self.about, self.compared)
            left, spent = left - plan.cost, spent + plan.cost
        if main:
            logger.info(conclude(self.folder, write_results(self.folder, self.about, self.compared)))
        self.accelerator.wait_for_everyone()
        return Run(min(self.plans, key=lambda plan: (-plan.fraction, plan.seed)).folder)

    def trainer(self, plan: Plan) -> Trainer:
        """Build a run at its start, or where it was interrupted; see `build_trainer` for what is raised."""
        of = self.settings
        groups = {field.name: getattr(of, field.name, None) for field in dataclasses.fields(TrainSettings)}
        groups |= {
            'loader': dataclasses.replace(of.loader, batch_size=plan.batch_size),
            'model': ModelSettings(model=architecture(self.loaded.model), num_classes=self.num_classes),
            'folder': FolderSettings(output=str(self.folder), experiment=plan.folder.name, resume='auto'),
            'run': dataclasses.replace(of.run, seed=plan.seed),
        }
        settings = TrainSettings(**{name: group for name, group in groups.items() if group is not None})
        model = self._start(plan)
        frozen = freeze(model, of.plan.freeze)
        part = part_of(self.train, plan.index_n.repeat(plan.passes))
        return build_trainer(
            settings, model=model, splits=(part, self.test), reopen=partial(self._reopen, plan), frozen=frozen
        )

    def _start(self, plan: Plan) -> Any:
        """Make the model that a run starts from, the same at each call and in all processes."""
        model: Any = copy.deepcopy(self.loaded.model)
        random_seed(plan.seed)
        if has_classification_head(model):
            model.reset_classifier(self.num_classes)
        if not has_classification_head(model) or model.num_classes != self.num_classes:
            raise UserError(f'{self.loaded.weights}: {architecture(model)} takes no new classification head')
        if self.settings.plan.probe_first:
            images = SplitImages(self._reopen(plan, 1), self.settings.loader, self.config, self.accelerator)
            features = compute_features(model.to(self.accelerator.device), images, self.accelerator)
            folds_N = hold_out(features.labels_N, plan.seed)
            weights_DC, bias_C, _ = fit_linear('logistic', features, self.num_classes, folds_N)
            set_classifier(model.cpu(), weights_DC, bias_C)
        return model

    def _reopen(self, plan: Plan, passes: int = 0) -> DatasetSplit:
        """Open a run's training images anew, for passes without augmentation; as often as in an epoch, or so often."""
        data = self.settings.data
        return part_of(open_split(data, data.train_split), plan.index_n.repeat(passes or plan.passes))

    def _average(self, trainer: Trainer, plan: Plan) -> None:
        """Average a run's weights with its start, and save them as its best and its last."""
        share, model = self.settings.plan.start_share, unwrap_model(trainer.eval_model())
        loader, device = self.settings.loader, self.accelerator.device
        kept = self.settings.plan.freeze == 'batch_norm'
        images = None if kept else RefreshLoader(self._reopen(plan, 1), loader, self.config, device)
        start = self._start(plan)
        average_with_start(model, start, share, images, device, classifier=self.settings.plan.probe_first)
        metadata = {**trainer.facts, 'epoch': trainer.state.epoch - 1, 'start_share': share}
        if self.accelerator.is_main_process:
            for name in ('best', 'last'):
                trainer.run.save_weights(name, model, metadata)

    def _train(self, plan: Plan) -> dict[str, Any]:
        """Make a run, or what is left of it, and measure its last epoch."""
        trainer = self.trainer(plan)
        if self.accelerator.is_main_process:
            write_json(self.folder / SETTINGS, plain(self.compared))
        trainer.fit()
        if self.settings.plan.start_share:
            self._average(trainer, plan)
        logits_NC, labels_N = self._measure(trainer.eval_model())
        row: dict[str, Any] = {
            'target': self.target,
            'split': self.settings.data.val_split,
            'num_train': len(plan.index_n),
            'num_test': len(labels_N),
            'method': self.method,
            'freeze': self.settings.plan.freeze,
            'train_fraction': plan.fraction,
            'seed': plan.seed,
            'epoch': trainer.state.epoch - 1,
            **bootstrap_scores(logits_NC, labels_N),
        }
        if trainer.state.best is not None:
            value, epoch = trainer.state.best
            row |= {f'best_epoch_{trainer.evaluator.best_metric}': value, 'best_epoch': epoch}
        trainer.accelerator.free_memory()
        return row

    @torch.no_grad()
    def _measure(self, model: Any) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and labels [N] of the test images, which are decoded once for all runs."""
        model.eval()
        logits, labels = [], []
        for images, targets in self.test_images.batches('measure'):
            with self.accelerator.autocast():
                logits.append(model(images).float())
            labels.append(targets)
        return self.test_images.gather(logits), self.test_images.gather(labels)


def _fit_model(settings: FinetuneSettings, model: Any, source: str) -> FinetuneSettings:
    """The settings with the digits where no data are named, and with the model's channels; resizes the model."""
    data = settings.data
    if not data.dataset and not data.data_dir:
        settings = replace(settings, dataset=digits.NAME)
    settings = dataclasses.replace(settings, data=fit_channels(settings.data, model))
    size = data.input_size[1:] if data.input_size else (data.img_size, data.img_size)
    if size[0] and hasattr(model, 'set_input_size'):
        try:
            model.set_input_size(img_size=size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f'`img_size`: {source} cannot take {size[0]}x{size[1]}: {one_line(error)}') from None
    return settings
