"""What goes wrong in the processes that load data, told in one line.

PyTorch hands a worker's exception over as text with a traceback, and finds out that a worker died either while it
waits for a batch or by a signal, which may come at any moment of the program.
"""

from __future__ import annotations

import multiprocessing
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.errors import RunError, UserError, one_line

_HINTS = {
    'Killed': 'the usual reason is that the memory ran out; try fewer --workers',
    'Bus error': 'the usual reason is that the shared memory ran out; raise its limit, or try --workers 0',
}
_HEARD_WITHIN = 2.0  # seconds


class WorkerError(RunError):
    """A process that loads data died or failed."""


def is_death(error: BaseException) -> bool:
    """Whether PyTorch says by this error that a worker died."""
    return isinstance(error, RuntimeError) and re.match(r'DataLoader worker \(pid', str(error)) is not None


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn what PyTorch raises about its workers into errors of one line.

    Raises:
        WorkerError: A worker died, or raised what is no `UserError`.
        UserError: The worker's own, without the traceback.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:
            # To fetch a batch from a worker that is just dying fails before PyTorch hears of the death, which it
            # then raises out of the sleep.
            if not _while_fetching(error):
                raise
            time.sleep(_HEARD_WITHIN)
            raise WorkerError(f'a data loading process ended unexpectedly: {one_line(error)}') from error
    except Exception as error:
        if is_death(error):
            # Joins the dead, whom PyTorch would otherwise report again when the next process ends.
            multiprocessing.active_children()
            raise WorkerError(_death(error)) from error
        caught = _caught(error)
        if caught is None:
            raise
        message = _message(caught.string, caught[1])
        if isinstance(error, UserError):
            raise type(error)(message) from None
        raise WorkerError(f'a data loading process failed with {caught[1]}: {message}') from error


def _while_fetching(error: Exception) -> bool:
    """Whether it is the fetching of a batch that failed, and not a worker that passes on its own error."""
    text = str(error)
    if text.startswith('Caught '):
        return 'in pin memory thread' in text
    return any(frame.f_code.co_name == '_try_get_data' for frame, _ in traceback.walk_tb(error.__traceback__))


def _caught(error: Exception) -> re.Match[str] | None:
    """The head of a worker's error, with the name of its class."""
    text = str(error.args[0]) if error.args else ''
    return re.match(r'Caught (\w+) in DataLoader worker process \d+\.\n', text)


def _death(error: BaseException) -> str:
    """Which worker died of what."""
    text = ''
    link: BaseException | None = error
    while link is not None and 'signal' not in text:  # the first of the chain knows the signal
        text = str(link) if is_death(link) else text
        link = link.__cause__ or link.__context__
    pid = re.search(r'\(pid(?:\(s\))? ([\d, ]+)\)', text)
    process = f'a data loading process (pid {pid[1]})' if pid else 'a data loading process'
    signal = re.search(r'killed by signal: ([^.]+)\.', text)
    if signal is None:
        code = re.search(r'exit code (\d+)', text)
        return f'{process} ended unexpectedly' + (f' with exit code {code[1]}' if code else '')
    hint = _HINTS.get(signal[1], '')
    return f'{process} was killed by the signal {signal[1]!r}' + (f'; {hint}' if hint else '')


def _message(text: str, name: str) -> str:
    """An exception's own words out of its traceback."""
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(rf'(?:[\w.]+\.)?{name}(?::|$)', line)]
    if not starts:
        return lines[-1]
    words = ' '.join(' '.join(lines[starts[-1] :]).split())
    return words.partition(': ')[2] or words
