"""Labels and images of a table: which labels are class numbers, and what is said of those that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ctc_timm.data.datasets import open_split
from ctc_timm.data.indexed import IndexedDataset
from ctc_timm.utils.errors import UserError
from images import encoded, picture
from tables import table


@pytest.mark.parametrize('values, count, first', [([0, 1, None, 1, None], 2, 2), ([0.0, float('nan'), -1.0], 2, 1)])
def test_labels_missing_in_a_table(tmp_path: Path, values: list[Any], count: int, first: int) -> None:
    message = f'hfds/.*: {count} of {len(values)} images have no label, the first is image {first}'
    with pytest.raises(UserError, match=message):
        open_split(table(tmp_path / 'set', values), 'train')


def test_images_missing_in_a_table(tmp_path: Path) -> None:
    """An empty cell, empty bytes and a path to nowhere are unreadable images as others are."""
    data = encoded(Image.fromarray(picture(3)), 'PNG')
    whole, gone = {'bytes': data, 'path': 'whole.png'}, tmp_path / 'gone.png'
    gone.write_bytes(data)
    images = [None, None, {'bytes': b'', 'path': None}, {'bytes': None, 'path': str(gone)}, whole]
    split = table(tmp_path / 'set', [0, 1, 0, 1, 1], images)
    gone.unlink()
    indexed = IndexedDataset(open_split(split, 'train').dataset)
    assert [indexed[i][1].tolist() for i in range(5)] == [[1, 4, 0], [1, 4, 1], [1, 4, 2], [1, 4, 3], [1, 4, 4]]
    assert indexed.name(4) == 'whole.png'
    assert indexed.log_unreadable() == ['image 0', 'image 1', 'image 2', str(gone)]


@pytest.mark.parametrize('labels', [[True, False, True], [2.0, 0.0, 1.0]])
def test_labels_that_are_whole_numbers(tmp_path: Path, labels: list[Any]) -> None:
    source = open_split(table(tmp_path / 'set', labels), 'train')
    assert source.labels_N is not None and source.labels_N.tolist() == [int(label) for label in labels]


@pytest.mark.parametrize(
    'labels, message',
    [
        ([0, 0.5, 1], 'image 1 has the label 0.5, which is no class number; labels are class numbers from 0'),
        ([0.0, 1.0, math.inf], 'image 2 has the label inf'),
        (['1', '0', '1'], "image 0 has the label '1', .* as `class_map`"),
        (['cat', None, 'dog'], "image 0 has the label 'cat', .* as `class_map`"),
        ([1, 2**33, 0], 'image 1 has the label 8589934592, .* from 0 to 999,999'),
        ([[0], [0, 1], [1]], r'image 0 has the label \[0\], .* one an image'),
        ([[0, 1], [1, 0], [1, 1]], r'image 0 has the label \[0, 1\]'),
    ],
)
def test_labels_that_are_no_class_numbers(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=f'hfds/.*: {message}'):
        open_split(table(tmp_path / 'set', labels), 'train')
