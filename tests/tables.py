"""Data sets in the Hub's layout, parquet, with any labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ctc_timm.data.settings import DataSettings
from images import encoded, picture


def table(folder: Path, labels: list[Any], images: list[Any] | None = None) -> DataSettings:
    """A data set of the Hub's format with these labels."""
    whole = {'bytes': encoded(Image.fromarray(picture()), 'PNG'), 'path': None}
    rows = {'image': images or [whole] * len(labels), 'label': labels}
    kind: Any = datasets.Sequence(datasets.Value('int64')) if isinstance(labels[0], list) else None
    for type_, name in ((bool, 'bool'), (str, 'string'), (int, 'int64'), (float, 'float64')):
        if kind is None and all(label is None or isinstance(label, type_) for label in labels):
            kind = datasets.Value(name)
    features = datasets.Features({'image': datasets.Image(decode=False), 'label': kind or datasets.Value('float64')})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / 'train.parquet')
    return DataSettings(dataset=f'hfds/{folder}')
