"""Stopping a run from outside: SIGTERM or SIGINT lets the step end and the state be saved; a second one does not wait.

Accelerate's and PyTorch's launchers do not hand on a SIGTERM: a process whose launcher is gone stops, too.

Loader processes inherit the handler by fork. A signal to the whole group, as a terminal or a scheduler sends it, must
not take them from the step that is to end, so there it only sets them a limit.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from ..runs import Run
from ..utils.errors import RunError, Stopped, one_line
from .checkpoints import TrainState

_GRACE = 60  # seconds that a loader process outlives its signal


class Interrupted(BaseException):
    """A run is to stop where it is: nothing goes on that has to end first."""


class StopSignal:
    """Records a signal that asks this process to stop."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._at_once = False
        self._process = os.getpid()
        self._launcher = os.getppid() if _is_launcher(os.getppid()) else None

    @property
    def received(self) -> str | None:
        """What asks this process to stop, for people: a signal's name, or that the launcher is gone."""
        gone = self._launcher is not None and os.getppid() != self._launcher
        return self._received or ('the end of its launcher' if gone else None)

    @contextmanager
    def heeded(self, run: Run, state: TrainState, save: Callable[[], object]) -> Iterator[None]:
        """Handle signals within, which outside the main thread Python can't; tell what a run that ends early keeps.

        Raises:
            Stopped: A signal asked the run to stop; its state is saved.
            RunError: There is no room for its files.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            try:
                yield
            except Interrupted:
                if state.batch:  # between epochs it is saved already
                    save()
                where = f'{self.received or "a signal"} after step {state.updates}'  # another rank may have got it
                raise Stopped(f"stopped by {where}; {newest_state(run)}; continue with `resume='auto'`") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            what = f'{run}: {one_line(error)}; {newest_state(run)}'
            raise RunError(f"{what}; make room, then continue with `resume='auto'`") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, allowed: bool) -> Iterator[None]:
        """Raise `Interrupted` within as soon as a signal comes, or has come: nothing there is lost by it."""
        self._at_once = allowed
        try:
            if allowed and self.received:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if hasattr(signal, 'alarm'):
                signal.alarm(_GRACE)
            return
        if self._received:  # the second one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = signal.Signals(number).name
        if self._at_once:
            raise Interrupted


def _is_launcher(process: int) -> bool:
    """Whether a process is `accelerate launch`, `torchrun` or one of their modules."""
    try:
        interpreter, *words = psutil.Process(process).cmdline()[:3]
    except (psutil.Error, ValueError):
        return False
    module = words[1] if words[:1] == ['-m'] and len(words) > 1 else ''
    name = Path(words[0] if words else interpreter).name
    return name in ('accelerate', 'accelerate-launch', 'torchrun') or module.startswith(('accelerate.', 'torch.distr'))


def newest_state(run: Run) -> str:
    """Say which state a run can continue from."""
    states = run.states()
    return f'its last good state is {states[-1]}' if states else 'it has no state yet'
