"""Mistakes a user can make, told in one line.

A script shows a `UserError` as that line and exits with its code; everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .text import sanitize


class UserError(ValueError):
    """An input can't be used. The message names the setting or file, the value, and what would be right, no token."""

    exit_code = 2

    def __str__(self) -> str:
        return sanitize(super().__str__())


class RunError(UserError):
    """A run can't go on, for a reason outside its settings, such as a full disk. Its last good state is as it was."""

    exit_code = 1


class Stopped(UserError):
    """A run was told to stop, and has saved its state; the code is that of a temporary failure in sysexits.h."""

    exit_code = 75


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to a mistyped one, as the tail of a message: '; nearest: a, b, c', or '' when none is."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f'; nearest: {", ".join(found)}' if found else ''


def one_line(error: BaseException) -> str:
    """An exception's message as one line of at most 300 characters, or its type where it says nothing."""
    text = ' '.join(sanitize(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + '...'
