"""Labels and classes that are missing: refused with what is missing and how much, never shifted or made up."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from images import picture
from PIL import Image
from runs import write_folder

from ctc_timm.data.datasets import check_classes, open_split
from ctc_timm.data.decoding import NamingDataset
from ctc_timm.data.indexed import IndexedDataset
from ctc_timm.utils.errors import UserError

Flags = Callable[..., argparse.Namespace]


def hub_set(folder: Path, labels: list[Any], images: list[Any] | None = None) -> Path:
    """A data set of the Hub's format with these labels."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, format='PNG')
    whole = {'bytes': file.getvalue(), 'path': None}
    rows = {'image': images or [whole] * len(labels), 'label': labels}
    features = datasets.Features({'image': datasets.Image(decode=False), 'label': datasets.Value('float64')})
    if all(label is None or label == label and int(label) == label for label in labels):
        features['label'] = datasets.Value('int64')
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / 'train.parquet')
    return folder


@pytest.mark.parametrize(
    'labels, message',
    [
        ([0, 1, None, 1, None], '2 of 5 images have no label, the first is image 2'),
        ([0, -1, 1], '1 of 3 images have no label, the first is image 1'),
        ([-1] * 4, '4 of 4 images have no label, the first is image 0'),
        ([0.0, float('nan'), 1.5], '1 of 3 images have no label, the first is image 1'),
    ],
)
def test_labels_missing_in_a_table(flags: Flags, tmp_path: Path, labels: list[Any], message: str) -> None:
    folder = hub_set(tmp_path / 'set', labels)
    with pytest.raises(UserError) as error:
        open_split(flags(f'--dataset hfds/{folder}'), 'train')
    assert message in str(error.value) and f'hfds/{folder}' in str(error.value)


def test_images_missing_in_a_table(flags: Flags, tmp_path: Path) -> None:
    """An empty cell, empty bytes and a path to nowhere are unreadable images as others are."""
    file = io.BytesIO()
    Image.fromarray(picture(3)).save(file, format='PNG')
    whole = {'bytes': file.getvalue(), 'path': 'whole.png'}
    gone = tmp_path / 'gone.png'
    gone.write_bytes(file.getvalue())
    images = [whole, None, {'bytes': b'', 'path': None}, {'bytes': None, 'path': str(gone)}, whole]
    folder = hub_set(tmp_path / 'set', [0, 1, 0, 1, 1], images)
    gone.unlink()
    named = IndexedDataset(open_split(flags(f'--dataset hfds/{folder}'), 'train').dataset)
    assert [named[i][1].tolist() for i in range(5)] == [[0, 0, 0], [1, 4, 1], [1, 4, 2], [1, 4, 3], [1, 4, 4]]
    assert named.unread() == [1, 2, 3]
    assert [named.name(i) for i in range(5)][::4] == ['whole.png'] * 2 and named.name(1) == 'image 1'
    assert named.name(3) == str(gone) and named.reason(3) == 'No such file or directory'


def test_a_class_map_without_a_label(flags: Flags, tmp_path: Path) -> None:
    """Of a table it is refused; of folders it means that their images are not wanted, as in timm."""
    folder = hub_set(tmp_path / 'set', [0, 1, 2])
    mapping = tmp_path / 'map.txt'
    mapping.write_text('class2\nclass0\n')
    with pytest.raises(UserError, match='--class-map has no class for the label 0'):
        open_split(flags(f'--dataset hfds/{folder} --class-map {mapping}'), 'train')
    write_folder(tmp_path / 'images' / 'train', 'train', 4)
    source = open_split(flags('--data-dir', str(tmp_path / 'images'), '--class-map', str(mapping)), 'train')
    assert source.labels_N is not None and source.labels_N.tolist() == [1] * 4 + [0] * 4
    named = NamingDataset(source.dataset)
    assert {Path(named.name(i)).parent.name for i in range(8)} == {'class0', 'class2'}


@pytest.mark.parametrize('dot', ['', './', '/'])
def test_images_outside_of_all_class_folders(
    flags: Flags, tmp_path: Path, dot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm would make a class of them that moves the numbers of all others."""
    write_folder(tmp_path / 'images', 'train', 4)
    for name in ('stray.png', 'astray.png'):
        (tmp_path / 'images' / name).write_bytes((tmp_path / 'images' / 'class0' / '000.png').read_bytes())
    monkeypatch.chdir(tmp_path)
    root = f'{tmp_path / "images"}/' if dot == '/' else f'{dot}images'
    with pytest.raises(UserError) as error:
        open_split(flags('--data-dir', root), 'train')
    assert '2 of 14 images lie in no class folder, the first is ' in str(error.value)
    assert str(error.value).endswith('astray.png; put each into the folder of its class')


def test_class_folders_that_only_one_split_has(flags: Flags, tmp_path: Path) -> None:
    """timm numbers the folders of each split for itself; a class map for both settles it."""
    write_folder(tmp_path / 'train', 'train', 3)
    write_folder(tmp_path / 'validation', 'validation', 3)
    args = flags('--data-dir', str(tmp_path))
    train = open_split(args, 'train')
    check_classes(train, open_split(args, 'validation'))
    (tmp_path / 'validation' / 'class2').rename(tmp_path / 'class2')
    check_classes(train, open_split(args, 'validation'))  # the last one moves no other
    (tmp_path / 'class2').rename(tmp_path / 'validation' / 'class2')
    (tmp_path / 'validation' / 'class1').rename(tmp_path / 'class1')
    with pytest.raises(UserError, match=r"class 1 of the validation split, 'class2', is 'class1' in the training"):
        check_classes(train, open_split(args, 'validation'))
    (tmp_path / 'validation' / 'class2').rename(tmp_path / 'validation' / 'class1')
    with pytest.raises(UserError, match=r"class 2 of the validation split, 'class2', is missing in the training"):
        check_classes(open_split(args, 'validation'), train)
    (tmp_path / 'validation' / 'class1').rename(tmp_path / 'validation' / 'class2')
    (tmp_path / 'map.txt').write_text('class0\nclass1\nclass2\n')
    args.class_map = str(tmp_path / 'map.txt')
    val = open_split(args, 'validation')
    check_classes(open_split(args, 'train'), val)
    assert val.labels_N is not None and torch.equal(val.labels_N, torch.tensor([0] * 3 + [2] * 3))
