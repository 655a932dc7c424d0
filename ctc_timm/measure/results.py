"""The files that a measurement leaves: results.json, results.csv, and rows kept as they are finished."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete or not there; infinity and NaN, which JSON lacks, become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that need not all have the same columns; a column comes where it is first met."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text.getvalue())


class RowStore:
    """Rows by what they depend on, one a line, each on disk as soon as it is finished.

    Lines that cannot be read, such as a last one that was cut off, are ignored. With `write=False` another process
    writes.
    """

    def __init__(self, file: Path, write: bool = True) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        text = file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''
        self._file, self._write = file, write
        self._separator = '' if text.endswith('\n') or not text else '\n'  # ends a line that was cut off
        for line in text.splitlines():
            try:
                stored = json.loads(line)
                self.rows[str(stored['key'])] = dict(stored['row'])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def get(self, values: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row that depends on these plain values; measure and keep it where it is missing."""
        key = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self.rows:
            self.add(key, measure())
        return self.rows[key]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row under a key."""
        self.rows[key] = row
        if self._write:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open('a', encoding='utf-8') as stream:
                stream.write(self._separator + json.dumps({'key': key, 'row': row}) + '\n')
            self._separator = ''


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Format rows under the headings of their columns, words to the left, numbers to the right, None as nothing."""
    lines = []
    for name, heading in columns.items():
        values = [row.get(name) for row in rows]
        texts = [f'{v:.2f}' if isinstance(v, float) else '' if v is None else str(v) for v in values]
        align = str.ljust if all(isinstance(value, str) for value in values) else str.rjust
        width = max(map(len, [heading, *texts]))
        lines.append([align(text, width) for text in (heading, *texts)])
    return '\n'.join('  '.join(line).rstrip() for line in zip(*lines))
