"""Images of every kind and in every state of damage: read right, or replaced, counted and named."""

from __future__ import annotations

import csv
import os
import resource
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from ctc_timm.data import decoding
from ctc_timm.data.datasets import open_split
from ctc_timm.data.decoding import ReadError, ReplacingDataset, read_image
from ctc_timm.data.indexed import EpochBatches
from ctc_timm.data.loaders import RefreshLoader, create_eval_loader
from ctc_timm.data.settings import DataSettings, LoaderSettings
from ctc_timm.training.build import build_trainer
from ctc_timm.utils.errors import RunError, UserError
from images import damaged_images, encoded, odd_images, picture, write_damaged, write_odd
from runs import CONFIG, write_folder

CPU = torch.device('cpu')
MODEL = '--model test_resnet --img-size 16 --mean 0.3 --std 0.4 --num-negatives 16 --smoothing 0 --lr 0.01'
# Spaces, signs of the shell, of Markdown and of terminals, both forms of an accent, what is no UTF-8, the longest.
NAMES = (
    (
        b'two  spaces .png/-rf.png/$(reboot) `id` "quoted" \'too\'.png/line\nbreak.png/\x1b[31mred.png/'
        b'<b>bold & [link](x).png/no utf8 \xff\xfe.png/.hidden.png/UPPER.PNG/%b.png/'
        + 'smile \U0001f600\u200d\U0001f525.png/caf\u00e9.png/cafe\u0301.png/turn\u202egnp.png/'.encode()
        + '\u6f22\u5b57 \u0639\u0631\u0628\u064a.png'.encode()
    )
    .replace(b'%b', b'x' * 251)
    .split(b'/')
)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log lines about unreadable images."""
    lines: list[str] = []
    monkeypatch.setattr(decoding.logger, 'warning', lambda pattern, line: lines.append(line))
    return lines


@pytest.mark.parametrize('name', odd_images())
def test_odd_images_are_read(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """The pixels that were put in, of the first frame, unturned, with the contrast of 16 bits and no warnings."""
    data, pixels, off = odd_images()[name]
    for mode in ('RGB', 'RGBA', 'L', None):
        file = BytesIO(data)
        image = read_image(file, mode)
        assert file.closed and image.size == pixels.shape[1::-1] and (mode is None or image.mode == mode)
        if mode == 'RGB':
            difference = np.abs(np.asarray(image).astype(int) - pixels)
            assert difference.max() <= off and difference.mean() <= off / 4
    assert not recwarn.list


def test_sixteen_bits_stay_where_they_are_asked_for() -> None:
    """A mode of more than eight bits gets the file's own values."""
    deep = np.random.default_rng(1).integers(0, 2**16, (32, 32), dtype=np.uint16)
    for mode in ('I;16', 'I', None):
        assert np.array_equal(np.asarray(read_image(BytesIO(odd_images()['16 bit gray.png'][0]), mode)), deep)


@pytest.mark.parametrize('name', damaged_images())
def test_damaged_images_are_refused(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """At once, without the memory that a bomb asks for, and with a reason of one line."""
    file = BytesIO(damaged_images()[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ReadError) as error:
        read_image(file, 'RGB')
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert file.closed and str(error.value) and '\n' not in str(error.value) and not recwarn.list


@pytest.fixture(scope='module')
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, damaged, odd and duplicated, a class of one; validation images, two of them damaged."""
    root = tmp_path_factory.mktemp('bad')
    write_folder(root / 'train', 'train', 12)
    write_folder(root / 'validation', 'validation', 5)
    write_odd(root / 'train' / 'class0')
    write_damaged(root / 'train' / 'class1')
    train, content = root / 'train', (root / 'train' / 'class0' / '000.png').read_bytes()
    (train / 'class2' / '011.png').write_bytes(b'')  # the last but one
    for name in ('class0/copy.png', 'class1/copy.png', 'class3/alone.png'):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(content)
    (train / 'class1' / 'link.png').symlink_to(train / 'class1' / '001.png')
    for name in ('class0/001.png', 'class2/004.png'):
        (root / 'validation' / name).write_bytes(b'no image')
    return root


def unreadable(folder: Path) -> tuple[list[str], set[int]]:
    """All files in timm's order, and which of them are damaged, by their names."""
    files = [path for path, _ in find_images_and_targets(str(folder))[0]]
    names = {*damaged_images(), 'gone.png'}
    damaged = {i for i, file in enumerate(files) if Path(file).name in names or file.endswith('class2/011.png')}
    assert len(damaged) == len(names) + 1
    return files, damaged


@pytest.mark.parametrize('tries', [10, 40])
def test_every_damaged_image_is_replaced_by_the_next(bad_folder: Path, tries: int, warned: list[str]) -> None:
    """By brute force over all images; ten in a row end it as in timm, unless its limit is raised."""
    files, damaged = unreadable(bad_folder / 'train')
    dataset = open_split(DataSettings(data_dir=str(bad_folder)), 'train').dataset
    dataset._max_retries = tries
    replacing = ReplacingDataset(dataset)
    for i in range(len(files)):
        expected = next((j % len(files) for j in range(i, i + tries) if j % len(files) not in damaged), None)
        if expected is None:
            with pytest.raises(UserError) as error:
                replacing.read(i)
            assert f'{tries} consecutive' in str(error.value) and Path(files[i]).name in str(error.value)
            continue
        image, target, delivered = replacing.read(i)
        assert delivered == expected
        assert target == int(Path(files[delivered]).parent.name.removeprefix('class'))
        assert image.tobytes() == read_image(BytesIO(Path(files[delivered]).read_bytes()), 'RGB').tobytes()
    assert set(replacing.log_unreadable()) == {files[i] for i in damaged} and len(warned) == 1
    assert replacing.log_unreadable() == [] and len(warned) == 1


@pytest.mark.parametrize('words, workers', [('', 0), ('', 1), ('--cache-dataset', 0), ('--cache-dataset', 1)])
def test_a_run_over_all_of_them(
    flags: Callable[..., Any],
    bad_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warned: list[str],
    words: str,
    workers: int,
) -> None:
    """Both stages: each skip is counted, each file named once, and no bank row is touched but by its own image.

    Every file is an instance of its own, whatever is in it.
    """
    monkeypatch.setattr('timm.data.dataset._ERROR_RETRY', 40)
    files, damaged = unreadable(bad_folder / 'train')
    words += f' --data-dir {bad_folder} --epochs 3 --temporal-start-epoch 1 --output {tmp_path} --experiment run'
    trainer = build_trainer(flags(MODEL, f'-b 16 -j {workers}', words))
    task: Any = trainer.task
    before = {name: bank.clone() for name, bank in task.banks().items()}
    trainer.fit()

    batches = EpochBatches(len(files), 16, 42)
    skips, requested = [], set()
    for batches.epoch in range(3):
        indices = [index for keys in batches for _, index in keys]
        requested |= set(indices)
        skips.append(len(damaged & set(indices)))
    with (tmp_path / 'run' / 'summary.csv').open(newline='') as file:
        assert [row['train_skipped'] for row in csv.DictReader(file)] == [str(n) for n in skips] and all(skips)
    assert len(task.temporal.present_bank) == len(files)
    readable = set(range(len(files))) - damaged
    for name, bank in task.banks().items():
        changed = set((bank != before[name]).any(dim=1).nonzero().flatten().tolist())
        assert changed <= readable and (changed == readable or not name.startswith('temporal'))
    train = [line for line in warned if '/train/' in line]
    assert sum(int(line.split()[0]) for line in train) == len(damaged & requested)
    assert len(train) <= 3 and sum('more' in line for line in train) == 1
    (val,) = [line for line in warned if '/validation/' in line]
    assert val.startswith('2 images are unreadable and replaced by the next: ') and len(warned) == len(train) + 1
    assert all(f'/validation/{name} (no image that PIL knows)' in val for name in ('class0/001.png', 'class2/004.png'))


def test_files_of_any_name(tmp_path: Path, warned: list[str]) -> None:
    """Readable, each with its own pixels; damaged, named so that a terminal shows it and obeys nothing."""
    count = len(NAMES)
    for label in (b'cl\xffass', '\U0001f600'.encode()):
        folder = os.path.join(os.fsencode(tmp_path), b'train', label)
        os.makedirs(folder)
        for seed, name in enumerate(NAMES):
            with open(os.path.join(folder, name), 'wb') as file:
                file.write(b'no image' if label[:1] == b'c' else encoded(Image.fromarray(picture(seed)), 'PNG'))
    dataset = open_split(DataSettings(data_dir=str(tmp_path)), 'train').dataset
    dataset._max_retries = count + 1
    replacing, seen = ReplacingDataset(dataset), []
    for i in range(2 * count):
        image, target, delivered = replacing.read(i)
        seen.append(os.fsencode(os.path.basename(replacing.name(delivered))))
        assert (target, delivered) == (1, max(i, count))
        assert np.array_equal(np.asarray(image), picture(NAMES.index(seen[-1])))
    damaged = [os.fsencode(os.path.basename(name)) for name in replacing.log_unreadable()]
    assert sorted(seen[count:]) == sorted(NAMES) == sorted(damaged)
    (line,) = warned
    assert line.startswith('15 images') and 'and 10 more' in line and line.isprintable()


def test_an_evaluation_names_what_it_could_not_read(bad_folder: Path, warned: list[str]) -> None:
    """The next image replaces it with its own label; named once, however many the passes, and not by a refresh."""
    data, small = DataSettings(data_dir=str(bad_folder)), LoaderSettings(batch_size=4, workers=1)
    loader, kept = (
        create_eval_loader(open_split(data, 'validation').dataset, small, CONFIG, CPU, keep=keep)
        for keep in (False, True)
    )
    for _ in range(2):
        assert torch.cat([target for _, target in loader]).tolist() == [0] * 5 + [1] * 5 + [2] * 4 + [0]
    images = torch.cat([image for image, _ in loader])
    same = [(i, j) for i in range(15) for j in range(i) if torch.equal(images[i], images[j])]
    assert same == [(2, 1), (14, 0)] and len(warned) == 1
    for _ in range(2):
        assert torch.equal(torch.cat([image for image, _ in kept]), images)
    assert len(kept.dataset) == 15 and len(kept) == 4 and len(warned) == 2

    refresh = RefreshLoader(open_split(data, 'validation'), small, CONFIG, CPU)
    assert torch.cat([index for _, _, index in refresh]).tolist() == [0, 2, *range(2, 14), 0] and len(warned) == 2


def test_a_shortage_is_no_fault_of_an_image(image_folder: Path) -> None:
    """Out of file handles the run ends: replaced images would be silently others than without the shortage."""
    replacing = ReplacingDataset(open_split(DataSettings(data_dir=str(image_folder)), 'train').dataset)
    replacing.read(0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(RunError, match='Too many open files while an image was opened'):
            replacing.read(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert replacing.log_unreadable() == [] and replacing.read(1)[2] == 1
