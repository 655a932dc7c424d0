"""What detection and segmentation share: task, evaluator, and the run around the trainer.

A run has the folder of any training run with results.json and a picture of predictions more, and no config.json, as its
weights are a whole detector's or segmenter's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.utils.data import Subset

from ..data.decoding import translate_errors
from ..data.settings import LoaderSettings
from ..measure.plots import plot_run
from ..measure.results import write_json
from ..models.creation import checkpoint_gradients, prepare_model
from ..models.settings import ExecutionSettings
from ..runs import Run
from ..training.build import open_accelerator
from ..training.checkpoints import locate_run, values_of
from ..training.optimization import create_optimizer, resolve_lr
from ..training.schedules import TwoStageSchedule
from ..training.trainer import Trainer
from ..utils.progress import clock, progress_bar
from ..utils.settings import replace
from ..utils.tasks import TrainerTask
from .loading import FitCanvas, TrainLoader, Transformed, create_loader, train_transform
from .pyramid import Pyramid
from .scenes import default_scenes
from .settings import DenseSettings

logger = get_logger(__name__)
S = TypeVar('S', bound=DenseSettings)


class DenseTask(TrainerTask):
    """A model on its way to a loss; subclasses give `run_batch`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = self.eval_model = model  # evaluated without the wrapper of several processes


class DenseEvaluator:
    """Metrics of a model on a split, whose images the processes share; subclasses give them, see `Evaluator`."""

    columns: tuple[str, ...]
    best_metric: str

    def __init__(self, split: Any, transform: FitCanvas, loader: LoaderSettings, accelerator: Accelerator) -> None:
        self.split = split
        self.transform = transform
        self.loader = loader
        self.accelerator = accelerator

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics, the same in all processes."""
        raise NotImplementedError

    @torch.no_grad()
    def outputs(self, model: nn.Module, indices: range | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model's output for each image with its target; of this process's share where no indices are given."""
        if indices is None:
            indices = range(len(self.split))[self.accelerator.process_index :: self.accelerator.num_processes]
        images = Subset(Transformed(self.split, self.transform), indices)
        size = self.loader.validation_batch_size or self.loader.batch_size
        loader = create_loader(images, self.loader, batch_size=size)
        model.eval()
        with translate_errors():
            for batch, targets in progress_bar(loader, 'validation', self.accelerator):
                with self.accelerator.autocast():
                    outputs = model([image.to(self.accelerator.device) for image in batch])
                yield from zip(outputs, targets)


def open_data(
    settings: S, open_splits: Callable[[str, Accelerator], tuple[Any, Any]]
) -> tuple[S, Accelerator, tuple[Any, Any]]:
    """Set up the processes, open the splits of the data folder (scenes of digits where none is named), and seed.

    Returns:
        The settings with the data folder, the accelerator, training and validation split.
    """
    accelerator = open_accelerator(settings.precision, settings.run.log_with, settings.folder.output, True)
    with accelerator.main_process_first():
        if not settings.canvas.data_dir:
            settings = replace(settings, data_dir=default_scenes())
        splits = open_splits(str(settings.canvas.data_dir), accelerator)
    torch.manual_seed(settings.run.seed)
    return settings, accelerator, splits


def train_dense(
    settings: DenseSettings,
    task: DenseTask,
    pyramid: Pyramid,
    train: Any,
    evaluator: DenseEvaluator,
    *,
    boxes: bool,
    facts: Mapping[str, Any],
    results: Mapping[str, Any],
    draw: Callable[[Run], object],
    summarize: Callable[[dict[str, float]], str],
) -> Run:
    """Train a task, or what is left of its run, and write results.json and pictures.

    Args:
        settings: All of them.
        task: With a new model.
        pyramid: Within that model.
        train: Training split.
        evaluator: On the validation split.
        boxes: See `loading.train_transform`.
        facts: What a state must agree on with the run that continues it.
        results: More for results.json.
        draw: Draws predictions.
        summarize: Makes a table of the metrics.

    Raises:
        UserError: Settings that cannot work; nothing has been written then.
    """
    accelerator, seed, model = evaluator.accelerator, settings.run.seed, task.trainable_module
    run, point = locate_run(settings)
    if settings.backbone.grad_checkpointing:
        checkpoint_gradients(pyramid.body.model, pyramid.name)
    if settings.optimizer.layer_decay is not None:
        pyramid.assign_layers(model)
    world = accelerator.num_processes
    prepare_model(model, ExecutionSettings(), settings.batch_norm, accelerator.device, world)
    transform = train_transform(settings.canvas, evaluator.transform.mean, boxes=boxes)
    loader = TrainLoader(train, transform, settings.loader, seed, accelerator)
    stepping = replace(settings.optimizer, lr=resolve_lr(settings.optimizer, settings.loader.batch_size, world))
    optimizer = create_optimizer(stepping, model)
    steps = math.ceil(len(loader) / stepping.grad_accum_steps)
    trainer = Trainer(
        task,
        loader,
        evaluator,
        optimizer,
        TwoStageSchedule(optimizer, settings.schedule, None, steps, seed),
        run,
        accelerator,
        settings.run,
        stepping,
        batch_size=settings.loader.batch_size,
        facts={'mode': settings.mode, 'body': pyramid.name, 'img_size': settings.canvas.img_size, **facts},
        dist_bn=settings.batch_norm.dist_bn,
        plot=plot_run,
    )
    trainer.open_run(point, {**values_of(settings), 'lr': stepping.lr})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(f'training: {train}\nvalidation: {evaluator.split}')
    logger.info(
        f'{settings.mode}: {pyramid.name} ({pyramid.weights}; {size:.2f}M parameters with heads), '
        f'{settings.canvas.img_size} pixels, {settings.schedule.epochs} epochs, to {run}'
    )
    began = time.monotonic()
    metrics = trainer.fit() or evaluator(model)
    best = trainer.state.best
    if accelerator.is_main_process:
        content = {
            'backbone': pyramid.name,
            'weights': pyramid.weights,
            'data': settings.canvas.data_dir,
            **results,
            'epoch': trainer.state.epoch - 1,
            'best': best,
            'metrics': metrics,
        }
        write_json(run.path / 'results.json', content)
        draw(run)
    reached = f'best {evaluator.best_metric} {best[0]:.4f} at epoch {best[1]}' if best else 'not evaluated'
    logger.info(f'done in {clock(time.monotonic() - began)}: {reached}')
    logger.info(f'{len(evaluator.split):,} validation images, epoch {trainer.state.epoch - 1}\n{summarize(metrics)}')
    logger.info(f'written to {run.path / "results.json"} and {run.plots}')
    accelerator.wait_for_everyone()
    return run
