"""Size and normalization of images, by timm's rules."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ..utils.errors import UserError
from .settings import DataSettings


def data_config(data: DataSettings, model: nn.Module) -> dict[str, Any]:
    """Resolve input size, normalization and interpolation: the settings over the model's own, by timm's rules.

    Raises:
        UserError: Neither one mean or deviation nor one a channel.
    """
    channels = data.input_size[0] if data.input_size else data.in_chans or 3
    for name, values in (('mean', data.mean), ('std', data.std)):
        if values is not None and len(values) not in (1, channels):
            shown = ' '.join(map(str, values))
            raise UserError(f'`{name}` {shown}: {len(values)} values for {channels} channel(s); give {channels}')
    return resolve_data_config(dataclasses.asdict(data), model=model)


def worker_count(workers: int) -> int:
    """The number of loader processes: no more than there are processors."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
