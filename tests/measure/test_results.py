"""The files that measurements leave."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from ctc_timm.measure.results import RowStore, table, write_csv, write_json


def test_a_row_is_measured_once(tmp_path: Path) -> None:
    """It is found by all that it depends on, whatever the order."""
    RowStore(tmp_path / 'rows.jsonl', write=False).add('c', {'x': 3})
    assert not (tmp_path / 'rows.jsonl').exists()
    store, calls = RowStore(tmp_path / 'rows.jsonl'), []

    def measure() -> dict[str, int]:
        calls.append(1)
        return {'x': len(calls)}

    assert [store.get({'a': 1, 'b': (2,)}, measure), store.get({'b': [2], 'a': 1}, measure)] == [{'x': 1}] * 2
    assert RowStore(tmp_path / 'rows.jsonl').get({'a': 1, 'b': [2]}, measure) == {'x': 1}
    assert store.get({'a': 1, 'b': [3]}, measure) == {'x': 2} and len(calls) == 2


def test_csv_and_json(tmp_path: Path) -> None:
    """Rows of different columns share a table; text beyond ASCII stays."""
    write_csv(tmp_path / 'rows.csv', [{'method': 'ridge', 'top1': 1.5}, {'method': 'knn', 'shots': 5}])
    with (tmp_path / 'rows.csv').open(newline='') as stream:
        assert list(csv.DictReader(stream)) == [
            {'method': 'ridge', 'top1': '1.5', 'shots': ''},
            {'method': 'knn', 'top1': '', 'shots': '5'},
        ]
    file = tmp_path / 'new' / 'results.json'
    write_json(file, {'name': 'größe', 'spread': [float('inf'), 1.5]})
    assert json.loads(file.read_text(encoding='utf-8')) == {'name': 'größe', 'spread': [None, 1.5]}
    assert list(tmp_path.rglob('*.tmp')) == []


def test_table_aligns() -> None:
    """Words to the left, numbers to the right, nothing where there is no value."""
    text = table([{'a': 'ridge', 'b': 97.123}, {'a': 'knn', 'b': None}], {'a': 'probe', 'b': 'top-1'})
    assert text.splitlines() == ['probe  top-1', 'ridge  97.12', 'knn']
