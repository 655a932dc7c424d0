"""Data sets by every reader: labels, classes, pixels, and what is refused."""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform

from ctc_timm.data.datasets import check_labels, is_streaming, open_split
from ctc_timm.data.digits import DigitsReader
from ctc_timm.data.training_loader import RefreshLoader, TrainLoader
from ctc_timm.data.transforms import data_config
from ctc_timm.utils.errors import UserError

Flags = Callable[..., argparse.Namespace]


def truth(folder: Path) -> tuple[list[Path], list[int]]:
    """Files of a folder of class0/, class1/, ... in timm's order, and their labels by name."""
    files = sorted(folder.rglob('*.png'))
    return files, [int(file.parent.name.removeprefix('class')) for file in files]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert('RGB'))


@pytest.mark.parametrize('split, place', [('train', 'train'), ('validation', 'validation'), ('val', 'validation')])
def test_folder(flags: Flags, image_folder: Path, split: str, place: str) -> None:
    """Also by a synonym of the split, by flag or by position."""
    files, labels = truth(image_folder / place)
    for words in (['--data-dir', str(image_folder)], [str(image_folder)]):
        source = open_split(flags(*words), split)
        assert source.labels_N is not None and source.labels_N.tolist() == labels
        assert source.num_classes == 3 and source.class_names == {i: f'class{i}' for i in range(3)}
        image, label = source.dataset[7]
        assert label == labels[7] and np.array_equal(pixels(image), pixels(Image.open(files[7])))


def test_folder_without_splits(flags: Flags, image_folder: Path) -> None:
    """Taken for any split where the caller allows it, and with an empty split's name always."""
    flat = image_folder / 'train'
    for split, unsplit in (('validation', True), ('', False)):
        source = open_split(flags('--data-dir', str(flat)), split, unsplit=unsplit)
        assert source.labels_N is not None and source.labels_N.tolist() == truth(flat)[1]


def test_class_map(flags: Flags, image_folder: Path, tmp_path: Path) -> None:
    mapping = tmp_path / 'map.txt'
    mapping.write_text('class2\nclass1\nclass0\n')
    source = open_split(flags('--data-dir', str(image_folder), '--class-map', str(mapping)), 'train')
    assert source.labels_N is not None
    assert source.labels_N.tolist() == [2 - label for label in truth(image_folder / 'train')[1]]


@pytest.mark.parametrize('layout', ['tar a split', 'splits in a tar', 'splits in a tar with dots', 'no splits'])
def test_tar(flags: Flags, image_folder: Path, tmp_path: Path, layout: str) -> None:
    """The same labels and pixels as from the folder that was packed."""
    if layout == 'tar a split':
        root = tmp_path / 'tars'
        root.mkdir()
        packed = {f'{split}.tar': (image_folder / split, '') for split in ('train', 'validation')}
    else:
        root = tmp_path / 'all.tar'
        place = {'splits in a tar': '', 'splits in a tar with dots': '.', 'no splits': ''}[layout]
        packed = {'': (image_folder / 'train' if layout == 'no splits' else image_folder, place)}
    for name, (folder, place) in packed.items():
        with tarfile.open(root / name if name else root, 'w') as tar:
            for part in [folder] if place else sorted(folder.iterdir()):
                tar.add(part, place or part.name)
    for split in ('train',) if layout == 'no splits' else ('train', 'validation'):
        files, labels = truth(image_folder / split)
        source = open_split(flags('--data-dir', str(root)), split)
        assert source.labels_N is not None and source.labels_N.tolist() == labels
        assert source.class_names == {i: f'class{i}' for i in range(3)}
        for i in (0, len(files) // 2, len(files) - 1):
            image, label = source.dataset[i]
            assert label == labels[i] and np.array_equal(pixels(image), pixels(Image.open(files[i])))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the Hub's layout, parquet, with splits train and test, made of digits."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=list('0123456789'))})
    (tmp_path / 'hub' / 'data').mkdir(parents=True)
    for split, ours in (('train', 'train[:60]'), ('test', 'validation[:30]')):
        reader = DigitsReader(ours)
        rows = []
        for image, label in zip(reader.images, reader.labels.tolist()):
            file = io.BytesIO()
            Image.fromarray(image).save(file, 'PNG')
            rows.append({'image': {'bytes': file.getvalue(), 'path': None}, 'label': label})
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / 'hub' / 'data' / f'{split}-00000-of-00001.parquet')
    return tmp_path / 'hub'


def test_hub(flags: Flags, hub_folder: Path) -> None:
    """Whole splits, slices, and 'test' where there is no 'validation'."""
    args = flags('--dataset', f'hfds/{hub_folder}')
    for split, ours in (
        ('train', 'train[:60]'),
        ('train[10:20]', 'train[10:20]'),
        ('train[:50%]', 'train[:30]'),
        ('test', 'validation[:30]'),
        ('validation', 'validation[:30]'),
        ('validation[5:]', 'validation[5:30]'),
    ):
        reader = DigitsReader(ours)
        source = open_split(args, split)
        assert source.labels_N is not None and source.labels_N.tolist() == reader.labels.tolist()
        assert source.num_classes == 10 and source.class_names[3] == '3'
        image, label = source.dataset[2]
        assert label == reader.labels[2] and np.array_equal(pixels(image)[:, :, 0], reader.images[2])


def test_streaming_gives_no_labels(flags: Flags, hub_folder: Path) -> None:
    args = flags('--dataset', f'hfids/{hub_folder}', '--train-num-samples', '60', '--mode', 'vanilla')
    source = open_split(args, 'train', is_training=True)
    assert source.labels_N is None and is_streaming(args.dataset)
    assert not is_streaming(f'hfds/{hub_folder}')


def test_digits_are_scikit_learns(flags: Flags) -> None:
    """Both splits together are scikit-learn's images, each once, and each class is split 80:20."""
    original = load_digits()
    expected = np.rint(original.images * (255 / 16)).astype(np.uint8)
    args = flags('--dataset', 'digits')
    splits = {name: open_split(args, name) for name in ('train', 'validation')}
    readers = [source.dataset.reader for source in splits.values()]
    mine = [(image.tobytes(), int(label)) for r in readers for image, label in zip(r.images, r.labels)]
    assert sorted(mine) == sorted((image.tobytes(), int(label)) for image, label in zip(expected, original.target))
    for digit in range(10):
        train, evaluation = ((source.labels_N == digit).sum().item() for source in splits.values())
        assert train / (train + evaluation) == pytest.approx(0.8, abs=0.01)
    whole = splits['train'].labels_N
    assert whole is not None
    for text, part in (('[:500]', slice(500)), ('[20:30]', slice(20, 30)), ('[50%:]', slice(718, None))):
        labels = open_split(args, f'train{text}').labels_N
        assert labels is not None and labels.tolist() == whole.tolist()[part]
    image, label = splits['train'].dataset[5]
    assert np.array_equal(pixels(image)[:, :, 1], readers[0].images[5]) and label == whole[5]


def test_one_pass_to_fill_the_banks(flags: Flags, image_folder: Path) -> None:
    """Every image once, in order, as plain timm's evaluation transform makes it."""
    words = '--img-size 16 --mean 0.3 --std 0.4 -b 7 -j 1 --aa rand-m9 --crop-pct 0.9'
    args = flags('--data-dir', str(image_folder), words)
    config = data_config(args, timm.create_model('test_resnet', num_classes=3))
    loader = RefreshLoader(open_split(args, 'train'), args, config, torch.device('cpu'))
    batches = list(loader)
    files, labels = truth(image_folder / 'train')
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(len(files)))
    assert torch.cat([target for _, target, _ in batches]).tolist() == labels
    transform = create_transform(**{k: v for k, v in config.items()})
    expected = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    assert torch.allclose(torch.cat([images for images, _, _ in batches]), expected, atol=1e-5)


def test_a_label_outside_the_model(flags: Flags) -> None:
    source = open_split(flags('--dataset', 'digits'), 'train')
    check_labels(source, 10, 'train')
    assert source.labels_N is not None
    first = source.labels_N.tolist().index(9)
    with pytest.raises(UserError, match=rf'--num-classes 9: label 9 of image {first} of .* needs at least 10'):
        check_labels(source, 9, 'train')


def bad_folders(root: Path) -> None:
    """Folders next to images/ that can't be used."""
    (root / 'empty').mkdir()
    (root / 'no_images' / 'train' / 'class0').mkdir(parents=True)
    for name in ('no_validation', 'empty_class'):
        (root / name).mkdir()
        (root / name / 'train').symlink_to(root / 'images' / 'train')
    (root / 'images' / 'train' / 'class9').mkdir()
    (root / 'text.txt').write_text('no tar')


@pytest.mark.parametrize(
    'words, split, message',
    [
        ('', 'train', 'name the data'),
        ('--data-dir {}/nowhere', 'train', '--data-dir {}/nowhere: no such folder or file'),
        ('--data-dir {}/empty', 'train', "--data-dir {}/empty, split 'train': Found 0 images"),
        ('--data-dir {}/no_images', 'train', "split 'train': Found 0 images"),
        ('--data-dir {}/no_validation', 'validation', "no split 'validation' in it, only train"),
        ('--data-dir {}/images', 'trian', "no split 'trian' in it, only train, validation"),
        ('--data-dir {}/images', 'train[:10]', "split 'train[:10]' is sliced"),
        ('--data-dir {}/empty_class', 'train', "class folder 'class9' has no images in it"),
        ('--data-dir {}/text.txt', 'train', 'neither a folder nor a tar file'),
        ('--data-dir {}/images --class-map nowhere.txt', 'validation', 'nowhere.txt'),
        ('--dataset digit', 'train', '--dataset digit: no such data set; nearest: digits'),
        ('--dataset foo --data-dir {}/images', 'train', '--dataset foo: no such data set'),
        ('--dataset foo/bar', 'train', "--dataset foo/bar: timm has no reader 'foo'"),
        ('--dataset torch/cifar10', 'train', '--dataset torch/cifar10: name the folder'),
        ('--dataset torch/cifar10 --data-dir {}', 'train', 'Dataset not found'),
        ('--dataset torch/cifar10 --data-dir {} --train-split train[:9]', 'train', 'have slices of splits'),
        ('--dataset digits', 'trian', "--dataset digits: split 'trian'"),
        ('--dataset digits', 'train[2000:]', 'is empty'),
        ('--dataset digits --in-chans 4', 'train', '--in-chans 4: images are converted to RGB'),
        ('--dataset digits --input-img-mode FOO', 'train', '--input-img-mode FOO: unknown to PIL'),
    ],
)
def test_refused(flags: Flags, image_folder: Path, words: str, split: str, message: str) -> None:
    root = image_folder.parent
    bad_folders(root)
    args = flags(*(word.replace('{}', str(root)) for word in words.split()))
    with pytest.raises(UserError) as error:
        open_split(args, split)
    assert message.replace('{}', str(root)) in str(error.value)


@pytest.mark.parametrize(
    'words, split, message',
    [
        ('', 'dev', "has no split 'dev'; it has train, test"),
        ('', 'train[:0]', "split 'train[:0]'"),
        ('--input-key img', 'train', 'no such column as --input-key img; nearest: image; the columns are image, label'),
        ('--target-key lable', 'train', 'no such column as --target-key lable; nearest: label'),
    ],
)
def test_refused_of_the_hub(flags: Flags, hub_folder: Path, words: str, split: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_split(flags('--dataset', f'hfds/{hub_folder}', words), split)
    assert message in str(error.value) and f'hfds/{hub_folder}' in str(error.value)


@pytest.mark.parametrize(
    'words, message',
    [
        ('--mean 0.1 0.2', '--mean 0.1 0.2: 2 values for 3 channel(s); give 3'),
        ('--in-chans 1 --std 0.1 0.2 0.3', '--std 0.1 0.2 0.3: 3 values for 1 channel(s); give 1'),
    ],
)
def test_refused_normalization(flags: Flags, words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        data_config(flags(words), timm.create_model('test_resnet'))
    assert message in str(error.value)


def test_more_images_a_batch_than_there_are(flags: Flags) -> None:
    args = flags('--dataset digits -b 65 -j 0')
    config = {'input_size': (3, 8, 8), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    dataset = open_split(args, 'train[:129]').dataset
    with pytest.raises(UserError, match=r'--batch-size 65 times 2 process\(es\) is more than the 129 .* at most 64'):
        TrainLoader(dataset, args, config, torch.device('cpu'), rank=0, world_size=2)
