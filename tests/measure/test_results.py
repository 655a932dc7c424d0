"""The files that measurements leave."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from ctc_timm.measure.results import RowStore, table, write_csv, write_json


def test_rows_survive_a_line_cut_off(tmp_path: Path) -> None:
    """What was finished is read again, what was cut off is not, and the next row stands on a line of its own."""
    file = tmp_path / 'deep' / 'rows.jsonl'
    store = RowStore(file)
    store.add('a', {'x': 1.5})
    store.add('b', {'x': 2})
    store.add('c', {'x': 3}, write=False)
    file.write_text(file.read_text()[:-7])
    again = RowStore(file)
    assert again.rows == {'a': {'x': 1.5}}
    again.add('d', {'x': 4})
    assert RowStore(file).rows == {'a': {'x': 1.5}, 'd': {'x': 4}}


def test_csv_and_json(tmp_path: Path) -> None:
    """Rows of different columns share a table; text beyond ASCII stays."""
    rows = [{'method': 'ridge', 'top1': 1.5}, {'method': 'knn', 'shots': 5}]
    write_csv(tmp_path / 'rows.csv', rows)
    with (tmp_path / 'rows.csv').open(newline='') as stream:
        assert list(csv.DictReader(stream)) == [
            {'method': 'ridge', 'top1': '1.5', 'shots': ''},
            {'method': 'knn', 'top1': '', 'shots': '5'},
        ]
    write_json(tmp_path / 'new' / 'results.json', {'name': 'größe', 'spread': [float('inf'), 1.5]})
    assert json.loads((tmp_path / 'new' / 'results.json').read_text(encoding='utf-8')) == {
        'name': 'größe',
        'spread': [None, 1.5],
    }
    assert [p.name for p in tmp_path.rglob('*.tmp')] == []


def test_table_aligns() -> None:
    """Words to the left, numbers to the right, nothing where there is no value."""
    text = table([{'a': 'ridge', 'b': 97.123}, {'a': 'knn', 'b': None}], {'a': 'probe', 'b': 'top-1'})
    assert text.splitlines() == ['probe  top-1', 'ridge  97.12', 'knn']
