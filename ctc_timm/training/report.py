"""What a run tells, and to whom: a line at the start, a line an epoch, how it ended; the trackers there are."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..models.backbones import architecture
from ..runs import Run
from ..utils.errors import RunError, Stopped, UserError, nearest
from ..utils.progress import clock
from .checkpoints import states_of
from .position import TrainState
from .signals import Interrupted, StopSignal

if TYPE_CHECKING:
    from .trainer import Trainer


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not have, or whose package is not installed.

    Raises:
        UserError: With the trackers that there are.
    """
    known = [str(tracker.value) for tracker in LoggerType]
    installed = ['all', *(str(tracker.value) for tracker in get_available_trackers())]
    if name not in known:
        raise UserError(f'--log-with {name}: no such tracker{nearest(name, known)}; Accelerate has {", ".join(known)}')
    if name not in installed:
        raise UserError(f'--log-with {name}: its package is not installed; installed: {", ".join(installed[1:])}')


def start_trackers(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Have Accelerate's trackers begin a run, with its flags."""
    plain = {name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers('ctc-timm', plain)


def announcement(trainer: Trainer) -> str:
    """What is about to be trained, on what, and where to."""
    args, model = trainer.args, trainer.model
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    images = f'{trainer.num_instances:,} images' if trainer.num_instances else 'a stream of images'
    return (
        f'{args.mode}: {architecture(model)} ({parameters:.2f}M parameters, {trainer.num_classes} '
        f'classes) on {images} of {args.dataset or args.data_dir or args.data or "digits"}, '
        f'{trainer.schedule.num_epochs} epochs, batch {args.batch_size} on {trainer.accelerator.num_processes} '
        f'process(es), {trainer.device}, to {trainer.run.path}'
    )


def epoch_line(epoch: int, stage: str, train: dict[str, float], metrics: dict[str, Any], lr: float) -> str:
    """An epoch's numbers in one line.

    Args:
        epoch: Counted from 0.
        stage: 'instance', 'temporal' or 'vanilla'.
        train: Mean losses, and how many images could not be read.
        metrics: Of the validation split; empty where it was not evaluated.
        lr: Learning rate at the epoch's end.
    """
    parts = [f'epoch {epoch:>3}', f'{stage:<8}', f'loss {train["loss"]:.4f}']
    if 'ctc_loss' in train:
        parts.append(f'(task {train["task_loss"]:.4f}, ctc {train["ctc_loss"]:.4f})')
    if 'top1' in metrics:
        parts.append(f'val loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f}%, top-5 {metrics["top5"]:.2f}%')
    if 'monitor_ridge_top1' in metrics:
        parts.append(f'target {metrics["monitor_ridge_top1"]:.2f}%')
    parts.append(f'lr {lr:.3g}')
    if train.get('bad_steps'):
        parts.append(f'{train["bad_steps"]:.0f} bad steps left out')
    if train.get('skipped'):
        parts.append(f'{train["skipped"]:.0f} unreadable')
    return '  '.join(parts)


def conclusion(run: Path, seconds: float, best: tuple[float, int] | None, pictures: Iterable[Path]) -> str:
    """Where a finished run's weights, numbers and pictures are, and what to type next."""
    reached = f'best top-1 {best[0]:.2f}% at epoch {best[1]}' if best else 'not evaluated'
    return (
        f'\ndone in {clock(seconds)}: {reached}\n'
        f'  weights   {run / "best.safetensors"}, {run / "last.safetensors"}, {run / "weights"}/\n'
        f'  numbers   {run / "summary.csv"}, {run / "metrics.jsonl"}\n'
        f'  pictures  {", ".join(str(p) for p in pictures)}\n'
        f'next:\n'
        f'  python validate.py {run}\n'
        f'  python transfer/dynamics.py {run}\n'
        f'  python -c "import timm; model = timm.create_model(\'local-dir:{run}\', pretrained=True)"'
    )


@contextmanager
def early_end(run: Run, stop: StopSignal, at: TrainState, save: Callable[[], object]) -> Iterator[None]:
    """Heed signals within, and say what is kept where a signal or a full disk ends the run.

    Args:
        run: Its folder.
        stop: Of its process.
        at: Where it stands.
        save: Saves its state; called where a signal came between the batches of an epoch.

    Raises:
        Stopped: A signal told the run to stop; its state is saved.
        RunError: There is no room for its files.
    """
    try:
        with stop.heeded():
            yield
    except Interrupted:
        if at.batch:
            save()
        raise stopped(run, stop.received, at.updates) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(run, error) from None


def stopped(run: Run, signal: str | None, updates: int) -> Stopped:
    """That a run was told to stop, and how it goes on.

    Args:
        run: Its folder.
        signal: Name of the signal; None where another process got it.
        updates: Optimizer steps so far.
    """
    return Stopped(f'stopped by {signal or "a signal"} after step {updates}; {_kept(run)}; go on with --resume auto')


def disk_full(run: Run, error: OSError) -> RunError:
    """That a run's files can't be written any more."""
    return RunError(f'{run.path}: {error.strerror}; {_kept(run)}; make room, then go on with --resume auto')


def too_many_bad_steps(run: Run, steps: int, where: str, names: list[str]) -> RunError:
    """That so many steps in a row gave no number.

    Args:
        run: Its folder.
        steps: How many.
        where: The last of them.
        names: Its images; none of a stream.
    """
    some = ', '.join(names[:4]) + (f' and {len(names) - 4} more in {run.metrics}' if len(names) > 4 else '')
    return RunError(
        f'--max-bad-steps {steps}: loss or gradient not finite in {steps} steps in a row, up to {where} with the '
        f'images {some or "of a stream"}; {_kept(run)}; try a lower --lr, --clip-grad or no --amp, then --resume auto'
    )


def _kept(run: Run) -> str:
    states = states_of(run)
    return f'its last good state is {states[-1]}' if states else 'it has no state yet'
