"""Pooled features of a folder or a data set, written to a file batch by batch.

    path = ctc_timm.embed(run, data_dir='IMAGES', output='features.parquet')
    table = pandas.read_parquet(path)
    features_ND = numpy.stack(table['features'])

Columns, for image i of the folder or data set:

    index      i
    file       path below the folder, or in the tar file; missing for data sets without file names
    label      its class, counted from 0; missing where there are no labels
    features   [D], float32
    logits     [C], float32, with `logits=True`

.parquet has lists of fixed length in `features` and `logits`; .npz arrays of these names, [N, D] and [N, C]; .csv a
column for each number, f0000, f0001, ... and l0000, l0001, ... An unreadable image has no row.

Letters: N images, B batch, D feature size, C classes.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import IterableDataset

from ..data.datasets import DatasetSplit, open_split
from ..data.indexed import IndexedDataset
from ..data.loaders import create_eval_loader
from ..data.transforms import data_config
from ..models.backbones import check_input, features_and_logits, has_classification_head
from ..models.loading import load_model, named_source
from ..utils.distributed import create_accelerator
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from .features import in_order
from .settings import EmbedSettings

Columns = dict[str, np.ndarray]
logger = get_logger(__name__)


def embed(settings: EmbedSettings) -> Path:
    """Write the features of a folder or a data set.

    Memory does not grow with the number of images, except for .npz. The file is complete or not there.

    Returns:
        The file.

    Raises:
        UserError: Another suffix than .parquet, .npz and .csv; a model or data that can't be opened; no image.
    """
    output, data = Path(settings.embedding.output), settings.data
    create_writer = _writer_of(output)
    accelerator = create_accelerator(settings.precision)
    in_folder = not data.dataset or ('/' not in data.dataset and data.data_dir is not None)
    split = settings.embedding.split or ('' if in_folder else data.val_split)
    with accelerator.main_process_first():
        source = open_split(data, split, labeled=False)
    loaded = load_model(*named_source(settings.source), in_chans=data.in_chans, **settings.built.model_kwargs)
    config = data_config(data, loaded.model)
    check_input(loaded.model, config['input_size'])
    model = loaded.model.to(accelerator.device)
    temporary = output.with_name(f'.{output.name}.tmp')
    writer = None
    images = 0
    try:
        for columns in _embedded(model, source, settings, config, accelerator):
            images += len(columns['index'])
            if accelerator.is_main_process and len(columns['index']):
                writer = writer or create_writer(temporary, columns)
                writer.write(columns)
        if not images:
            raise UserError(f'{source.name}: no image can be read')
        if writer is not None:
            writer.close()
            os.replace(temporary, output)
            logger.info(f'{images:,} images, {columns["features"].shape[1]:,} features of each: {output}')
    finally:
        if writer is not None:
            temporary.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return output


@torch.no_grad()
def _embedded(
    model: Any, source: DatasetSplit, settings: EmbedSettings, config: dict[str, Any], accelerator: Accelerator
) -> Iterator[Columns]:
    """Pass all images through a model; yield the columns of all processes' batches, in the order of the images."""
    several, with_logits = accelerator.num_processes > 1, settings.embedding.logits
    if with_logits and not has_classification_head(model):
        raise UserError('`logits=True`: the model has no classification head')
    streamed = isinstance(source.dataset, IterableDataset)
    if streamed and several:
        raise UserError(f'{source.name}: a stream is embedded by one process')
    dataset = source.dataset if streamed else IndexedDataset(source.dataset)
    loader = create_eval_loader(dataset, settings.loader, config, accelerator.device, distributed=several)
    done = 0
    for images, targets in progress_bar(loader, 'embed', accelerator):
        if settings.built.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            features_BD, logits_BC = _forward(model, images)
        values = {'features': features_BD.float()} | ({'logits': logits_BC.float()} if with_logits else {})
        index_B = torch.arange(done, done + len(images) * accelerator.num_processes)
        done += len(index_B)
        if streamed:
            read_B, label_B = torch.ones_like(index_B, dtype=torch.bool), targets
        else:
            # Padding at the end repeats images; an unreadable image is replaced by the next.
            label_B, delivered_B, requested_B = in_order(targets, accelerator).cpu().unbind(dim=1)
            read_B = (delivered_B == index_B) & (requested_B == index_B)
        columns: dict[str, Tensor] = {'index': index_B}
        if streamed or source.labels_N is not None:
            columns['label'] = label_B
        columns |= {name: in_order(rows, accelerator) for name, rows in values.items()}
        arrays = {name: rows.cpu()[read_B].numpy() for name, rows in columns.items()}
        names = _file_names(source.dataset, arrays['index'], settings.data.data_dir)
        yield {'index': arrays.pop('index')} | ({'file': np.array(names)} if names else {}) | arrays


def _forward(model: Any, images: Tensor) -> tuple[Tensor, Any]:
    """Return features [B, D], and the logits [B, C] of a model with a classification head."""
    if has_classification_head(model):
        return features_and_logits(model, images)
    return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1), None


def _file_names(dataset: Any, index: np.ndarray, root: str | None) -> list[str]:
    """Name images by their paths below the folder or in the tar file; empty for data sets without files."""
    reader: Any = getattr(dataset, 'reader', None)
    if not hasattr(reader, 'samples'):
        return []
    names = [str(reader.filename(i)) for i in index.tolist()]  # below the folder of the split
    folder = str(getattr(reader, 'root', ''))
    return [os.path.relpath(os.path.join(folder, name), root) for name in names] if os.path.isdir(folder) else names


class _Writer(Protocol):
    """Writes columns to a file, whose format is that of the first batch."""

    def write(self, columns: Columns) -> None:
        """Add a batch."""

    def close(self) -> None:
        """Finish the file."""


def _writer_of(output: Path) -> Callable[[Path, Columns], _Writer]:
    """Choose the writer by the output's suffix, and make the output's folder."""
    writers: dict[str, Any] = {'.parquet': _ParquetWriter, '.npz': _NpzWriter, '.csv': _CsvWriter}
    suffix = output.suffix.lower()
    if suffix not in writers or output.is_dir():
        raise UserError(f'`output` {output}: must be a file that ends in {", ".join(writers)}')
    if suffix == '.parquet' and importlib.util.find_spec('pyarrow') is None:
        raise UserError(f"`output` {output}: needs the package pyarrow; pip install 'ctc-timm[data]', or write .npz")
    output.parent.mkdir(parents=True, exist_ok=True)
    return writers[suffix]


class _ParquetWriter:
    def __init__(self, file: Path, columns: Columns) -> None:
        from pyarrow import parquet

        self._writer = parquet.ParquetWriter(file, self._table(columns).schema)

    def _table(self, columns: Columns) -> Any:
        import pyarrow

        return pyarrow.table(
            {
                name: pyarrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
                if values.ndim == 2
                else pyarrow.array(values)
                for name, values in columns.items()
            }
        )

    def write(self, columns: Columns) -> None:
        self._writer.write_table(self._table(columns))

    def close(self) -> None:
        self._writer.close()


class _CsvWriter:
    def __init__(self, file: Path, columns: Columns) -> None:
        self._stream = file.open('w', encoding='utf-8', newline='')
        self._writer = csv.writer(self._stream)
        header: list[str] = []
        for name, values in columns.items():
            header += [f'{name[0]}{i:04d}' for i in range(values.shape[1])] if values.ndim == 2 else [name]
        self._writer.writerow(header)

    def write(self, columns: Columns) -> None:
        # As text first: the shortest that is read back as the same float32.
        texts = [np.atleast_2d(values.astype(str).T).T for values in columns.values()]
        self._writer.writerows(np.concatenate(texts, axis=1).tolist())

    def close(self) -> None:
        self._stream.close()


class _NpzWriter:
    def __init__(self, file: Path, columns: Columns) -> None:
        self._file = file
        self._batches: list[Columns] = []

    def write(self, columns: Columns) -> None:
        self._batches.append(columns)

    def close(self) -> None:
        arrays: dict[str, Any] = {name: np.concatenate([b[name] for b in self._batches]) for name in self._batches[0]}
        with self._file.open('wb') as stream:
            np.savez(stream, **arrays)
