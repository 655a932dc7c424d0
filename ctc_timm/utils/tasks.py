"""What the trainer asks of its parts: a task, beyond timm's interface, a loader, an evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

Batch = tuple[Any, ...]


class Loader(Protocol):
    """Training batches: tuples of tensors on the device, the images first."""

    unreadable: list[str]  # names of images that could not be read so far, known at the end of an epoch

    @property
    def skipped(self) -> int | None: ...  # how many those were on this rank; None where that is not counted
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...
    def image_names(self, batch: Batch) -> list[str]: ...  # of a batch whose images may be None


class Evaluator(Protocol):
    """Measures a model on the validation split."""

    columns: tuple[str, ...]  # the numbers that go into summary.csv
    best_metric: str  # decides which epoch is the best; larger is better, but of 'loss'

    def __call__(self, model: nn.Module) -> dict[str, float]: ...


class Watcher(Protocol):
    """Measures something else now and then, see `monitor.Monitor`."""

    columns: tuple[str, ...]
    seconds: float

    def due(self, epoch: int, last: bool) -> bool: ...
    def measure(self, model: nn.Module) -> dict[str, float]: ...
    def begin(self, model: nn.Module, evaluate: Evaluator) -> None: ...  # before the first step of a run
    def conclude(self) -> str: ...  # a line for the end of a run, or ''


class StateReader:
    """The files of a saved state, by name without `.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [file.stem for file in sorted(folder.glob('*.safetensors'))]

    def read(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file."""
        return load_file(self.folder / f'{name}.safetensors')


class TrainerTask(TrainingTask):
    """A timm task with hooks for the trainer, each with a default."""

    stage: str = 'vanilla'  # what it is doing, for logs: 'instance', 'temporal', or the name of a task of one stage
    frozen: tuple[str, ...] = ()  # modules of the evaluated model whose batch norms keep their statistics

    def train(self, mode: bool = True) -> TrainerTask:
        """Set training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            unwrap_model(self.get_eval_model()).get_submodule(name).eval()
        return self

    def run_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The forward pass on a batch: 'loss', which is minimized; every other scalar is logged under its name.

        A batch is images [B, C, H, W], targets, index [B] or None, lam [B] or None; or whatever the loader gives.
        """
        images, targets, *_ = batch
        return self(images, targets)

    def start_training(self) -> None:
        """Called once, before the first step."""

    def prepare_epoch(self, stage: str, training_images: Callable[[], Iterable[Any]]) -> bool:
        """Called before an epoch of a stage; returns whether the task went over to another one.

        `training_images` is a pass over the training set without augmentation: batches (images, targets, index).
        """
        return False

    def step_taken(self, step: int) -> None:
        """Called after an optimizer step; `step` counts from 1."""
        self.update_ema(step=step)

    def step_discarded(self) -> None:
        """Called in place of `step_taken` for a step whose loss or gradient was not finite."""

    def rank_state(self) -> dict[str, Tensor]:
        """Tensors of this rank that a resume needs, by name, beyond what Accelerate saves."""
        return {}

    def state_files(self, is_main_process: bool) -> dict[str, dict[str, Tensor]]:
        """Tensors that this rank writes for a resume, by file and name, beyond what Accelerate saves."""
        return {}

    def load_state_files(self, stage: str, rank_state: dict[str, Tensor], files: StateReader) -> None:
        """Continue from a state that was saved in `stage`.

        `rank_state` is empty for a rank that was not there; `files` are what `state_files` gave on all ranks.

        Raises:
            ValueError: The state is of another task.
        """
