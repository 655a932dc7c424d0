"""Where a run stands: what a resume needs to know beside the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_FIRST = ('loss', 'task_loss', 'ctc_loss')  # columns of summary.csv; others follow by name


@dataclass
class TrainState:
    """Between two optimizer steps of a run.

    Attributes:
        epoch: To go on with, from 0.
        batch: Of that epoch, to go on with, from 0.
        updates: Optimizer steps so far, with those left out.
        bad_in_a_row: Steps left out since the last one that was taken.
        best: Best top-1 so far, or what else the run is judged by, and its epoch.
        sums: Losses of this process over the epoch so far, by name.
        batches: How many batches they are of.
        skipped: Images of this process that could not be read in the epoch so far.
        bad_steps: Steps left out in the epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    bad_in_a_row: int = 0
    best: tuple[float, int] | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    skipped: int = 0
    bad_steps: int = 0

    def next_epoch(self) -> None:
        """Go to the beginning of the next one."""
        self.epoch += 1
        self.batch = self.batches = self.skipped = self.bad_steps = 0
        self.sums = {}

    def add(self, losses: dict[str, Tensor], batches: int) -> None:
        """Count a step's losses."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.batches += batches

    def means(self) -> dict[str, Tensor]:
        """Mean losses of this process over the epoch so far, in an order that a resume does not change."""
        names = sorted(self.sums, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
        return {name: self.sums[name] / max(self.batches, 1) for name in names}

    def progress(self, global_batch: int, accumulate: int) -> dict[str, Any]:
        """The same in all processes, in plain values.

        Args:
            global_batch: Images of a batch of all processes.
            accumulate: Batches of a step.
        """
        return {
            'epoch': self.epoch,
            'batch': self.batch,
            'step_size': [global_batch, accumulate],
            'updates': self.updates,
            'bad_in_a_row': self.bad_in_a_row,
            'best_top1': self.best[0] if self.best else None,
            'best_epoch': self.best[1] if self.best else None,
        }

    def own(self) -> dict[str, Tensor]:
        """What differs between processes."""
        counts = torch.tensor([self.batches, self.skipped, self.bad_steps])
        return {'counts': counts, **{f'sum.{name}': value.detach().cpu() for name, value in self.sums.items()}}

    @classmethod
    def of(
        cls, progress: dict[str, Any], own: dict[str, Tensor], global_batch: int, accumulate: int, device: torch.device
    ) -> TrainState:
        """Read back what `progress` and `own` gave.

        With steps of another size the epoch goes on at the nearest step before: no image of it is left out, some may
        be seen again.
        """
        batch = progress['batch']
        if progress['step_size'] != [global_batch, accumulate]:
            batch = batch * progress['step_size'][0] // global_batch // accumulate * accumulate
        best = progress['best_epoch']
        batches, skipped, bad_steps = own['counts'].tolist() if 'counts' in own else (0, 0, 0)
        return cls(
            epoch=progress['epoch'],
            batch=batch,
            updates=progress['updates'],
            bad_in_a_row=progress['bad_in_a_row'],
            best=None if best is None else (progress['best_top1'], best),
            sums={name[4:]: value.to(device) for name, value in own.items() if name.startswith('sum.')},
            batches=batches,
            skipped=skipped,
            bad_steps=bad_steps,
        )
