"""What the trainer asks of a task, beyond timm's interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from timm.task import TrainingTask
from torch import Tensor


class StateReader(Protocol):
    """The files of a saved state, by name without `.safetensors`."""

    names: list[str]

    def read(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file."""


class TrainerTask(TrainingTask):
    """A timm task with hooks for the trainer, each with a default.

    Attributes:
        stage: What the task is doing, for logs: 'instance', 'temporal', or the name of a task of one stage.
    """

    stage: str = 'vanilla'

    def run_batch(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """The forward pass on a batch of the trainer's loader.

        Args:
            batch: images [B, C, H, W], targets, index [B] or None, and lam [B] or None; or whatever the loader gives.

        Returns:
            'loss', which is minimized; every other scalar is logged under its name.
        """
        images, targets, *_ = batch
        return self(images, targets)

    def start_training(self) -> None:
        """Called once, before the first step."""

    def prepare_epoch(self, stage: str, training_images: Callable[[], Iterable[Any]]) -> bool:
        """Called before an epoch.

        Args:
            stage: Of the epoch, by the schedule.
            training_images: One pass over the training set without augmentation: batches (images, targets, index).

        Returns:
            Whether the task went over to another stage.
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
        """Continue from a state.

        Args:
            stage: That the task was in.
            rank_state: Of this rank; empty for a rank that was not there.
            files: What `state_files` gave, on all ranks.

        Raises:
            ValueError: The state is of another task.
        """
