"""A split of a data set, opened by timm's readers and checked before anything trains on it."""

from __future__ import annotations

import math
import os
import sys
import tarfile
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from PIL import ImageMode
from timm.data import IterableImageDataset, create_dataset
from timm.data.readers import get_img_extensions
from torch import Tensor

from ..utils.errors import UserError, nearest, one_line
from . import digits
from .settings import DataSettings

STREAMING = ('hfids', 'tfds', 'wds')
READERS = ('hfds', 'torch', *STREAMING)
FOLDER_NAMES = ('', 'folder', 'tar', 'imagefolder', 'image_folder', 'imagetar', 'image_tar')
logger = get_logger(__name__)
SYNONYMS = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation', 'test'))


@dataclass
class DatasetSplit:
    """A split of a data set, checked.

    Attributes:
        dataset: timm's dataset.
        labels_N: Class of each image, [N]; None for streams.
        num_classes: Classes that the set declares, or that its labels show.
        name: Of the data set or folder.
        class_names: Name of each class where the set gives one, by class.
    """

    dataset: Any
    labels_N: Tensor | None
    num_classes: int | None
    name: str
    class_names: dict[int, str]


def is_streaming(name: str) -> bool:
    """Whether a data set's name asks for one of timm's streaming readers."""
    reader, slash, _ = name.lower().partition('/')
    return bool(slash) and reader in STREAMING


def image_mode(data: DataSettings) -> str:
    """The PIL mode that images are converted to: `input_img_mode`, or by the number of channels.

    Raises:
        UserError: An unknown mode, or one with another number of channels than the model's input.
    """
    channels = data.input_size[0] if data.input_size else data.in_chans or 3
    mode = data.input_img_mode or ('L' if channels == 1 else 'RGB')
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError:
        raise UserError(f'`input_img_mode` {mode}: unknown to PIL; use RGB, L, RGBA, CMYK, ...') from None
    if bands != channels:
        raise UserError(
            f'`in_chans` {channels}: images are converted to {mode}, which has {bands} channels; '
            f'name a mode of {channels} with `input_img_mode`'
        )
    return mode


def open_split(
    data: DataSettings,
    split: str,
    *,
    is_training: bool = False,
    batch_size: int = 1,
    unsplit: bool = True,
    labeled: bool = True,
) -> DatasetSplit:
    """Open a split, and read its labels without decoding images.

    Args:
        data: Where images come from.
        split: Name of the split.
        is_training: For streams, whether to shuffle.
        batch_size: A hint for streams.
        unsplit: Whether a folder or tar file that holds no splits at all may be taken for this one.
        labeled: Whether labels are needed. Without, `labels_N` is None where they are missing, which is logged.

    Raises:
        UserError: Nothing there, an empty class folder, a split that does not exist, labels missing.
    """
    name, mode = data.dataset, image_mode(data)
    if name == digits.NAME:
        try:
            return _checked(digits.create_digits(split, mode), f'`dataset` {name}', name)
        except UserError as error:
            raise UserError(f'`dataset` {name}: {error}') from None
    _check_name(data)
    inside, root = None, data.data_dir
    options: dict[str, Any] = {'class_map': data.class_map}
    from_reader = '/' in name
    if from_reader:
        what = f'`dataset` {name}'
        split = _available_split(name, split)
        options |= {'input_key': data.input_key, 'target_key': data.target_key}
        if is_streaming(name):
            options['num_samples'] = data.train_num_samples if is_training else data.val_num_samples
    else:
        what = f'`data_dir` {root}'
        root, inside = _root_of_split(str(root), split, unsplit)
    what = f'{what}, split {split!r}'
    try:
        dataset = create_dataset(
            name if from_reader else '',
            root=root,
            split=split,
            search_split=from_reader,
            is_training=is_training,
            download=data.dataset_download,
            batch_size=batch_size,
            input_img_mode=mode,
            **options,
        )
    except ImportError as error:
        raise UserError(
            f"{what}: needs a package that is not installed ({error}); pip install 'ctc-timm[data]'"
        ) from None
    except Exception as error:  # readers, and the packages behind them, raise anything where data are not as expected
        unknown_length = is_streaming(name) and options['num_samples'] is None
        hint = '; where its length is unknown, give `train_num_samples` and `val_num_samples`' * unknown_length
        raise UserError(f'{what}: {one_line(error)}{hint}') from None
    return _checked(dataset, what, name if from_reader else str(data.data_dir), inside, data.class_map, labeled)


def check_labels(source: DatasetSplit, num_classes: int, split: str) -> None:
    """Refuse a label that the model has no output for.

    Raises:
        UserError: Naming the first such image.
    """
    if source.labels_N is not None and len(outside := (source.labels_N >= num_classes).nonzero()):
        i = int(outside[0])
        raise UserError(
            f'`num_classes` {num_classes}: label {int(source.labels_N[i])} of image {i} of split {split!r} is too '
            f'large; {source.name} needs at least {int(source.labels_N.max()) + 1}'
        )


def check_classes(train: DatasetSplit, val: DatasetSplit) -> None:
    """Refuse a validation split whose classes have other numbers than those of the training split.

    timm numbers class folders split by split, so a folder that one of them lacks moves all that follow.

    Raises:
        UserError: Naming the first class that differs.
    """
    for index, name in sorted(val.class_names.items()):
        known = train.class_names.get(index)
        if train.class_names and known != name:
            there = f'is {known!r}' if known is not None else 'is missing'
            raise UserError(
                f'{val.name}: class {index} of the validation split, {name!r}, {there} in the training split; '
                f'both must have the same classes, or name their order with `class_map`'
            )


def _check_name(data: DataSettings) -> None:
    name, root = data.dataset, data.data_dir
    reader, slash, rest = name.partition('/')
    what = f'`dataset` {name}'
    if not name and not root:
        raise UserError('name the data: `dataset` (digits, hfds/..., torch/...) or `data_dir`')
    if slash and reader.lower() not in READERS:
        near = nearest(reader, READERS)
        raise UserError(f'{what}: timm has no reader {reader!r}{near}; it has {", ".join(READERS)}')
    if slash and not rest.strip('/ '):
        raise UserError(f'{what}: names no data set of {reader}; use {reader}/NAME')
    if not slash and name.lower() not in FOLDER_NAMES:
        raise UserError(
            f'{what}: no such data set{nearest(name, (digits.NAME, *READERS))}; use digits, '
            f'{"/NAME, ".join(READERS)}/NAME, or a folder given by `data_dir`'
        )
    if reader.lower() == 'torch' and any('[' in text for text in (data.train_split, data.val_split)):
        raise UserError(f'{what}: only hfds/NAME and digits have slices of splits; name whole splits')
    if reader.lower() == 'torch' and not root:
        raise UserError(f'{what}: name the folder that it is in, or is to be in, with `data_dir`')
    if not slash and not root:
        raise UserError(f'{what}: name the folder or tar file with `data_dir`')
    if not slash and not Path(str(root)).exists():
        raise UserError(f'`data_dir` {root}: no such folder or file')


def _synonyms(split: str) -> tuple[str, ...]:
    """The names that a split may go by, its own first."""
    known = next((names for names in SYNONYMS if split in names), ())
    return (split, *(name for name in known if name != split))


def _root_of_split(root: str, split: str, unsplit: bool) -> tuple[str, str | None]:
    """Find a split of a folder of images, or of a tar file.

    timm takes the whole folder when it finds no split in it, and so would validate on the training images.

    Returns:
        The folder or tar file, and for a tar file with splits in it, the split's folder there.
    """
    what, path = f'`data_dir` {root}', Path(root)
    if '[' in split:
        raise UserError(f'{what}: split {split!r} is sliced, which only hfds/NAME and digits can be')
    inside = set()
    if path.is_file():
        try:
            with tarfile.open(path) as tar:
                inside = {member.name.removeprefix('./').split('/')[0] for member in tar if member.isfile()}
        except (tarfile.TarError, OSError) as error:
            raise UserError(f'{what}: neither a folder nor a tar file ({one_line(error)})') from None
        if path.suffix.lower() != '.tar':
            raise UserError(f'{what}: must end in .tar to be read as a tar file')
    if not split:
        return root, None
    for name in _synonyms(split):
        if name in inside:
            return root, name
        if (path / name).is_dir():
            return str(path / name), None
        if (path / f'{name}.tar').is_file():
            return str(path / f'{name}.tar'), None
    words = [name for names in SYNONYMS for name in names]
    there = [w for w in words if w in inside or (path / w).is_dir() or (path / f'{w}.tar').is_file()]
    if unsplit and not there and split in words:
        return root, None
    raise UserError(
        f'{what}: no split {split!r} in it'
        + (f', only {", ".join(there)}' if there else '')
        + f"; put its class folders into {split}/ there, or name another with `train_split` or `val_split` ('' for "
        f'all images)'
    )


def _available_split(name: str, split: str) -> str:
    """The same split by the name a data set on the Hub gives it: many have 'test' but no 'validation'."""
    if not name.lower().startswith(('hfds/', 'hfids/')):
        return split
    try:
        import datasets
    except ImportError:
        raise UserError(f"`dataset` {name}: needs the package datasets; pip install 'ctc-timm[data]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    wanted, bracket, rest = split.partition('[')
    try:
        known = datasets.get_dataset_split_names(name.split('/', 1)[1])
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f'`dataset` {name}: {one_line(error)}') from None
    except Exception:  # the error of opening the data set says better what is wrong with it
        return split
    if wanted in known:
        return split
    if wanted in SYNONYMS[1]:
        for other in _synonyms(wanted):
            if other in known:
                return other + bracket + rest
    raise UserError(f'`dataset` {name} has no split {wanted!r}; it has {", ".join(known)}')


def _checked(
    dataset: Any, what: str, name: str, inside: str | None = None, class_map: str = '', labeled: bool = True
) -> DatasetSplit:
    """A dataset with its labels and classes."""
    reader = getattr(dataset, 'reader', dataset)
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    names = {int(index): str(word) for word, index in classes.items()}
    if isinstance(dataset, IterableImageDataset):
        return DatasetSplit(dataset, None, len(names) or None, name, names)
    _check_columns(reader, what, labeled)
    if inside:  # of a tar file's images keep those in one of its folders
        keep = [sample[0].path.removeprefix('./').startswith(f'{inside}/') for sample in reader.samples]
        reader.samples, reader.targets = reader.samples[keep], reader.targets[keep]
    try:
        _check_class_folders(reader, what, class_map)
        labels_N = _labels(dataset, what)
    except UserError as error:
        if labeled or not len(dataset):
            raise
        logger.info(f'without labels: {error}')
        if hasattr(reader, 'label_key'):  # timm would read them with each image
            reader.label_key, reader.target_keys, reader.remap_class = 'no label', [], False
            reader.dataset = reader.dataset.add_column('no label', [-1] * len(reader.dataset))
        return DatasetSplit(dataset, None, None, name, {})
    return DatasetSplit(dataset, labels_N, max(int(labels_N.max()), max(names, default=-1)) + 1, name, names)


def _check_columns(reader: Any, what: str, labeled: bool) -> None:
    """Refuse a column that a Hugging Face data set does not have; timm's reader adds an empty one by that name."""
    if not hasattr(reader, 'image_key'):
        return
    columns = set(reader.dataset.column_names)
    if not isinstance(reader.dataset[0].get(reader.image_key), dict):
        columns -= {reader.image_key}
    for name, column in (('input_key', reader.image_key), ('target_key', reader.label_key))[: 1 + labeled]:
        if not columns & {column, *column.split(','), column.split('.')[0]}:
            raise UserError(
                f'{what}: no such column as `{name}` {column}{nearest(column, columns)}; '
                f'the columns are {", ".join(sorted(columns))}'
            )


def _check_class_folders(reader: Any, what: str, class_map: str) -> None:
    """Refuse images outside of all class folders, and a class folder without images.

    timm would quietly make a class of the former, which moves all others by one, and leave the latter out. A class
    map may leave out folders: those are not asked for.
    """
    root = getattr(reader, 'root', None)
    if not root or not hasattr(reader, 'samples') or not Path(root).is_dir():
        return
    used = {os.path.dirname(os.path.realpath(sample[0])) for sample in reader.samples}
    top = os.path.normpath(root)
    outside = [sample[0] for sample in reader.samples if os.path.normpath(os.path.dirname(sample[0])) == top]
    if outside:
        raise UserError(
            f'{what}: {len(outside):,} of {len(reader.samples):,} images lie in no class folder, the first is '
            f'{outside[0]}; put each into the folder of its class'
        )
    for folder in sorted(p for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith('.')):
        real = os.path.realpath(folder)
        if class_map and folder.name not in reader.class_to_idx:
            continue
        if not any(path == real or path.startswith(real + os.sep) for path in used):
            types = ', '.join(get_img_extensions())
            raise UserError(f'{what}: class folder {folder.name!r} has no images in it, of the types {types}')


def _labels(dataset: Any, what: str) -> Tensor:
    """The labels in order, [N]."""
    reader = getattr(dataset, 'reader', dataset)
    try:
        if hasattr(reader, 'iter_targets'):
            labels = list(reader.iter_targets())
        elif hasattr(reader, 'targets'):  # tar files and torchvision's data sets
            labels = list(reader.targets)
        elif hasattr(reader, 'samples'):
            labels = [sample[1] for sample in reader.samples]
        else:
            labels = [dataset[i][1] for i in range(len(dataset))]
    except KeyError as error:
        if getattr(reader, 'remap_class', False):
            raise UserError(f'{what}: `class_map` has no class for the label {error}') from None
        raise UserError(f'{what}: no column {error} of labels; name it with `target_key`') from None
    if not labels:
        raise UserError(f'{what}: no images')
    labels = [label.item() if isinstance(label, Tensor) and label.ndim == 0 else label for label in labels]
    numbers = [math.nan if label is None else label for label in labels]
    missing = [i for i, number in enumerate(numbers) if isinstance(number, Real) and not float(number) >= 0]
    if missing:
        raise UserError(
            f'{what}: {len(missing):,} of {len(labels):,} images have no label, the first is image {missing[0]}; '
            f'leave them out of the set'
        )
    try:
        return torch.as_tensor([int(label) for label in labels])
    except (TypeError, ValueError):
        raise UserError(f'{what}: labels must be class numbers, one an image') from None
