"""What detection and segmentation share: task, evaluator, and the run around the trainer.

A run has no config.json, as its weights are a whole detector's or segmenter's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..data.decoding import translate_errors
from ..data.settings import LoaderSettings
from ..data.transforms import worker_count
from ..measure.plots.style import Figure, plt
from ..measure.results import write_json
from ..models.creation import checkpoint_gradients, prepare_model
from ..models.settings import ExecutionSettings
from ..runs import Run
from ..training.build import assemble_trainer, open_accelerator
from ..training.checkpoints import locate_run
from ..utils.progress import clock, progress_bar
from ..utils.settings import replace
from ..utils.tasks import TrainerTask
from .loading import FitCanvas, TrainLoader, Transformed, collate, train_transform
from .pyramid import Pyramid
from .scenes import default_scenes
from .settings import DenseSettings

logger = get_logger(__name__)
S = TypeVar('S', bound=DenseSettings)


class DenseTask(TrainerTask):
    """A model on its way to a loss; subclasses give `run_batch`, and whether targets have boxes."""

    boxes: bool

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = self.eval_model = model.to(device)  # evaluated without the wrapper of several processes


class DenseEvaluator:
    """Evaluates a model on a split, whose images the processes share.

    Subclasses give what `utils.tasks.Evaluator` has; `draw`, which draws images with predictions in the run's plots/;
    and `summarize`, which makes a table of the metrics.
    """

    def __init__(self, split: Any, transform: FitCanvas, loader: LoaderSettings, accelerator: Accelerator) -> None:
        self.split, self.transform, self.loader, self.accelerator = split, transform, loader, accelerator

    @torch.no_grad()
    def outputs(self, model: nn.Module, indices: range | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model's output for each image with its target; of this process's share where no indices are given."""
        if indices is None:
            indices = range(len(self.split))[self.accelerator.process_index :: self.accelerator.num_processes]
        batches: Any = DataLoader(
            Subset(Transformed(self.split, self.transform), indices),
            batch_size=self.loader.validation_batch_size or self.loader.batch_size,
            num_workers=worker_count(self.loader.workers),
            collate_fn=collate,
            pin_memory=self.loader.pin_mem,
            generator=torch.Generator(),  # workers' seeds must not draw from the state that the model draws from
        )
        model.eval()
        with translate_errors():
            for batch, targets in progress_bar(batches, 'validation', self.accelerator):
                with self.accelerator.autocast():
                    outputs = model([image.to(self.accelerator.device) for image in batch])
                yield from zip(outputs, targets)


def draw_panels(columns: list[dict[str, np.ndarray]]) -> tuple[Figure, Any]:
    """Show a column of titled images for each of several, within `drawing`; the figure and its axes, row by row."""
    rows = len(columns[0])
    figure, axes = plt.subplots(rows, len(columns), figsize=(2.2 * len(columns), 2.4 * rows), squeeze=False)
    for column, panels in zip(axes.T, columns):
        for ax, (title, pixels) in zip(column, panels.items()):
            ax.imshow(pixels, cmap='gray', interpolation='nearest')
            ax.set_axis_off()
            ax.autoscale(False)  # a box that reaches beyond the image doesn't shrink it
            if ax in axes[:, 0]:
                ax.set_title(title, fontsize=10, loc='left', pad=12)
    return figure, axes


def open_data(
    settings: S, open_splits: Callable[[str, Accelerator], tuple[Any, Any]]
) -> tuple[S, Accelerator, tuple[Any, Any]]:
    """Set up the processes, open both splits of the data folder (scenes of digits where none is named), and seed."""
    accelerator = open_accelerator(settings, find_unused_parameters=True)
    with accelerator.main_process_first():
        settings = replace(settings, data_dir=settings.canvas.data_dir or default_scenes())
        splits = open_splits(str(settings.canvas.data_dir), accelerator)
    torch.manual_seed(settings.run.seed)
    return settings, accelerator, splits


def train_dense(
    settings: DenseSettings,
    task: DenseTask,
    pyramid: Pyramid,
    train: Any,
    evaluator: Any,
    *,
    facts: Mapping[str, Any],
    results: Mapping[str, Any],
    drawn_images: int,
) -> Run:
    """Train a task on the training split, or what is left of its run, and write results.json and pictures.

    `facts` is what a state must agree on with the run that continues it, `results` more for results.json.
    """
    accelerator, val, model = evaluator.accelerator, evaluator.split, task.eval_model
    run, point = locate_run(settings)
    if settings.backbone.grad_checkpointing:
        checkpoint_gradients(pyramid.body.model, pyramid.name)
    if settings.optimizer.layer_decay is not None:
        pyramid.assign_layers(model)
    prepare_model(model, ExecutionSettings(), settings.batch_norm, accelerator.device, accelerator.num_processes)
    transform = train_transform(settings.canvas, evaluator.transform.mean, boxes=task.boxes)
    loader = TrainLoader(train, transform, settings.loader, settings.run.seed, accelerator)
    same = {'mode': settings.mode, 'body': pyramid.name, 'img_size': settings.canvas.img_size, **facts}
    trainer = assemble_trainer(
        settings, task, loader, evaluator, accelerator, run, point, facts=same, images=train.identity
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(
        f'training: {train}\nvalidation: {val}\n{settings.mode}: {pyramid.name} with heads ({pyramid.weights}; '
        f'{size:.2f}M parameters), {settings.canvas.img_size} pixels, {settings.schedule.epochs} epochs, to {run}'
    )
    began = time.monotonic()
    metrics, state = trainer.fit() or evaluator(model), trainer.state
    if accelerator.is_main_process:
        about = {'backbone': pyramid.name, 'weights': pyramid.weights, 'data': settings.canvas.data_dir}
        images = {'train': len(train), 'val': len(val)}
        end = {'epoch': state.epoch - 1, 'best': state.best, 'metrics': metrics}
        write_json(run.path / 'results.json', {**facts, **about, 'images': images, **results, **end})
        evaluator.draw(model, run, range(min(drawn_images, len(val))))
    best = 'best {} {:.4f} at epoch {}'.format(evaluator.best_metric, *state.best) if state.best else 'not evaluated'
    logger.info(
        f'done in {clock(time.monotonic() - began)}: {best}\n{len(val):,} validation images, epoch {state.epoch - 1}\n'
        f'{evaluator.summarize(metrics)}\nwritten to {run.path / "results.json"} and {run.plots}'
    )
    accelerator.wait_for_everyone()
    return run
