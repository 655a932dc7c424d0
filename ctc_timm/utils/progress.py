"""Progress that a person can read, in a terminal or in a log file."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


def progress_bar(batches: Any, description: str, accelerator: Accelerator, done: int = 0) -> tqdm:
    """A bar over batches, with ETA, from the main process; a log file gets a line now and then instead.

    Args:
        batches: To go through.
        description: What this is.
        accelerator: Tells the main process.
        done: Batches of the whole that were gone through before.
    """
    interval = 0.2 if sys.stderr.isatty() else 60
    return tqdm(
        batches,
        description,
        leave=False,
        initial=done,
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=interval,
        delay=0 if sys.stderr.isatty() else interval,
    )


def outer_bar(total: int, description: str, accelerator: Accelerator) -> tqdm:
    """A bar over the parts of a long measurement, with ETA, that the caller updates; others come and go below it."""
    return tqdm(
        total=total,
        desc=description,
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 60,
        smoothing=0.1,
    )


def clock(seconds: float) -> str:
    """A duration as a person would say it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h {minutes:02d}m' if hours else f'{minutes}m {seconds:02d}s' if minutes else f'{seconds}s'
