"""A training run from its settings: `build_trainer` makes every part, `train` runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from timm.utils import random_seed
from torch import nn

from ..data.cached import cache_split
from ..data.datasets import DatasetSplit, check_labels, image_mode, is_streaming, open_split, open_validation
from ..data.fingerprint import fingerprint
from ..data.loaders import RefreshLoader, StreamLoader, TrainLoader, create_eval_loader
from ..data.mixup import create_mixup
from ..data.transforms import data_config, fit_channels
from ..measure.validation import evaluate
from ..models.backbones import architecture, check_input
from ..models.creation import check_compiler, create_model, prepare_model
from ..models.pretrained_cfg import own_config
from ..runs import Run, format_metrics
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError, nearest
from ..utils.memory import note
from ..utils.progress import clock
from ..utils.settings import replace
from ..utils.tasks import Evaluator, Loader, TrainerTask
from .checkpoints import ResumePoint, locate_run
from .keep_report import create_watcher
from .optimization import TwoStageSchedule, create_optimizer, resolve_lr, temporal_start
from .retention import retain
from .settings import CommandSettings, StageSettings, TrainSettings
from .tasks import PrepareBatch, create_task
from .trainer import Trainer

logger = get_logger(__name__)


def train(settings: TrainSettings) -> Run:
    """Train a model to the end, or what is left of a run; see `build_trainer` and `Trainer.fit` for what is raised."""
    trainer = build_trainer(settings)
    facts, data, began = trainer.facts, settings.data, time.monotonic()
    images = f'{facts["num_instances"]:,} images' if facts['num_instances'] else 'a stream of images'
    logger.info(
        f'{facts["mode"]}: {facts["architecture"]}, {facts["num_classes"]} classes, on {images} of '
        f'{data.dataset or data.data_dir}, {trainer.schedule.num_epochs} epochs, batch {settings.loader.batch_size} on '
        f'{trainer.accelerator.num_processes} process(es), {trainer.accelerator.device}, to {trainer.run}{note()}'
    )
    trainer.fit()
    best = trainer.state.best
    metric = trainer.evaluator.best_metric
    reached = f'best {format_metrics({metric: best[0]})} at epoch {best[1]}' if best else 'not evaluated'
    logger.info(f'done in {clock(time.monotonic() - began)}: {reached}')
    return trainer.run


def build_trainer(
    settings: TrainSettings,
    *,
    model: Any = None,
    splits: tuple[DatasetSplit, DatasetSplit | None] | None = None,
    reopen: Callable[[], DatasetSplit] | None = None,
    frozen: Collection[str] = (),
) -> Trainer:
    """Build every part of a training run, and continue it or create its folder.

    Args:
        model: What to train, with its head; made from the settings when None.
        splits: Training and validation split; opened from the settings when None.
        reopen: Opens that training split anew, for a pass without augmentation.
        frozen: Names of modules that stay in evaluation mode, see `freezing.freeze`.

    Raises:
        UserError: Settings or data that cannot work; nothing has been written then.
    """
    data, loading, execution, average = settings.data, settings.loader, settings.execution, settings.ema
    two_stages, stages = settings.ctc.mode != 'vanilla', settings.stages
    if two_stages and is_streaming(data.dataset):
        needs = f'a stream gives its images no stable index, which `mode={settings.ctc.mode!r}` needs'
        instead = "use a map-style reader such as hfds/NAME or `data_dir='FOLDER'`, or `mode='vanilla'`"
        raise UserError(f'`dataset` {data.dataset}: {needs}; {instead}')
    accelerator = open_accelerator(settings, find_unused_parameters=two_stages)
    run, point = locate_run(settings)
    device, world_size, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    random_seed(settings.run.seed)

    with accelerator.main_process_first():
        if splits is None:
            training = open_split(data, data.train_split, is_training=True, batch_size=loading.batch_size)
            validation = open_validation(data, training)
        else:
            training, validation = splits
    if model is None:
        classes = settings.model.num_classes or training.num_classes
        model = create_model(settings.model, settings.architecture, data, classes)
    data = fit_channels(data, model)
    for source, name in ((training, data.train_split), (validation, data.val_split)):
        if source is not None:
            check_labels(source, model.num_classes, name)
            source.dataset.input_img_mode = image_mode(data)
    config = data_config(data, model)
    check_input(model, config['input_size'], training=loading.batch_size == 1)
    images = fingerprint(training) if rank == 0 or point.state else ''
    if loading.cache_dataset:
        training = cache_split(training, quiet=rank > 0)
    own_config(model)
    model = prepare_model(model, execution, settings.batch_norm, device, world_size)
    labels_N, classes = training.labels_N, model.num_classes
    count = 0 if labels_N is None else len(labels_N)
    facts = {'architecture': architecture(model), 'num_classes': classes, 'num_instances': count}
    task = create_task(settings, model, labels_N, accelerator, frozen)
    monitor = create_watcher(settings, config, accelerator, count, run, resumed=point.state is not None)
    mixup = create_mixup(settings.mixup, classes, settings.loss.smoothing)
    if mixup is not None and loading.batch_size % 2:
        raise UserError(f'`batch_size` {loading.batch_size}: must be even with `mixup` or `cutmix`')
    options = training.dataset, loading, settings.augmentation, config, device
    opened = reopen or (lambda: open_split(data, data.train_split))
    stream = labels_N is None
    loader = StreamLoader(*options) if stream else TrainLoader(*options, settings.run.seed, rank, world_size)
    spread, keep = world_size > 1, loading.cache_dataset
    evaluator: Evaluator = NoEvaluator()
    if validation is not None:
        eval_loader = create_eval_loader(validation.dataset, loading, config, device, spread, keep=keep)
        metric = settings.loss.eval_metric
        evaluator = SplitEvaluator(eval_loader, accelerator, classes, best_metric=metric)
    if execution.torchcompile:
        check_compiler(execution.torchcompile)
        task.compile(backend=execution.torchcompile, mode=execution.torchcompile_mode)
    if average.model_ema:
        place = torch.device('cpu') if average.model_ema_force_cpu else None
        task.setup_ema(decay=average.model_ema_decay, use_warmup=average.model_ema_warmup, device=place)
    start = temporal_start(stages, settings.schedule.epochs) if two_stages else stages.temporal_start_epoch
    return assemble_trainer(
        replace(settings, temporal_start_epoch=start),
        task,
        loader,
        evaluator,
        accelerator,
        run,
        point,
        lambda: run.write_config(model, config, training.class_names),
        stages if two_stages else None,
        partial(retain, model=model, settings=settings.retention),
        facts={**facts, 'mode': settings.ctc.mode},
        images=images,
        mixup=PrepareBatch(mixup, settings.mixup.mixup_off_epoch),
        monitor=monitor,
        training_images=lambda: RefreshLoader(opened(), loading, config, device, spread),
    )


def assemble_trainer(
    settings: CommandSettings,
    task: TrainerTask,
    loader: Loader,
    evaluator: Evaluator,
    accelerator: Accelerator,
    run: Run,
    point: ResumePoint,
    write_config: Callable[[], object] = tuple,
    stages: StageSettings | None = None,
    change_optimizer: Callable[[Any], None] | None = None,
    **options: Any,
) -> Trainer:
    """Add optimizer and schedule to the parts of a `Trainer`, and continue its run or create the folder."""
    lr = resolve_lr(settings.optimizer, settings.loader.batch_size, accelerator.num_processes)
    # Values that were computed are kept with the run, so that a resume for more epochs does not move them.
    settings = replace(settings, lr=lr)
    optimizer = create_optimizer(settings.optimizer, task.get_trainable_module())
    if change_optimizer is not None:
        change_optimizer(optimizer)
    updates = math.ceil(len(loader) / settings.optimizer.grad_accum_steps)  # a last, smaller group is a step too
    if settings.schedule.sched == 'plateau' and not evaluator.columns:
        raise UserError("`sched` plateau: follows an evaluation; name a `val_split`, or use `sched='wsd'`")
    seed, metric = settings.run.seed, evaluator.best_metric
    schedule = TwoStageSchedule(optimizer, settings.schedule, stages, updates, seed, metric)
    trainer = Trainer(settings, task, loader, evaluator, optimizer, schedule, run, accelerator, **options)
    trainer.open_run(point, write_config)
    return trainer


def open_accelerator(settings: CommandSettings, find_unused_parameters: bool) -> Accelerator:
    """Set up Accelerate for a command that trains; raises a UserError where it has no such tracker or precision."""
    log_with, output = settings.run.log_with, settings.folder.output
    installed = ['all', *(str(tracker.value) for tracker in get_available_trackers())] if log_with else []
    if log_with and log_with not in installed:
        near, known = nearest(log_with, installed), ', '.join(installed)
        raise UserError(f'`log_with` {log_with}: no tracker of Accelerate that is installed{near}; use one of {known}')
    return create_accelerator(
        settings.precision,
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=output, logging_dir=output),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )


class NoEvaluator:
    """Measures nothing: there is no validation split."""

    columns: tuple[str, ...] = ()
    best_metric = 'top1'

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return {}


@dataclass
class SplitEvaluator:
    """Measures loss and accuracies on a split, in percent; the model is left in evaluation mode."""

    loader: Any
    accelerator: Accelerator
    num_classes: int
    columns: tuple[str, ...] = ('loss', 'top1', 'top5')
    best_metric: str = 'top1'

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metrics = evaluate(model.eval(), self.loader, self.accelerator, self.num_classes)
        return {name: metrics[name] for name in self.columns}
