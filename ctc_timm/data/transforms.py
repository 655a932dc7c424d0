"""Size and normalization of images, by timm's rules."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from timm.data.model_config import resolve_input_data_config
from timm.models import get_model_input_config
from torch import nn

from ..utils.errors import UserError, one_line
from .settings import DataSettings


def data_config(data: DataSettings, model: nn.Module) -> dict[str, Any]:
    """Resolve input size, normalization and interpolation: the settings over the model's own, by timm's rules.

    Channels are the model's, and its mean and deviation are adapted to them as timm does.

    Raises:
        UserError: Neither one mean or deviation nor one a channel, or another size than the model can take.
    """
    channels = input_channels(model)
    for name, values in (('mean', data.mean), ('std', data.std)):
        if values is not None and len(values) not in (1, channels):
            shown = ' '.join(map(str, values))
            raise UserError(f'`{name}` {shown}: {len(values)} values for {channels} channel(s); give {channels}')
    try:
        config = resolve_input_data_config(model, dataclasses.asdict(data))
    except ValueError as error:
        raise UserError(f'`{"input_size" if data.input_size else "img_size"}`: {one_line(error)}') from None
    spread = {name: tuple(config[name]) * (channels if len(config[name]) == 1 else 1) for name in ('mean', 'std')}
    return {**config, **spread}


def fit_channels(data: DataSettings, model: nn.Module) -> DataSettings:
    """Take the model's channels where the settings name none."""
    return data if data.in_chans or data.input_size else dataclasses.replace(data, in_chans=input_channels(model))


def input_channels(model: nn.Module) -> int:
    """Tell how many channels the images of a model have."""
    return int(get_model_input_config(model)['input_size'][0])


def worker_count(workers: int) -> int:
    """The number of loader processes: no more than there are processors."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
