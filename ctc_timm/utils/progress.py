"""Progress that a person can read, in a terminal or in a log file: bars, and log lines above them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


class _AboveBars(logging.Handler):
    """Writes log lines to standard output without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Accelerate's logger, which is silent on other ranks, puts the rank in front of every line.
        tqdm.write(self.format(record).removeprefix('[RANK 0] '), file=sys.stdout)


def show_log() -> None:
    """Show the package's log lines on standard output, unless the program has set up its logger already."""
    logger = logging.getLogger('ctc_timm')
    if not logger.handlers:
        logger.addHandler(_AboveBars())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def progress_bar(
    batches: Any,
    description: str,
    accelerator: Accelerator,
    done: int = 0,
    total: int | None = None,
    leave: bool = False,
) -> tqdm:
    """Make a bar with the time left, shown by the main process; a log file gets a line a minute instead.

    Args:
        batches: To iterate over; None for a bar that the caller updates.
        description, accelerator: What goes on, and which process is the main one.
        done, total: How many are done already, and how many there are where `batches` does not say.
        leave: Keep the bar when it is full.
    """
    terminal = sys.stderr.isatty()
    waits = {'mininterval': 0.2 if terminal else 60, 'delay': 0 if terminal or leave else 60}
    hidden = not accelerator.is_main_process
    options: dict[str, Any] = {'total': total, 'leave': leave, 'initial': done, 'disable': hidden, **waits}
    return tqdm(batches, description, dynamic_ncols=True, **options)


def outer_bar(total: int, description: str, accelerator: Accelerator) -> tqdm:
    """Make a bar over the parts of a long measurement that the caller updates; others come and go below it."""
    return progress_bar(None, description, accelerator, total=total, leave=True)


def clock(seconds: float) -> str:
    """Format a duration for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h {minutes:02d}m' if hours else f'{minutes}m {seconds:02d}s' if minutes else f'{seconds}s'
