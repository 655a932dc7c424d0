"""The files that a measurement leaves: results.json, results.csv, and rows kept as they are finished."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete or not there; JSON knows no infinity and no NaN, which become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_text(
        json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8'
    )
    os.replace(temporary, file)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that need not all have the same columns; those come in the order they are first met."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + '.tmp')
    with temporary.open('w', encoding='utf-8', newline='') as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, restval='')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, file)


class RowStore:
    """Rows by key, one a line, each on disk as soon as it is finished.

    Args:
        file: Where they are; a last line that was cut off is left out and written over.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        if not file.is_file():
            return
        for line in file.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                stored = json.loads(line)
                self.rows[str(stored['key'])] = dict(stored['row'])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def add(self, key: str, row: dict[str, Any], write: bool = True) -> None:
        """Keep a row, on disk too unless another process writes it."""
        self.rows[key] = row
        if not write:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.file.is_file() and not self.file.read_bytes().endswith(b'\n') and self.file.stat().st_size
        with self.file.open('a', encoding='utf-8') as stream:
            stream.write(('\n' if cut_off else '') + json.dumps({'key': key, 'row': row}) + '\n')


def table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as text for a terminal.

    Args:
        rows: Of plain values; None and missing ones show as nothing.
        columns: Heading of each column by its name.
    """
    lines = [list(columns.values())]
    for row in rows:
        lines.append([_cell(row.get(name)) for name in columns])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = [all(isinstance(row.get(name), str) for row in rows) for name in columns]
    aligned = [
        '  '.join(
            cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in zip(line, widths, left)
        )
        for line in lines
    ]
    return '\n'.join(line.rstrip() for line in aligned)


def _cell(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.2f}' if isinstance(value, float) else str(value)
