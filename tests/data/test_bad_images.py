"""Images of every kind and in every state of damage: read right, or skipped, counted and named."""

from __future__ import annotations

import argparse
import csv
import os
import resource
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from images import damaged_images, odd_images, picture, write_damaged, write_odd
from PIL import Image
from runs import CONFIG, write_folder
from timm.data.readers.reader_image_folder import find_images_and_targets

from ctc_timm.data.cached import cache_images
from ctc_timm.data.datasets import open_split
from ctc_timm.data.decoding import NamingDataset, ReadError, read_image
from ctc_timm.data.indexed import EpochBatches
from ctc_timm.data.loaders import create_eval_loader, keep_batches
from ctc_timm.data.training_loader import RefreshLoader, TrainLoader
from ctc_timm.training.trainer import Trainer
from ctc_timm.utils.errors import RunError, UserError

Flags = Callable[..., argparse.Namespace]
CPU = torch.device('cpu')
MODEL = '--model test_resnet --img-size 16 --mean 0.3 --std 0.4 --num-negatives 16 --smoothing 0 --lr 0.01'
# Spaces, signs of the shell, of Markdown and of terminals, both forms of an accent, what is no UTF-8, the longest.
NAMES = [
    b'two  spaces .png',
    b'-rf.png',
    b'$(reboot) `id` "quoted" \'too\'.png',
    b'line\nbreak.png',
    b'\x1b[31mred.png',
    b'<b>bold & [link](x).png',
    'smile \U0001f600\u200d\U0001f525.png'.encode(),
    'caf\u00e9.png'.encode(),
    'cafe\u0301.png'.encode(),
    'turn\u202egnp.png'.encode(),
    '\u6f22\u5b57 \u0639\u0631\u0628\u064a.png'.encode(),
    b'no utf8 \xff\xfe.png',
    b'.hidden.png',
    b'x' * 251 + b'.png',
    b'UPPER.PNG',
]


@pytest.mark.parametrize('name', odd_images())
def test_odd_images_are_read(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The pixels that were put in, of the first frame, unturned, with the contrast of 16 bits and no warnings."""
    data, pixels, off = odd_images()[name]
    file = tmp_path / name
    file.write_bytes(data)
    for mode in ('RGB', 'RGBA', 'L', None):
        opened = file.open('rb')
        image = read_image(opened, mode)
        assert opened.closed and image.size == pixels.shape[1::-1] and (mode is None or image.mode == mode)
        if mode == 'RGB':
            difference = np.abs(np.asarray(image).astype(int) - pixels)
            assert difference.max() <= off and difference.mean() <= off / 4
    assert not recwarn.list


def test_sixteen_bits_stay_where_they_are_asked_for(tmp_path: Path) -> None:
    """A mode of more than eight bits gets the file's own values."""
    data, _, _ = odd_images()['16 bit gray.png']
    (tmp_path / 'a.png').write_bytes(data)
    deep = np.random.default_rng(1).integers(0, 2**16, (32, 32), dtype=np.uint16)
    for mode in ('I;16', 'I', None):
        assert np.array_equal(np.asarray(read_image((tmp_path / 'a.png').open('rb'), mode)), deep)


@pytest.mark.parametrize('name', damaged_images())
def test_damaged_images_are_refused(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """At once, without the memory that a bomb asks for, and with a reason of one line."""
    file = tmp_path / name
    file.write_bytes(damaged_images()[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    opened = file.open('rb')
    with pytest.raises(ReadError) as error:
        read_image(opened, 'RGB')
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert opened.closed and str(error.value) and '\n' not in str(error.value) and not recwarn.list


@pytest.fixture(scope='module')
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images of three classes among them damaged and odd ones; validation images, two of them damaged."""
    root = tmp_path_factory.mktemp('bad')
    write_folder(root / 'train', 'train', 12)
    write_folder(root / 'validation', 'validation', 5)
    write_odd(root / 'train' / 'class0')
    write_damaged(root / 'train' / 'class1')
    (root / 'train' / 'class2' / '011.png').write_bytes(b'')  # the last, after which comes the first
    for name in ('class0/001.png', 'class2/004.png'):
        (root / 'validation' / name).write_bytes(b'no image')
    return root


def unreadable(folder: Path) -> tuple[list[str], set[int]]:
    """All files in timm's order, and which of them are damaged, by their names."""
    samples, _ = find_images_and_targets(str(folder))
    files = [path for path, _ in samples]
    names = {*damaged_images(), 'gone.png'}
    damaged = {i for i, file in enumerate(files) if Path(file).name in names or file.endswith('class2/011.png')}
    assert len(damaged) == len(names) + 1
    return files, damaged


def rows(run: Path) -> list[dict[str, str]]:
    with (run / 'summary.csv').open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('tries', [10, 40])
def test_every_damaged_image_is_replaced_by_the_next(
    flags: Flags, bad_folder: Path, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By brute force over all images; ten in a row end it as in timm, unless its limit is raised."""
    files, damaged = unreadable(bad_folder / 'train')
    dataset = open_split(flags('--data-dir', str(bad_folder)), 'train').dataset
    monkeypatch.setattr(dataset, '_max_retries', tries)
    named = NamingDataset(dataset)
    for i in range(len(files)):
        expected = [(i + step) % len(files) for step in range(tries)]
        expected = [j for j in expected if j not in damaged]
        if not expected:
            with pytest.raises(UserError) as error:
                named.read(i)
            assert f'{tries} consecutive' in str(error.value) and Path(files[i]).name in str(error.value)
            continue
        image, target, delivered = named.read(i)
        assert delivered == expected[0]
        assert target == int(Path(files[delivered]).parent.name.removeprefix('class'))
        assert image.tobytes() == read_image(BytesIO(Path(files[delivered]).read_bytes()), 'RGB').tobytes()
    assert set(named.unread()) == damaged
    assert tries == 10 or len([j for j in range(len(files)) if named.read(j)[2] != j]) == len(damaged)


@pytest.mark.parametrize('keep', [False, True], ids=['files', 'memory'])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_over_all_of_them(
    flags: Flags,
    bad_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    keep: bool,
    workers: int,
) -> None:
    """Both stages: each skip is counted, each file named once, and no bank row is touched but by its own image."""
    monkeypatch.setattr('timm.data.dataset._ERROR_RETRY', 40)
    files, damaged = unreadable(bad_folder / 'train')
    words = f'{MODEL} -b 16 -j {workers} --epochs 3 --temporal-start-epoch 1 --output {tmp_path} --experiment run'
    args = flags('--data-dir', str(bad_folder), words, '--cache-dataset' if keep else '')
    trainer = Trainer(args)
    before = {name: bank.clone() for name, bank in trainer.task.banks().items()}
    capfd.readouterr()
    trainer.fit(quiet=True)
    told = [line for line in capfd.readouterr().err.splitlines() if 'read' in line or 'Skipped' in line]

    batches = EpochBatches(len(files), 16, args.seed)
    skips, asked = [], set()
    for batches.epoch in range(3):
        indices = [index for keys in batches for _, index in keys]
        asked |= set(indices)
        skips.append(len(damaged & set(indices)))
    assert [row['train_skipped'] for row in rows(tmp_path / 'run')] == [str(n) for n in skips] and all(skips)
    for name, bank in trainer.task.banks().items():
        changed = (bank != before[name]).any(dim=1).nonzero().flatten().tolist()
        readable = set(range(len(files))) - damaged
        assert set(changed) == (readable if name.startswith('temporal') else readable & set(changed))
    train = [line for line in told if '/train/' in line]
    assert sum(int(line.split()[0]) for line in train) == len(damaged & asked)
    assert len(train) <= 3 and sum('more' in line for line in train) == 1
    (val,) = [line for line in told if '/validation/' in line]
    assert val.startswith("2 images can't be read, the next one stands in: ")
    assert all(f'/validation/{name} (no image that PIL knows)' in val for name in ('class0/001.png', 'class2/004.png'))
    assert len(told) == len(train) + 1


def test_files_of_any_name(flags: Flags, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Readable, each with its own pixels; damaged, named so that a terminal shows it and obeys nothing."""
    folder = os.fsencode(tmp_path / 'images' / 'train')
    for seed, name in enumerate(NAMES):
        for label in (b'cl\xffass', '\U0001f600'.encode()):
            os.makedirs(os.path.join(folder, label), exist_ok=True)
            with open(os.path.join(folder, label, name), 'wb') as file:
                Image.fromarray(picture(seed)).save(file, format='PNG')
    os.symlink(b'train', os.path.join(os.path.dirname(folder), b'validation'))
    args = flags('--data-dir', str(tmp_path / 'images'), f'{MODEL} -b 10 -j 1 --epochs 1 --output {tmp_path}')
    args.experiment = 'run'
    named = NamingDataset(open_split(args, 'train').dataset)
    seen = []
    for i in range(len(named)):
        image, target = named[i]
        name = os.fsencode(os.path.basename(named.name(i)))
        assert np.array_equal(np.asarray(image), picture(NAMES.index(name)))
        assert (target == 0) == (os.path.basename(os.path.dirname(named.name(i))) == 'cl\udcffass')
        seen.append(name)
    assert sorted(seen) == sorted(NAMES * 2)
    Trainer(args).fit(quiet=True)
    assert [row['train_skipped'] for row in rows(tmp_path / 'run')] == ['0']

    for name in NAMES:
        with open(os.path.join(folder, b'cl\xffass', name), 'wb') as file:
            file.write(b'no image')
    named = NamingDataset(open_split(args, 'train').dataset)
    named.dataset._max_retries = len(NAMES) + 1
    capfd.readouterr()
    for i in range(len(named)):
        named.read(i)
    names = named.tell_unread()
    assert sorted(os.fsencode(os.path.basename(name)) for name in names) == sorted(NAMES)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith('15 images') and 'and 10 more' in line and line.isprintable()
    assert named.tell_unread() == [] and not capfd.readouterr().err


def test_an_evaluation_says_what_it_could_not_read(
    flags: Flags, bad_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next image stands in with its own label; told once, however many the passes, and not by a refresh."""
    args = flags('--data-dir', str(bad_folder), '-b 4 -j 1')
    dataset = open_split(args, 'validation').dataset
    loader = create_eval_loader(dataset, args, CONFIG, CPU)
    for _ in range(2):
        targets = torch.cat([target for _, target in loader]).tolist()
        assert targets == [0] * 5 + [1] * 5 + [2] * 4 + [0]
    images = torch.cat([image for image, _ in loader])
    same = [(i, j) for i in range(15) for j in range(i) if torch.equal(images[i], images[j])]
    assert same == [(2, 1), (14, 0)]
    assert len(capfd.readouterr().err.splitlines()) == 1
    keep_batches(loader)
    kept = [torch.cat([image for image, _ in loader]) for _ in range(2)]
    assert torch.equal(kept[0], images) and torch.equal(kept[1], images)
    assert len(loader.dataset) == 15 and len(loader) == 4

    source = open_split(args, 'validation')
    index = torch.cat([index for _, _, index in RefreshLoader(source, args, CONFIG, CPU)]).tolist()
    assert index == [0, 2, *range(2, 14), 0]
    assert not capfd.readouterr().err


def test_names_come_from_memory_too(flags: Flags, image_folder: Path) -> None:
    """Images that were decoded once are named with the reason that was found then."""
    file = sorted((image_folder / 'train').rglob('*.png'))[4]
    file.write_bytes(b'')
    args = flags('--data-dir', str(image_folder), '-b 36 -j 0')
    kept = cache_images(open_split(args, 'train').dataset, quiet=True)
    file.unlink()
    loader = TrainLoader(kept, args, CONFIG, CPU)
    list(loader)
    assert loader.unreadable == [str(file)] and loader.skipped == 1
    assert NamingDataset(kept).reason(4) == 'no image that PIL knows'


def test_a_class_of_one_image_and_duplicates(flags: Flags, tmp_path: Path) -> None:
    """Every file is an instance of its own, whatever is in it; both stages end."""
    write_folder(tmp_path / 'images' / 'train', 'train', 9)
    write_folder(tmp_path / 'images' / 'validation', 'validation', 3)
    folder = tmp_path / 'images' / 'train'
    for file in sorted((folder / 'class2').iterdir())[1:]:
        file.unlink()
    (folder / 'class0' / 'copy.png').write_bytes((folder / 'class0' / '000.png').read_bytes())
    (folder / 'class1' / 'copy.png').write_bytes((folder / 'class0' / '000.png').read_bytes())
    (folder / 'class1' / 'link.png').symlink_to(folder / 'class1' / '001.png')
    words = f'{MODEL} -b 11 -j 0 --epochs 3 --temporal-start-epoch 1 --output {tmp_path} --experiment run'
    trainer = Trainer(flags('--data-dir', str(tmp_path / 'images'), words))
    trainer.fit(quiet=True)
    assert trainer.num_instances == 22
    assert [row['train_skipped'] for row in rows(tmp_path / 'run')] == ['0'] * 3
    assert all(float(row['train_loss']) < 20 for row in rows(tmp_path / 'run'))
    assert torch.isfinite(trainer.task.temporal.present_bank).all()


def test_a_shortage_is_no_fault_of_an_image(flags: Flags, image_folder: Path) -> None:
    """Out of file handles the run ends: replaced images would be silently others than without the shortage."""
    named = NamingDataset(open_split(flags('--data-dir', str(image_folder)), 'train').dataset)
    named.read(0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(RunError, match='Too many open files while an image was opened'):
            named.read(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert named.unread() == [] and named.read(1)[2] == 1
