"""Folders of images as people have them: links, nested folders, splits in any case, other types."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ctc_timm.data.datasets import open_split
from ctc_timm.data.settings import DataSettings
from ctc_timm.utils.errors import UserError
from images import picture


def write(*files: Path) -> None:
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(file)


def found(root: Path, split: str = 'train', **data: object) -> tuple[dict[int, str], list[int]]:
    """Names and labels of the classes that a split is read with."""
    source = open_split(DataSettings(data_dir=str(root), **data), split)  # type: ignore[arg-type]
    assert source.labels_N is not None
    assert source.labels_N.tolist() == [source.dataset[i][1] for i in range(len(source.dataset))]
    return source.class_names, source.labels_N.tolist()


@pytest.mark.parametrize('kind', ['files', 'class folders', 'the split', 'relative'])
def test_links_are_followed(tmp_path: Path, kind: str) -> None:
    real, root = tmp_path / 'real', tmp_path / 'root' / 'train'
    write(*(real / name / f'{i}.png' for name in 'ab' for i in range(2)))
    if kind == 'the split':
        root.parent.mkdir()
        root.symlink_to(real)
    for name in 'ab' if kind != 'the split' else '':
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == 'files':
            (root / name).mkdir()
            for file in (real / name).iterdir():
                (root / name / file.name).symlink_to(file)
        else:
            (root / name).symlink_to(real / name if kind != 'relative' else Path('../../real') / name)
    assert found(root.parent) == ({0: 'a', 1: 'b'}, [0, 0, 1, 1])


@pytest.mark.parametrize('kind', ['to itself', 'to a folder above', 'above the root', 'two in a circle'])
def test_links_in_circles_are_refused(tmp_path: Path, kind: str) -> None:
    """timm would read each image up to forty times."""
    root = tmp_path / 'root' / 'train'
    write(root / 'a' / '0.png', root / 'b' / '0.png')
    if kind == 'two in a circle':
        (root / 'a' / 'on').symlink_to(root / 'b')
        (root / 'b' / 'back').symlink_to(root / 'a')
    else:
        targets = {'to itself': root / 'a', 'to a folder above': root, 'above the root': tmp_path}
        (root / 'a' / 'on').symlink_to(targets[kind])
    with pytest.raises(UserError, match=r'`data_dir` .*/(on|back) is a link to .*, a folder that it lies in; remove'):
        found(tmp_path / 'root')


@pytest.mark.parametrize(
    'files, classes, labels',
    [
        (['n2/images/0.png', 'n10/images/0.png', 'n10/images/1.png'], {0: 'n2', 1: 'n10'}, [0, 1, 1]),
        (['cat/0.png', 'dog/0.png', 'dog/puppy/0.png'], {0: 'cat', 1: 'dog'}, [0, 1, 1]),
        (['pets/cat/0.png', 'pets/dog/0.png', 'wild/fox/0.png'], {0: 'cat', 1: 'dog', 2: 'fox'}, [0, 1, 2]),
        (['only/cat/0.png', 'only/dog/0.png'], {0: 'cat', 1: 'dog'}, [0, 1]),
        (['cat/x/raw/0.png', 'dog/y/0.png'], {0: 'cat', 1: 'dog'}, [0, 1]),
        (['10/0.png', '9/0.png'], {0: '9', 1: '10'}, [0, 1]),
    ],
)
def test_classes_of_nested_folders(
    tmp_path: Path, files: list[str], classes: dict[int, str], labels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The folders below the root, or the innermost where those tell all apart; what was found is logged."""
    write(*(tmp_path / 'train' / file for file in files))
    assert found(tmp_path) == (classes, labels)
    assert ('classes are the' in caplog.text) == any(file.count('/') > 1 for file in files)


@pytest.mark.parametrize(
    'names', [('Training', 'Testing'), ('Train', 'Validation'), ('TRAIN', 'VAL'), ('train', 'Test')]
)
def test_splits_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path / names[0] / 'a' / '0.png', tmp_path / names[0] / 'b' / '0.png', tmp_path / names[1] / 'b' / '0.png')
    assert found(tmp_path, 'train')[1] == [0, 1]
    assert found(tmp_path, 'validation') == ({0: 'b'}, [0])


def test_folders_that_look_like_splits_are_refused(tmp_path: Path) -> None:
    write(*(tmp_path / split / name / '0.png' for split in ('seg_train', 'seg_test') for name in 'ab'))
    with pytest.raises(UserError, match='seg_train, seg_test look like splits; name one with `train_split`'):
        found(tmp_path)
    assert found(tmp_path, 'seg_test')[1] == [0, 1]
    write(tmp_path / 'other' / 'test_tube' / '0.png', tmp_path / 'other' / 'train_station' / '0.png')
    assert found(tmp_path / 'other')[1] == [0, 1]  # classes, which hold images


def test_types_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Upper case is taken, others are counted and named once, all are taken by `extensions`."""
    train = tmp_path / 'train'
    write(*(train / 'a' / name for name in ('0.JPG', '1.png', '2.webp', '3.webp', '4.TIF')), train / 'b' / '0.bmp')
    write(train / 'b' / '1.png')
    (train / 'a' / 'notes.txt').write_text('no image')
    for _ in range(2):
        assert found(tmp_path)[1] == [0, 0, 1]
    assert caplog.text.count('4 images (2 .webp, 1 .') == 1 and '.txt' not in caplog.text
    assert found(tmp_path, extensions=('.jpg', 'PNG', 'webp', '.tif', '.bmp'))[1] == [0] * 5 + [1] * 2
    with pytest.raises(UserError, match=r"class folder 'b' has no images in it, of the types taken; see `extensions`"):
        found(tmp_path, extensions=('.webp',))
    write(tmp_path / 'other' / 'a' / '0.gif')
    with pytest.raises(UserError, match=r'other: 1 images \(1 .gif\) are left out, .*; give their types with `ext'):
        found(tmp_path / 'other')
