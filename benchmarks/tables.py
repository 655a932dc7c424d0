"""Tables of numbers: printed, saved, and set against a table saved earlier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Tables = dict[str, dict[str, dict[str, float]]]


def show(tables: Tables, before: Tables | None = None) -> None:
    """Print each table in Markdown, rows by columns; with an earlier one, beside each number its multiple of then."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        print(f'\n{title}\n\n| | {" | ".join(columns)} |\n|{" --- |" * (len(columns) + 1)}')
        for name, row in rows.items():
            old = (before or {}).get(title, {}).get(name, {})
            cells = [_cell(row.get(column), old.get(column), before is not None) for column in columns]
            print(f'| {name} | {" | ".join(cells)} |')


def _cell(value: float | None, old: float | None, compared: bool) -> str:
    if value is None:
        return ''
    text = f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
    if not compared:
        return text
    return f'{text} (new)' if not old else f'{text} ({value / old:.2f} of {old:.3g})'


def finish(tables: Tables, settings: dict[str, Any], output: str, compare: str) -> None:
    """Print the tables, with those of the file to compare with, and save them, as the flags say."""
    show(tables, json.loads(Path(compare).read_text())['tables'] if compare else None)
    if output:
        Path(output).write_text(json.dumps({'settings': settings, 'tables': tables}, indent=2) + '\n')
