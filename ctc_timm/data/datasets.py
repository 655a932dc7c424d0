"""A split of a data set, opened by timm's readers and checked before anything trains on it."""

from __future__ import annotations

import math
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers import get_img_extensions
from torch import Tensor

from ..utils.errors import UserError, nearest, one_line
from . import digits
from .settings import DataSettings

STREAMING = ('hfids', 'tfds', 'wds')
READERS = ('hfds', 'torch', *STREAMING)
FOLDER_NAMES = ('', 'folder', 'tar', 'imagefolder', 'image_folder', 'imagetar', 'image_tar')
SYNONYMS = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation', 'test'))

logger = get_logger(__name__)


@dataclass
class DatasetSplit:
    """A split of a data set, checked."""

    dataset: Any  # timm's
    labels_N: Tensor | None  # class of each image, [N]; None for streams
    num_classes: int | None  # that the set declares, or that its labels show
    name: str  # of the data set or folder
    class_names: dict[int, str]  # by class, where the set gives them


def is_streaming(name: str) -> bool:
    """Whether a data set's name asks for one of timm's streaming readers."""
    return name.lower().startswith(tuple(f'{reader}/' for reader in STREAMING))


def image_mode(data: DataSettings) -> str:
    """The PIL mode that images are converted to: `input_img_mode`, which must fit the channels, or by their number."""
    channels = data.input_size[0] if data.input_size else data.in_chans or 3
    mode = data.input_img_mode or ('L' if channels == 1 else 'RGB')
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError:
        raise UserError(f'`input_img_mode` {mode}: unknown to PIL; use RGB, L, RGBA, CMYK, ...') from None
    if bands != channels:
        fault = f'images are converted to {mode}, which has {bands} channels'
        raise UserError(f'`in_chans` {channels}: {fault}; name a mode of {channels} with `input_img_mode`')
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
        is_training, batch_size: For streams, whether to shuffle, and a hint.
        unsplit: Whether a folder or tar file that holds no splits at all may be taken for this one.
        labeled: Whether labels are needed. Without, `labels_N` is None where they are missing, which is logged.

    Raises:
        UserError: Nothing there, an empty class folder, a split that does not exist, labels missing.
    """
    name, mode = data.dataset, image_mode(data)
    if name == digits.NAME:
        dataset = ImageDataset(root=None, reader=digits.DigitsReader(split), input_img_mode=mode)
        return _checked(dataset, f'`dataset` {name}', name)
    _check_name(data)
    root, inside = data.data_dir, None
    options: dict[str, Any] = {'class_map': data.class_map, 'download': data.dataset_download, 'input_img_mode': mode}
    if by_reader := '/' in name:
        split = _available_split(name, split) if name.lower().startswith(('hfds/', 'hfids/')) else split
        options |= {'input_key': data.input_key, 'target_key': data.target_key}
        if is_streaming(name):
            options |= {'is_training': is_training, 'batch_size': batch_size}
            options['num_samples'] = data.train_num_samples if is_training else data.val_num_samples
    else:
        root, inside = _root_of_split(str(root), split, unsplit)
    what = f'`dataset` {name}, split {split!r}' if by_reader else f'`data_dir` {data.data_dir}, split {split!r}'
    try:
        dataset = create_dataset(name if by_reader else '', root, split=split, search_split=by_reader, **options)
    except ImportError as error:
        raise UserError(f"{what}: a package is missing ({error}); pip install 'ctc-timm[data]'") from None
    except Exception as error:  # readers, and the packages behind them, raise anything where data are not as expected
        hint = '; `train_num_samples` and `val_num_samples` may give its length' if is_streaming(name) else ''
        raise UserError(f'{what}: {one_line(error)}{hint}') from None
    return _checked(dataset, what, name if by_reader else str(data.data_dir), inside, data.class_map, labeled)


def check_labels(source: DatasetSplit, num_classes: int, split: str) -> None:
    """Refuse a label that the model has no output for, by a `UserError` that names the first such image."""
    labels_N = source.labels_N
    if labels_N is not None and (largest := int(labels_N.max())) >= num_classes:
        i = int((labels_N >= num_classes).nonzero()[0])
        first = f'image {i} of split {split!r} of {source.name} has label {int(labels_N[i])}'
        raise UserError(f'`num_classes` {num_classes}: {first}; give at least {largest + 1}')


def check_classes(train: DatasetSplit, val: DatasetSplit) -> None:
    """Refuse, by a `UserError`, a validation split whose classes have other numbers than those of the training split.

    timm numbers class folders split by split, so a folder that one of them lacks moves all that follow.
    """
    for index, name in sorted(val.class_names.items()) if train.class_names else ():
        if (known := train.class_names.get(index)) != name:
            there = f'is {known!r}' if known is not None else 'is missing'
            fault = f'{val.name}: class {index} of the validation split, {name!r}, {there} in the training split'
            raise UserError(f'{fault}; both must have the same classes, or name their order with `class_map`')


def _check_name(data: DataSettings) -> None:
    """Refuse a data set's name that no reader takes, or a folder that is not there."""
    name, root = data.dataset, data.data_dir
    reader, slash, _ = name.lower().partition('/')
    known = f'digits, {"/NAME, ".join(READERS)}/NAME, or a folder in `data_dir`'
    if not name and not root:
        raise UserError('name the data: `dataset` (digits, hfds/..., torch/...) or `data_dir`')
    if slash and reader not in READERS:
        raise UserError(f'`dataset` {name}: timm has no reader {reader!r}{nearest(reader, READERS)}; use {known}')
    if not slash and reader not in FOLDER_NAMES:
        near = nearest(name, (digits.NAME, *READERS))
        raise UserError(f'`dataset` {name}: no such data set{near}; use {known}')
    if reader == 'torch' and '[' in data.train_split + data.val_split:
        raise UserError(f'`dataset` {name}: only hfds/NAME and digits have slices of splits; name whole splits')
    if not root and (reader == 'torch' or not slash):
        raise UserError(f'`dataset` {name}: name the folder that it is in, or is to be in, with `data_dir`')
    if not slash and not Path(str(root)).exists():
        raise UserError(f'`data_dir` {root}: no such folder or file')


def _synonyms(split: str) -> list[str]:
    """The names that a split may go by, itself first."""
    return [split, *(name for names in SYNONYMS if split in names for name in names)]


def _root_of_split(root: str, split: str, unsplit: bool) -> tuple[str, str | None]:
    """Find a split's folder or tar file, and for a tar file with splits in it, the split's folder there.

    timm takes all images when it finds no split in the folder, and so would validate on the training images.
    """
    what, path, inside = f'`data_dir` {root}', Path(root), set()
    if '[' in split:
        raise UserError(f'{what}: split {split!r} is sliced, which only hfds/NAME and digits can be')
    if path.is_file():
        try:
            with tarfile.open(path) as tar:
                inside = {member.name.removeprefix('./').split('/')[0] for member in tar if member.isfile()}
        except (tarfile.TarError, OSError) as error:
            raise UserError(f'{what}: neither a folder nor a tar file ({one_line(error)})') from None
        if path.suffix.lower() != '.tar':
            raise UserError(f'{what}: must end in .tar to be read as a tar file')

    known = sum(SYNONYMS, ())
    places: dict[str, tuple[str, str | None]] = {}
    for name in (split, *known):
        if name in inside:
            places[name] = root, name
        elif (path / name).is_dir():
            places[name] = str(path / name), None
        elif (path / f'{name}.tar').is_file():
            places[name] = str(path / f'{name}.tar'), None
    for name in _synonyms(split):
        if name in places:
            return places[name]
    if not split or (unsplit and not places and split in known):
        return root, None
    found = f'no split {split!r} in it{", only " * bool(places)}{", ".join(places)}'
    other = "name another with `train_split` or `val_split` ('' for all images)"
    raise UserError(f'{what}: {found}; put its class folders into {split}/ there, or {other}')


def _available_split(name: str, split: str) -> str:
    """The same split by the name a data set on the Hub gives it: many have 'test' but no 'validation'."""
    wanted, bracket, rest = split.partition('[')
    try:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        known = datasets.get_dataset_split_names(name.split('/', 1)[1])
    except Exception:  # the error of opening the data set says better what is wrong
        return split
    for other in _synonyms(wanted):
        if other in known:
            return other + bracket + rest
    raise UserError(f'`dataset` {name} has no split {wanted!r}; it has {", ".join(known)}')


def _checked(
    dataset: Any, what: str, name: str, inside: str | None = None, class_map: str = '', labeled: bool = True
) -> DatasetSplit:
    """Check a dataset, and read its labels and classes."""
    reader = getattr(dataset, 'reader', dataset)
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    names = {int(index): str(word) for word, index in classes.items()}
    if isinstance(dataset, IterableImageDataset):
        return DatasetSplit(dataset, None, len(names) or None, name, names)
    if hasattr(reader, 'image_key'):
        _check_columns(reader, what, labeled)
    if inside:  # of a tar file's images keep those in one of its folders
        keep = [sample[0].path.removeprefix('./').startswith(f'{inside}/') for sample in reader.samples]
        reader.samples, reader.targets = reader.samples[keep], reader.targets[keep]
    try:
        if hasattr(reader, 'samples') and Path(getattr(reader, 'root', None) or '').is_dir():
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
    columns = set(reader.dataset.column_names)
    if not isinstance(reader.dataset[0].get(reader.image_key), dict):
        columns -= {reader.image_key}
    for name, column in (('input_key', reader.image_key), ('target_key', reader.label_key))[: 1 + labeled]:
        if not columns & {column, *column.split(','), column.split('.')[0]}:
            near, known = nearest(column, columns), ', '.join(sorted(columns))
            raise UserError(f'{what}: no such column as `{name}` {column}{near}; the columns are {known}')


def _check_class_folders(reader: Any, what: str, class_map: str) -> None:
    """Refuse images outside of all class folders, and a class folder without images.

    timm would make a class of the former, which moves all others by one, and leave the latter out. A class map may
    leave out folders: those are not asked for.
    """
    root, folders = os.path.normpath(reader.root), {os.path.dirname(sample[0]) for sample in reader.samples}
    top = {folder for folder in folders if os.path.normpath(folder) == root}
    outside = [sample[0] for sample in reader.samples if os.path.dirname(sample[0]) in top]
    if outside:
        count = f'{len(outside):,} of {len(reader.samples):,} images lie in no class folder'
        raise UserError(f'{what}: {count}, the first is {outside[0]}; put each into the folder of its class')
    used = {Path(os.path.relpath(folder, root)).parts[0] for folder in folders}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')):
        if name not in used and (not class_map or name in reader.class_to_idx):
            types = ', '.join(get_img_extensions())
            raise UserError(f'{what}: class folder {name!r} has no images in it, of the types {types}')


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
    try:
        labels_N = np.array([math.nan if label is None else label for label in labels], dtype=np.float64)
        (N,) = labels_N.shape
    except (TypeError, ValueError):
        raise UserError(f'{what}: labels must be class numbers, one an image') from None
    missing = np.flatnonzero(~(labels_N >= 0))
    if len(missing):
        count = f'{len(missing):,} of {N:,} images have no label'
        raise UserError(f'{what}: {count}, the first is image {missing[0]}; leave them out of the set')
    return torch.from_numpy(labels_N.astype(np.int64))
