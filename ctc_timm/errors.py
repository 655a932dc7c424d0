"""Mistakes a user can make, told in one line.

A script shows a `UserError` as that one line and exits with 2; everything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given can't be used. The message names the flag or file, the value, and what would be right."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to a mistyped one, as the tail of an error message.

    Args:
        name: What was typed.
        known: What could have been typed.
        count: How many suggestions at the most.

    Returns:
        ``'; nearest: a, b, c'``, or an empty string when nothing is close.
    """
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f'; nearest: {", ".join(found)}' if found else ''


def one_line(error: BaseException) -> str:
    """An exception's message as one line of at most 300 characters, or its type where it says nothing."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + '...'
