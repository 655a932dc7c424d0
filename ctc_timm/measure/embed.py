"""Pooled features of a folder or a data set, written to a file batch by batch.

    path = ctc_timm.embed(run, data_dir='IMAGES', output='features.parquet')
    table = pandas.read_parquet(path)
    features_ND = numpy.stack(table['features'])

Image i has `index` i, `file_name`, its path below the folder or in the tar file, `label`, its class from 0, `features`
[D] and with `logits=True` `logits` [C], float32. Names or labels that there are not have no column; an unreadable image
has no row. .parquet has lists of fixed length in `features` and `logits`; .npz arrays of these names, [N, D] and
[N, C]; .csv a column for each number, f0000, f0001, ... and l0000, l0001, ...

Letters: N images, B batch, D feature size, C classes.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import IterableDataset

from ..data.datasets import DatasetSplit, open_split
from ..data.indexed import IndexedDataset
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config, fit_channels
from ..models.backbones import check_input, features_and_logits, has_classification_head
from ..models.layout import use_layout
from ..models.loading import load_model, named_source
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.text import sanitize
from .features import in_order
from .settings import EmbedSettings

Columns = dict[str, np.ndarray]
Write = Callable[[Columns], None]
logger = get_logger(__name__)


def embed(settings: EmbedSettings) -> Path:
    """Write the features of a folder or a data set to a file, and return it; see above for the columns.

    Memory does not grow with the number of images, except for .npz. The file is complete or not there.

    Raises:
        UserError: Another suffix than .parquet, .npz and .csv; a model or data that can't be opened; no image.
    """
    output, data, named = Path(settings.embedding.output), settings.data, named_source(settings.source)
    open_writer = _writer_of(output)
    accelerator = create_accelerator(settings.precision)
    in_folder = not data.dataset or ('/' not in data.dataset and data.data_dir is not None)
    loaded = load_model(**named, head=settings.embedding.logits, in_chans=data.in_chans, **settings.built.model_kwargs)
    split = settings.embedding.split or ('' if in_folder else data.val_split)
    with accelerator.main_process_first():
        source = open_split(fit_channels(data, loaded.model), split, labeled=False)
    config = data_config(data, loaded.model)
    check_input(loaded.model, config['input_size'])
    device = accelerator.device
    model = use_layout(loaded.model.to(device), settings.built.channels_last, device)
    batches = _embedded(model, source, settings, config, accelerator)
    first = next(batches, None)
    if first is None:
        raise UserError(f'{source.name}: no image can be read')
    images, temporary = 0, output.with_name(f'.{output.name}.tmp')
    try:
        with open_writer(temporary, first) if accelerator.is_main_process else nullcontext(lambda _: None) as write:
            for columns in chain([first], batches):
                write(columns)
                images += len(columns['index'])
        if accelerator.is_main_process:
            os.replace(temporary, output)
    finally:
        if accelerator.is_main_process:
            temporary.unlink(missing_ok=True)
    logger.info(f'{images:,} images, {first["features"].shape[1]:,} features of each: {output}')
    accelerator.wait_for_everyone()
    return output


@torch.no_grad()
def _embedded(
    model: Any, source: DatasetSplit, settings: EmbedSettings, config: dict[str, Any], accelerator: Accelerator
) -> Iterator[Columns]:
    """Pass all images through a model; yield the columns of all processes' batches, in the order of the images."""
    several, with_logits = accelerator.num_processes > 1, settings.embedding.logits
    streamed, has_head = isinstance(source.dataset, IterableDataset), has_classification_head(model)
    if with_logits and not has_head:
        raise UserError('`logits=True`: the model has no classification head')
    if streamed and several:
        raise UserError(f'{source.name}: a stream is embedded by one process')
    dataset = source.dataset if streamed else IndexedDataset(source.dataset)
    loader = create_eval_loader(dataset, settings.loader, config, accelerator.device, distributed=several)
    done, unreadable = 0, []
    for images, targets in progress_bar(loader, 'embed', accelerator):
        values: tuple[torch.Tensor, ...]
        with accelerator.autocast():
            if has_head:
                values = features_and_logits(model, images)
            else:
                values = (model.forward_head(model.forward_features(images), pre_logits=True).flatten(1),)
        index_B = torch.arange(done, done + len(images) * accelerator.num_processes)
        done += len(index_B)
        targets = in_order(targets, accelerator).cpu()
        label_B, kept_B = targets, torch.ones_like(index_B, dtype=torch.bool)
        if not streamed:
            # Padding at the end repeats images; an unreadable image is replaced by the next.
            label_B, kept_B = targets[:, 0], (targets[:, 1:] == index_B[:, None]).all(dim=1)
            unreadable += [dataset.name(i) for i in index_B[~kept_B].tolist() if i < len(dataset)]
        columns = {'index': index_B[kept_B].numpy()}
        if names := _file_names(source.dataset, columns['index'], settings.data.data_dir):
            columns['file_name'] = np.array(names)
        if streamed or source.labels_N is not None:
            columns['label'] = label_B[kept_B].numpy()
        for name, rows in zip(('features', 'logits')[: 1 + with_logits], values):
            columns[name] = in_order(rows.float(), accelerator).cpu()[kept_B].numpy()
        if len(columns['index']):
            yield columns
    if unreadable:
        logger.warning(sanitize(f'no row for {len(unreadable):,} unreadable: {", ".join(unreadable[:5])}'))


def _file_names(dataset: Any, index: np.ndarray, root: str | None) -> list[str]:
    """Name images by their paths below the folder or in the tar file; empty for data sets without files."""
    reader: Any = getattr(dataset, 'reader', None)
    if not hasattr(reader, 'samples'):
        return []
    names, folder = [reader.filename(i) for i in index.tolist()], getattr(reader, 'root', None) or ''
    below = (os.path.relpath(os.path.join(folder, name), root) if os.path.isdir(folder) else name for name in names)
    return [os.path.normpath(name) for name in below]


def _writer_of(output: Path) -> Any:
    """Choose the writer by the output's suffix, and make the output's folder."""
    writers = {'.parquet': _parquet_writer, '.npz': _npz_writer, '.csv': _csv_writer}
    suffix = output.suffix.lower()
    if suffix not in writers or output.is_dir():
        raise UserError(f'`output` {output}: must be a file that ends in {", ".join(writers)}')
    if suffix == '.parquet' and importlib.util.find_spec('pyarrow') is None:
        raise UserError(f"`output` {output}: needs the package pyarrow; pip install 'ctc-timm[data]', or write .npz")
    output.parent.mkdir(parents=True, exist_ok=True)
    return writers[suffix]


@contextmanager
def _parquet_writer(file: Path, first: Columns) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    def table(columns: Columns) -> Any:
        lists = pyarrow.FixedSizeListArray.from_arrays
        return pyarrow.table({n: lists(v.ravel(), v.shape[1]) if v.ndim == 2 else v for n, v in columns.items()})

    with parquet.ParquetWriter(file, table(first).schema) as writer:
        yield lambda columns: writer.write_table(table(columns))


@contextmanager
def _csv_writer(file: Path, first: Columns) -> Iterator[Write]:
    with file.open('w', encoding='utf-8', newline='') as stream:
        writer, header = csv.writer(stream), list[str]()
        for name, values in first.items():
            header += [f'{name[0]}{i:04d}' for i in range(values.shape[1])] if values.ndim == 2 else [name]
        writer.writerow(header)

        def write(columns: Columns) -> None:  # each number as the shortest text that is read back as the same float32
            texts = [values.astype(str).reshape(len(values), -1) for values in columns.values()]
            writer.writerows(np.concatenate(texts, axis=1).tolist())

        yield write


@contextmanager
def _npz_writer(file: Path, first: Columns) -> Iterator[Write]:
    batches: list[Columns] = []
    yield batches.append
    arrays: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in first}
    with file.open('wb') as stream:
        np.savez(stream, **arrays)
