"""The numbers that a run left, line by line: summary.csv and metrics.jsonl, checked before they are believed.

A last line that a kill cut short is left out; one that was damaged later is named.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .errors import UserError

_LARGEST_EPOCH = 10**9


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that end as lines do, with their ends."""
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]


def read_summary(file: Path) -> list[dict[str, str]]:
    """The rows of a summary.csv, one an epoch.

    Raises:
        UserError: A line that is no row of numbers.
    """
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            (cells,) = csv.reader([line.decode('utf-8')], strict=True)
            if not columns:
                if 'epoch' not in cells or len(set(cells)) < len(cells):
                    raise ValueError('no header')
                columns = cells
                continue
            row = dict(zip(columns, cells, strict=True))
            if not 0 <= int(row['epoch']) <= _LARGEST_EPOCH:
                raise ValueError('no epoch')
            for cell in cells:
                float(cell or 0)
        except (ValueError, csv.Error):
            raise UserError(f'{file}: line {number} is damaged') from None
        rows.append(row)
    return rows


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one a whole line.

    Raises:
        UserError: A line that is no mapping with an epoch.
    """
    rows = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            row = json.loads(line)
            sound = isinstance(row, dict) and _is_count(row.get('epoch')) and _is_count(row.get('batch', 0))
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f'{file}: line {number} is damaged')
        rows.append(row)
    return rows


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_EPOCH
