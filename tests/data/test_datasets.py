"""Data sets by every reader: labels, classes, pixels, and what is refused."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
from PIL import Image
from sklearn.datasets import load_digits

from ctc_timm.data.cached import cache_split
from ctc_timm.data.datasets import check_labels, is_streaming, match_classes, open_split, open_test, open_validation
from ctc_timm.data.decoding import ReplacingDataset
from ctc_timm.data.digits import DigitsReader
from ctc_timm.data.settings import DataSettings
from ctc_timm.data.transforms import data_config
from ctc_timm.utils.errors import UserError
from images import encoded, picture
from runs import write_folder
from tables import table

DIGITS = DataSettings(dataset='digits')


def truth(folder: Path) -> tuple[list[Path], list[int]]:
    """Files of a folder of class0/, class1/, ... in timm's order, and their labels by name."""
    files = sorted(folder.rglob('*.png'))
    return files, [int(file.parent.name.removeprefix('class')) for file in files]


def labels(data: DataSettings, split: str, **options: Any) -> list[int]:
    labels_N = open_split(data, split, **options).labels_N
    assert labels_N is not None
    return labels_N.tolist()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert('RGB'))


@pytest.mark.parametrize('split, place', [('train', 'train'), ('validation', 'validation'), ('val', 'validation')])
def test_folder(image_folder: Path, split: str, place: str) -> None:
    """Also by a synonym of the split."""
    files, expected = truth(image_folder / place)
    source = open_split(DataSettings(data_dir=str(image_folder)), split)
    assert source.labels_N is not None and source.labels_N.tolist() == expected
    assert source.num_classes == 3 and source.class_names == {i: f'class{i}' for i in range(3)}
    image, label = source.dataset[7]
    assert label == expected[7] and np.array_equal(pixels(image), pixels(Image.open(files[7])))
    flat = DataSettings(data_dir=str(image_folder / place))  # taken for any split where that is allowed
    assert labels(flat, split, unsplit=True) == labels(flat, '', unsplit=False) == expected


@pytest.mark.parametrize('layout', ['tar a split', 'splits in a tar', 'splits in a tar with dots', 'no splits'])
def test_tar(image_folder: Path, tmp_path: Path, layout: str) -> None:
    """The same labels and pixels as from the folder that was packed."""
    if layout == 'tar a split':
        root = tmp_path / 'tars'
        root.mkdir()
        packed = {f'{split}.tar': (image_folder / split, '') for split in ('train', 'validation')}
    else:
        root = tmp_path / 'all.tar'
        place = '.' if layout == 'splits in a tar with dots' else ''
        packed = {'': (image_folder / 'train' if layout == 'no splits' else image_folder, place)}
    for name, (folder, place) in packed.items():
        with tarfile.open(root / name if name else root, 'w') as tar:
            for part in [folder] if place else sorted(folder.iterdir()):
                tar.add(part, place or part.name)
    for split in ('train',) if layout == 'no splits' else ('train', 'validation'):
        files, expected = truth(image_folder / split)
        source = open_split(DataSettings(data_dir=str(root)), split)
        assert source.labels_N is not None and source.labels_N.tolist() == expected
        assert source.class_names == {i: f'class{i}' for i in range(3)}
        for i in (0, len(files) // 2, len(files) - 1):
            image, label = source.dataset[i]
            assert label == expected[i] and np.array_equal(pixels(image), pixels(Image.open(files[i])))
            assert ReplacingDataset(source.dataset).name(i).endswith(f'class{label}/{files[i].name}')


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the Hub's layout, parquet, with splits train and test, made of digits."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=list('0123456789'))})
    for split, ours in (('train', 'train[:60]'), ('test', 'validation[:30]')):
        reader = DigitsReader(ours)
        images = [{'bytes': encoded(Image.fromarray(image), 'PNG'), 'path': None} for image in reader.images]
        table = datasets.Dataset.from_dict({'image': images, 'label': reader.targets}, features=features)
        table.to_parquet(tmp_path / 'hub' / 'data' / f'{split}-00000-of-00001.parquet')
    return tmp_path / 'hub'


def test_hub(hub_folder: Path) -> None:
    """Whole splits, slices, and 'test' where there is no 'validation'."""
    for split, ours in {
        'train': 'train[:60]',
        'train[10:20]': 'train[10:20]',
        'train[:50%]': 'train[:30]',
        'test': 'validation[:30]',
        'validation': 'validation[:30]',
        'validation[5:]': 'validation[5:30]',
    }.items():
        reader = DigitsReader(ours)
        source = open_split(DataSettings(dataset=f'hfds/{hub_folder}'), split)
        assert source.labels_N is not None and source.labels_N.tolist() == reader.targets
        assert source.num_classes == 10 and source.class_names[3] == '3'
        image, label = source.dataset[2]
        assert label == reader.targets[2] and np.array_equal(pixels(image)[:, :, 0], reader.images[2])
    stream = DataSettings(dataset=f'hfids/{hub_folder}', train_num_samples=60)
    assert open_split(stream, 'train', is_training=True).labels_N is None
    assert is_streaming(stream.dataset) and not is_streaming(f'hfds/{hub_folder}')


def test_digits_are_scikit_learns() -> None:
    """Both splits together are scikit-learn's images, each once, and each class is split 80:20."""
    original = load_digits()
    expected = np.rint(original.images * (255 / 16)).astype(np.uint8)
    splits = {name: open_split(DIGITS, name) for name in ('train', 'validation')}
    readers = [source.dataset.reader for source in splits.values()]
    mine = [(image.tobytes(), label) for r in readers for image, label in zip(r.images, r.targets)]
    assert sorted(mine) == sorted((image.tobytes(), int(label)) for image, label in zip(expected, original.target))
    for digit in range(10):
        train, evaluation = ((source.labels_N == digit).sum().item() for source in splits.values())
        assert train / (train + evaluation) == pytest.approx(0.8, abs=0.01)
    for text, part in (('[:500]', slice(500)), ('[20:30]', slice(20, 30)), ('[50%:]', slice(718, None))):
        assert labels(DIGITS, f'train{text}') == readers[0].targets[part]
    image, label = splits['train'].dataset[5]
    assert np.array_equal(pixels(image)[:, :, 1], readers[0].images[5]) and label == readers[0].targets[5]


def test_a_label_beyond_the_model() -> None:
    source = open_split(DIGITS, 'train')
    check_labels(source, 10, 'train')
    first = labels(DIGITS, 'train').index(9)
    with pytest.raises(UserError, match=rf'`num_classes` 9: image {first} of .* has label 9; .* at least 10'):
        check_labels(source, 9, 'train')


@pytest.mark.parametrize(
    'data, split, message',
    [
        ({}, 'train', 'name the data'),
        ({'data_dir': '{}/nowhere'}, 'train', '`data_dir` {}/nowhere: no such folder or file'),
        ({'data_dir': '{}/empty'}, 'train', "`data_dir` {}/empty, split 'train': Found 0 images"),
        ({'data_dir': '{}/no_validation'}, 'validation', "no split 'validation' in it, only train"),
        ({'data_dir': '{}/images'}, 'trian', "no split 'trian' in it, only train, validation"),
        ({'data_dir': '{}/images'}, 'train[:10]', "split 'train[:10]' is sliced"),
        ({'data_dir': '{}/empty_class'}, 'train', "class folder 'class9' has no images in it"),
        ({'data_dir': '{}/text.txt'}, 'train', 'neither a folder nor a tar file'),
        ({'data_dir': '{}/images', 'class_map': 'nowhere.txt'}, 'validation', 'nowhere.txt'),
        ({'dataset': 'digit'}, 'train', '`dataset` digit: no such data set; nearest: digits'),
        ({'dataset': 'foo/bar'}, 'train', "`dataset` foo/bar: timm has no reader 'foo'"),
        ({'dataset': 'torch/cifar10'}, 'train', '`dataset` torch/cifar10: name the folder'),
        ({'dataset': 'torch/cifar10', 'data_dir': '{}'}, 'train', 'Dataset not found'),
        ({'dataset': 'torch/cifar10', 'data_dir': '{}', 'train_split': 'train[:9]'}, 'train', 'slices of splits'),
        ({'dataset': 'digits'}, 'train[2000:]', 'is empty'),
        ({'dataset': 'digits', 'in_chans': 4}, 'train', '`in_chans` 4: images are converted to RGB'),
        ({'dataset': 'digits', 'input_img_mode': 'FOO'}, 'train', '`input_img_mode` FOO: unknown to PIL'),
    ],
)
def test_refused(image_folder: Path, data: dict[str, Any], split: str, message: str) -> None:
    root = image_folder.parent
    (root / 'empty').mkdir()
    for name in ('no_validation', 'empty_class'):
        (root / name).mkdir()
        (root / name / 'train').symlink_to(root / 'images' / 'train')
    (root / 'images' / 'train' / 'class9').mkdir()
    (root / 'text.txt').write_text('no tar')
    data = {key: value.replace('{}', str(root)) if isinstance(value, str) else value for key, value in data.items()}
    with pytest.raises(UserError) as error:
        open_split(DataSettings(**data), split)
    assert message.replace('{}', str(root)) in str(error.value)


@pytest.mark.parametrize(
    'data, split, message',
    [
        ({}, 'dev', "has no split 'dev'; it has train, test"),
        ({}, 'train[:0]', "split 'train[:0]'"),
        ({'input_key': 'img'}, 'train', '`input_key` img; nearest: image; the columns are image, label'),
        ({'target_key': 'lable'}, 'train', '`target_key` lable; nearest: label'),
    ],
)
def test_refused_of_the_hub(hub_folder: Path, data: dict[str, Any], split: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_split(DataSettings(dataset=f'hfds/{hub_folder}', **data), split)
    assert message in str(error.value) and f'hfds/{hub_folder}' in str(error.value)


def test_refused_normalization() -> None:
    with pytest.raises(UserError, match=r'`std` 0.1 0.2 0.3: 3 values for 1 channel\(s\); give 1'):
        data_config(DataSettings(in_chans=1, std=(0.1, 0.2, 0.3)), timm.create_model('test_resnet', in_chans=1))


def test_class_map(tmp_path: Path) -> None:
    """Without a label of a table it is refused; folders that it leaves out are not wanted, as in timm."""
    mapping = tmp_path / 'map.txt'
    mapping.write_text('class2\nclass0\n')
    with pytest.raises(UserError, match='`class_map` has no class for the label 0'):
        data = table(tmp_path / 'set', [0, 1, 2])
        open_split(DataSettings(dataset=data.dataset, class_map=str(mapping)), 'train')
    write_folder(tmp_path / 'images' / 'train', 'train', 4)
    source = open_split(DataSettings(data_dir=str(tmp_path / 'images'), class_map=str(mapping)), 'train')
    assert source.labels_N is not None and source.labels_N.tolist() == [1] * 4 + [0] * 4
    named = ReplacingDataset(source.dataset)
    assert {Path(named.name(i)).parent.name for i in range(8)} == {'class0', 'class2'}


@pytest.mark.parametrize('root', ['images', './images', '{}/images/'])
def test_images_outside_of_all_class_folders(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm would make a class of them that moves the numbers of all others."""
    write_folder(tmp_path / 'images', 'train', 4)
    for name in ('stray.png', 'astray.png'):
        (tmp_path / 'images' / name).write_bytes((tmp_path / 'images' / 'class0' / '000.png').read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_split(DataSettings(data_dir=root.replace('{}', str(tmp_path))), 'train')
    assert '2 of 14 images lie in no class folder, the first is ' in str(error.value)
    assert str(error.value).endswith('astray.png; put each into the folder of its class')


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """Whichever folders a split lacks, its images have the labels of training; unknown classes are refused."""
    for split in ('train', 'validation'):
        write_folder(tmp_path / split, split, 3)
    data, val = DataSettings(data_dir=str(tmp_path)), tmp_path / 'validation'
    train = open_split(data, 'train')
    for missing in ((), ('class2',), ('class0',), ('class0', 'class1')):
        for name in missing:
            (val / name).rename(tmp_path / name)
        source = open_validation(data, train)
        assert source is not None and source.labels_N is not None and source.num_classes == 3
        expected = [i for i in range(3) if f'class{i}' not in missing for _ in range(3)]
        assert source.labels_N.tolist() == expected == [source.dataset[i][1] for i in range(len(source.dataset))]
        assert source.class_names == train.class_names
        for name in missing:
            (tmp_path / name).rename(val / name)
    (val / 'class1').rename(val / 'class1b')
    with pytest.raises(UserError, match="class 'class1b' is missing in the training split; nearest: class1,.* both"):
        open_validation(data, train)


def test_classes_of_the_hub_are_matched_by_name(tmp_path: Path) -> None:
    """Also where two sets list the same names in another order, and through a cache."""
    splits = []
    for names in (['dog', 'cat', 'fox'], ['fox', 'dog', 'cat']):
        image = {'bytes': encoded(Image.fromarray(picture()), 'PNG'), 'path': None}
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict({'image': [image] * 4, 'label': [0, 2, 1, 0]}, features=features)
        table.to_parquet(tmp_path / names[0] / 'train.parquet')
        splits.append(open_split(DataSettings(dataset=f'hfds/{tmp_path / names[0]}'), 'train'))
    matched = match_classes(splits[1], splits[0].class_names)
    wanted = [2, 1, 0, 2]  # fox, cat, dog, fox
    assert matched.labels_N is not None and matched.labels_N.tolist() == wanted
    assert [matched.dataset[i][1] for i in range(4)] == wanted
    assert [cache_split(matched).dataset[i][1] for i in range(4)] == wanted


@pytest.mark.parametrize(
    'data, message',
    [
        ({'val_split': ''}, "`val_split` ''"),
        ({}, "no split 'validation' in it, only train"),
        ({'dataset': 'hfds/{}/hub', 'data_dir': None}, "has no split 'validation'; it has train"),
    ],
)
def test_without_a_validation_split(tmp_path: Path, data: dict[str, Any], message: str, caplog: Any) -> None:
    """It is said, and never are the training images validated on; a split that was named must be there."""
    write_folder(tmp_path / 'images' / 'train', 'train', 2)
    table(tmp_path / 'hub', [0, 1])
    values = {'data_dir': str(tmp_path / 'images'), **data}
    values = {key: value.replace('{}', str(tmp_path)) if value else value for key, value in values.items()}
    settings = DataSettings(**values)
    train = open_split(settings, 'train')
    with caplog.at_level('INFO'):
        assert open_validation(settings, train) is None
    assert message in caplog.text and 'training without evaluation' in caplog.text
    with pytest.raises(UserError, match=r"`val_split` ''|no split 'validation'"):  # as transfer and fine-tuning need it
        open_test(settings, train.class_names)
    with pytest.raises(UserError, match="no split 'testing'"):
        open_validation(replace(settings, val_split='testing'), train)


def test_configurations_of_the_hub(tmp_path: Path) -> None:
    """By hfds/NAME:CONFIG, map-style and streamed; a missing or unknown one is refused with those that there are."""
    cards = []
    for config, values in (('small', [0, 1]), ('large', [1, 1, 0, 2])):
        table(tmp_path / 'set' / config, values)
        cards.append(f'- config_name: {config}\n  data_files: {config}/train.parquet\n')
    (tmp_path / 'set' / 'README.md').write_text(f'---\nconfigs:\n{"".join(cards)}---\n')
    for config, expected in (('small', [0, 1]), ('large', [1, 1, 0, 2])):
        data = DataSettings(dataset=f'hfds/{tmp_path / "set"}:{config}')
        assert labels(data, 'train') == expected
        stream = DataSettings(dataset=f'hfids/{tmp_path / "set"}:{config}', train_num_samples=len(expected))
        assert open_split(stream, 'train').dataset.reader.builder.config.name == config
    for name in ('', ':medium'):
        with pytest.raises(UserError, match='small.*large'):
            open_split(DataSettings(dataset=f'hfds/{tmp_path / "set"}{name}'), 'train')
