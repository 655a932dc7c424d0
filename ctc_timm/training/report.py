"""Lines about a run: one an epoch, and how it ended early."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ..runs import Run, format_metrics
from ..utils.errors import RunError, Stopped, one_line
from .checkpoints import TrainState
from .signals import Interrupted, StopSignal


def epoch_line(
    epoch: int, stage: str, train: Mapping[str, float], metrics: Mapping[str, float], lr: float, rate: float
) -> str:
    """An epoch's mean losses, its validation metrics, learning rate and training images a second in one line."""
    parts = [f'epoch {epoch:>3}', f'{stage:<8}', f'loss {train["loss"]:.4f}']
    if 'ctc_loss' in train:
        parts.append(f'(task {train["task_loss"]:.4f}, ctc {train["ctc_loss"]:.4f})')
    parts += [format_metrics(metrics)] * bool(metrics) + [f'lr {lr:.3g}', f'{rate:.{int(rate < 10)}f} images/s']
    if train.get('bad_steps'):
        parts.append(f'{train["bad_steps"]:.0f} bad steps discarded')
    if train.get('skipped'):
        parts.append(f'{train["skipped"]:.0f} unreadable')
    return '  '.join(parts)


@contextmanager
def early_end(run: Run, stop: StopSignal, state: TrainState, save: Callable[[], object]) -> Iterator[None]:
    """Heed signals within, and say what is kept where a signal or a full disk ends the run.

    Raises:
        Stopped: A signal asked the run to stop; its state is saved.
        RunError: There is no room for its files.
    """
    try:
        with stop.heeded():
            try:
                yield
            except Interrupted:
                if state.batch:  # between epochs it is saved already
                    save()
                where = f'{stop.received or "a signal"} after step {state.updates}'  # another rank may have got it
                raise Stopped(f"stopped by {where}; {newest_state(run)}; continue with `resume='auto'`") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f'{run}: {one_line(error)}; {newest_state(run)}'
        raise RunError(f"{what}; make room, then continue with `resume='auto'`") from None


def newest_state(run: Run) -> str:
    """Say which state a run can continue from."""
    states = run.states()
    return f'its last good state is {states[-1]}' if states else 'it has no state yet'
