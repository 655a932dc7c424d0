"""Stopping a run from outside: SIGTERM or SIGINT lets the step end and the state be saved; a second one does not wait.

Loader processes inherit the handler by fork. A signal to the whole group, as a terminal or a scheduler sends it, must
not take them from the step that is to end, so there it only sets them a limit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 60  # seconds that a loader process outlives its signal


class Interrupted(BaseException):
    """A signal came while nothing was going on that has to end first."""


class StopSignal:
    """Notes that a signal asked this process to stop.

    Attributes:
        received: Name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Handle the signals within; outside the main thread, where Python has none, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
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
        if self.received:  # the second one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name
        if self._at_once:
            raise Interrupted
