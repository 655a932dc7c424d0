"""Lines about a run: one at the start, one an epoch, how it ended; and Accelerate's trackers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from ..runs import Run, format_metrics
from ..utils.errors import RunError, Stopped, UserError, nearest
from .checkpoints import TrainState, describe
from .signals import Interrupted, StopSignal


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not have, or whose package is not installed.

    Raises:
        UserError: With the trackers that there are.
    """
    known = [str(tracker.value) for tracker in LoggerType]
    installed = ['all', *(str(tracker.value) for tracker in get_available_trackers())]
    if name not in known:
        raise UserError(f'`log_with` {name}: no such tracker{nearest(name, known)}; Accelerate has {", ".join(known)}')
    if name not in installed:
        raise UserError(f'`log_with` {name}: its package is not installed; installed: {", ".join(installed[1:])}')


def start_trackers(accelerator: Accelerator, run: Run, values: Mapping[str, Any]) -> None:
    """Have Accelerate's trackers begin a run.

    Args:
        accelerator: Made with the trackers.
        run: Where trackers put their files.
        values: Settings by name.
    """
    accelerator.project_configuration = ProjectConfiguration(project_dir=str(run), logging_dir=str(run))
    plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers('ctc-timm', plain)


def epoch_line(
    epoch: int, stage: str, train: Mapping[str, float], metrics: Mapping[str, float], lr: float, rate: float
) -> str:
    """An epoch's numbers in one line.

    Args:
        epoch: Counted from 0.
        stage: 'instance', 'temporal', or the name of a task of one stage.
        train: Mean losses, and how many images could not be read.
        metrics: Of the validation split; empty where it was not evaluated.
        lr: Learning rate at the epoch's end.
        rate: Training images a second.
    """
    parts = [f'epoch {epoch:>3}', f'{stage:<8}', f'loss {train["loss"]:.4f}']
    if 'ctc_loss' in train:
        parts.append(f'(task {train["task_loss"]:.4f}, ctc {train["ctc_loss"]:.4f})')
    if metrics:
        parts.append(format_metrics(metrics))
    parts += [f'lr {lr:.3g}', f'{rate:.0f} images/s' if rate >= 10 else f'{rate:.1f} images/s']
    if train.get('bad_steps'):
        parts.append(f'{train["bad_steps"]:.0f} bad steps discarded')
    if train.get('skipped'):
        parts.append(f'{train["skipped"]:.0f} unreadable')
    return '  '.join(parts)


@contextmanager
def early_end(run: Run, stop: StopSignal, state: TrainState, save: Callable[[], object]) -> Iterator[None]:
    """Heed signals within, and say what is kept where a signal or a full disk ends the run.

    Args:
        run: Its folder.
        stop: Of its process.
        state: Where it stands.
        save: Saves its state; called where a signal came between the batches of an epoch.

    Raises:
        Stopped: A signal asked the run to stop; its state is saved.
        RunError: There is no room for its files.
    """
    try:
        with stop.heeded():
            yield
    except Interrupted:
        if state.batch:
            save()
        raise stopped(run, stop.received, state.updates) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{run}: {describe(error)}; {_kept(run)}; make room, then continue with `resume='auto'`"
        ) from None


def stopped(run: Run, signal: str | None, updates: int) -> Stopped:
    """The error for a run that a signal stopped.

    Args:
        run: Its folder.
        signal: Name of the signal; None where another process got it.
        updates: Optimizer steps so far.
    """
    return Stopped(
        f"stopped by {signal or 'a signal'} after step {updates}; {_kept(run)}; continue with `resume='auto'`"
    )


def too_many_bad_steps(run: Run, steps: int, where: str, names: list[str]) -> RunError:
    """The error for so many consecutive steps whose loss or gradient is not finite.

    Args:
        run: Its folder.
        steps: How many.
        where: The last of them.
        names: Its images, where they have names.
    """
    some = ', '.join(names[:4]) + (f' and {len(names) - 4} more in {run.metrics_file}' if len(names) > 4 else '')
    return RunError(
        f'`max_bad_steps` {steps}: loss or gradient not finite in {steps} steps in a row, up to {where}'
        f'{f" with the images {some}" if some else ""}; {_kept(run)}; try a lower `lr`, `clip_grad`, or '
        f"`amp=False`, then `resume='auto'`"
    )


def _kept(run: Run) -> str:
    states = run.states()
    return f'its last good state is {states[-1]}' if states else 'it has no state yet'
