"""A split of a data set, opened by timm's readers and checked before anything trains on it."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor

from ..utils.errors import UserError, nearest, one_line
from . import digits
from .folders import (
    MissingSplitError,
    check_class_folders,
    number_folders,
    root_of_split,
    scan_folder,
    synonyms,
    warn_once,
)
from .settings import DataSettings

STREAMING = ('hfids', 'tfds', 'wds')
READERS = ('hfds', 'torch', *STREAMING)
FOLDER_NAMES = ('', 'folder', 'tar', 'imagefolder', 'image_folder', 'imagetar', 'image_tar')
MAX_CLASSES = 10**6

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
        MissingSplitError: A split that does not exist.
        UserError: Nothing there, an empty class folder, labels that are no class numbers.
    """
    name, mode = data.dataset, image_mode(data)
    if name == digits.NAME:
        dataset = ImageDataset(root=None, reader=digits.DigitsReader(split), input_img_mode=mode)
        return _checked(dataset, f'`dataset` {name}', name)
    _check_name(data)
    root, inside = data.data_dir, None
    options: dict[str, Any] = {'class_map': data.class_map, 'download': data.dataset_download, 'input_img_mode': mode}
    name, config = split_config(name)
    if by_reader := '/' in name:
        if name.lower().startswith(('hfds/', 'hfids/')):
            split = _available_split(data.dataset, split)
        options |= {'input_key': data.input_key, 'target_key': data.target_key}
        if is_streaming(name):
            options |= {'is_training': is_training, 'batch_size': batch_size}
            options['num_samples'] = data.train_num_samples if is_training else data.val_num_samples
    else:
        root, inside = root_of_split(str(root), split, unsplit)
        if Path(root).is_dir():
            options['input_key'] = scan_folder(Path(root), data)
        elif data.extensions:
            raise UserError(f'`extensions` {" ".join(data.extensions)}: only folders take them, not {root}')
    what = f'`dataset` {name}, split {split!r}' if by_reader else f'`data_dir` {data.data_dir}, split {split!r}'
    try:
        with _configured(config):
            dataset = create_dataset(name if by_reader else '', root, split=split, search_split=by_reader, **options)
    except ImportError as error:
        raise UserError(f"{what}: a package is missing ({error}); pip install 'ctc-timm[data]'") from None
    except Exception as error:  # readers, and the packages behind them, raise anything where data are not as expected
        hint = '; `train_num_samples` and `val_num_samples` may give its length' if is_streaming(name) else ''
        raise UserError(f'{what}: {one_line(error)}{hint}') from None
    if name.lower().startswith('torch/'):  # which timm hands out as they are
        dataset.input_img_mode = mode
    return _checked(dataset, what, data.dataset if by_reader else str(data.data_dir), inside, data.class_map, labeled)


def open_test(data: DataSettings, names: Mapping[int, str]) -> DatasetSplit:
    """Open the validation split, with its classes numbered by `names`, see `match_classes`.

    Raises:
        MissingSplitError: None is named, where all images, those of training too, would be taken; or there is none.
        UserError: See `open_split` and `match_classes`.
    """
    if not data.val_split:
        raise MissingSplitError("`val_split` '': names no split")
    return match_classes(open_split(data, data.val_split, unsplit=False), names)


def open_validation(data: DataSettings, train: DatasetSplit) -> DatasetSplit | None:
    """Open the validation split, with the training split's classes; None, which is logged, where there is none.

    Raises:
        UserError: See `open_test`; a split that was named and does not exist.
    """
    try:
        return open_test(data, train.class_names)
    except MissingSplitError as error:
        if data.val_split not in ('', DataSettings.val_split):
            raise
        warn_once(f'training without evaluation: {error}')
        return None


def check_labels(source: DatasetSplit, num_classes: int, split: str) -> None:
    """Refuse a label that the model has no output for, by a `UserError` that names the first such image."""
    labels_N = source.labels_N
    if labels_N is not None and (largest := int(labels_N.max())) >= num_classes:
        i = int((labels_N >= num_classes).nonzero()[0])
        first = f'image {i} of split {split!r} of {source.name} has label {int(labels_N[i])}'
        raise UserError(f'`num_classes` {num_classes}: {first}; give at least {largest + 1}')


def match_classes(source: DatasetSplit, names: Mapping[int, str], where: str = 'the training split') -> DatasetSplit:
    """Number a split's classes as those of the same names, by class; as it is where either has no names.

    timm numbers class folders split by split, so a folder that one of them lacks moves all that follow. Classes
    without images are logged. A class that is not among the names is a UserError; `where` says whose they are.
    """
    if not names or not source.class_names:
        return source
    numbers = {name: index for index, name in names.items()}
    if unknown := [name for name in source.class_names.values() if name not in numbers]:
        near = nearest(unknown[0], list(numbers))
        fault = f'{source.name}: class {unknown[0]!r} is missing in {where}{near}'
        raise UserError(f'{fault}; both must have the same classes, or name their order with `class_map`')
    absent = sorted(set(numbers) - set(source.class_names.values()))
    if absent:
        warn_once(f'{source.name}: no images of {len(absent)} of {len(names)} classes, such as {absent[0]!r}')
    first = next(iter(numbers))  # of a number that the split does not use
    table = torch.tensor([numbers[source.class_names.get(i, first)] for i in range(max(source.class_names) + 1)])
    if torch.equal(table, torch.arange(len(table))):
        return replace(source, num_classes=max(names) + 1, class_names=dict(names))
    dataset = copy.copy(source.dataset)
    dataset.target_transform = table.tolist().__getitem__  # of timm's and torchvision's datasets
    labels_N = None if source.labels_N is None else table[source.labels_N]
    return DatasetSplit(dataset, labels_N, max(names) + 1, source.name, dict(names))


def split_config(name: str) -> tuple[str, str]:
    """Split hfds/NAME:CONFIG into hfds/NAME and CONFIG, which is empty for other names and for folders."""
    reader, _, rest = name.partition('/')
    path, colon, config = rest.rpartition(':')
    if reader.lower() not in ('hfds', 'hfids') or not colon or Path(rest).exists() or re.search(r'[\\/]', config):
        return name, ''
    return f'{reader}/{path}', config


@contextmanager
def _configured(config: str) -> Iterator[None]:
    """Have `datasets` load a configuration, for which timm's readers have no argument."""
    if not config:
        yield
        return
    import datasets

    with ExitStack() as stack:
        for function in ('load_dataset', 'load_dataset_builder'):
            bound = partial(getattr(datasets, function), name=config)
            stack.enter_context(mock.patch.object(datasets, function, bound))
        yield


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


def _available_split(name: str, split: str) -> str:
    """The same split by the name a data set on the Hub gives it: many have 'test' but no 'validation'."""
    wanted, bracket, rest = split.partition('[')
    try:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        path, config = split_config(name)
        known = datasets.get_dataset_split_names(path.split('/', 1)[1], config or None)
    except Exception:  # the error of opening the data set says better what is wrong
        return split
    for other in synonyms(wanted):
        if other in known:
            return other + bracket + rest
    raise MissingSplitError(f'`dataset` {name} has no split {wanted!r}; it has {", ".join(known)}')


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
        if isinstance(reader, ReaderImageFolder):
            check_class_folders(reader, what, class_map)
            if not class_map:
                names = number_folders(reader, what) or names
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
    from pyarrow import compute

    columns, column = set(reader.dataset.column_names), reader.dataset.data.column(reader.image_key)
    empty = [compute.is_null(compute.struct_field(column, field)) for field in ('bytes', 'path')]
    if compute.all(compute.and_(*empty)).as_py():
        columns -= {reader.image_key}
    for name, column in (('input_key', reader.image_key), ('target_key', reader.label_key))[: 1 + labeled]:
        if not columns & {column, *column.split(','), column.split('.')[0]}:
            near, known = nearest(column, columns), ', '.join(sorted(columns))
            raise UserError(f'{what}: no such column as `{name}` {column}{near}; the columns are {known}')


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
        labels_N = np.array([math.nan if label is None else label for label in labels])
    except ValueError:  # lists of different lengths
        labels_N = np.array(labels, dtype=object)
    if labels_N.ndim != 1 or labels_N.dtype.kind not in 'biuf':
        plain = (int, float, np.number)
        wrong = np.array([label is not None and not (isinstance(label, plain) and label < 2**63) for label in labels])
    else:
        wrong = np.isfinite(labels_N) & (np.trunc(labels_N) != labels_N) | (labels_N >= MAX_CLASSES)
        missing = np.flatnonzero(~(labels_N >= 0))
        if len(missing):
            count = f'{len(missing):,} of {len(labels):,} images have no label'
            raise UserError(f'{what}: {count}, the first is image {missing[0]}; leave them out of the set')
    if wrong.any():
        label = labels[int(wrong.argmax())]
        right = f'labels are class numbers from 0 to {MAX_CLASSES - 1:,}, one an image'
        right = 'give the file of all labels in order as `class_map`' if isinstance(label, str) else right
        raise UserError(f'{what}: image {wrong.argmax()} has the label {label!r}, which is no class number; {right}')
    return torch.from_numpy(labels_N.astype(np.int64))
