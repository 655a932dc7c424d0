"""Weights files: read without running what a pickle holds, and fitted to a model by name and shape."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv, clean_state_dict, get_model_input_config, load_checkpoint
from timm.models._helpers import _torch_load
from torch import Tensor, nn

from ..utils import weights_files
from ..utils.errors import UserError, one_line
from .backbones import architecture as architecture_of

Weights = dict[str, Tensor]
_AVERAGED, _PLAIN = ('state_dict_ema', 'model_ema'), ('state_dict', 'model')  # where timm looks, in its order
_FILTERS = ('checkpoint_filter_fn', '_filter_fn', '_filter_torchvision_pretrained')  # of timm's modules of models
_logger = logging.getLogger(__name__)


def read_weights(file: Path, where: str, architecture: str, use_ema: bool) -> Weights | None:
    """Read a file: safetensors, or what loads with `weights_only=True`. None for NumPy's, which only a model reads.

    With `use_ema` a checkpoint's moving average is taken where it holds one.
    """
    if not file.is_file():
        raise UserError(f'{where}: no such file')
    if file.suffix in ('.npz', '.npy'):
        return None
    try:
        if file.suffix == '.safetensors':
            return clean_state_dict(weights_files.read_weights(file)[0])
        content = _torch_load(str(file), weights_only=True)
    except Exception as error:  # of any format
        fault = one_line(error).removeprefix(f'{file}: ')
        raise UserError(f'{where}: not weights of {architecture}: {fault}') from None
    held = [key for key in (*_AVERAGED, *_PLAIN) if isinstance(content, dict) and content.get(key) is not None]
    key = next((key for key in held if use_ema or key in _PLAIN), held[0] if held else '')
    weights = content[key] if key else content
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        known = ', '.join((*_PLAIN, *_AVERAGED))
        raise UserError(f'{where}: holds no weights under the names that timm gives them ({known})')
    if len(held) > 1 and os.environ.get('RANK', '0') == '0':
        _logger.info(f'{file}: holds {" and ".join(held)}; with use_ema {use_ema} loads {key}')
    return clean_state_dict(dict(weights))


def fit_weights(
    model: Any, weights: Weights | None, file: Path, where: str, new_head: bool = False, new_channels: bool = False
) -> set[str]:
    """Load weights into a model, with names changed as timm does for its pretrained weights.

    Args:
        model: Unchanged where it is refused.
        weights: As `read_weights` gives them.
        new_head: The classifier is to be replaced: weights without it, or of other classes, are taken too, and so are
            those with modules that the model has not.
        new_channels: Adapt the first convolution to the model's channels as timm does for its pretrained weights.

    Returns:
        Names of the classifier's tensors that were not loaded.

    Raises:
        UserError: Names of tensors that are missing, unexpected or of another shape.
    """
    what = f'{where}: not weights of {architecture_of(model)}'
    try:
        if weights is None:
            load_checkpoint(model, str(file), weights_only=True)
            return set()
        own = model.state_dict()
        weights = _rename(model, weights, own)
        weights = _adapt_channels(model, weights) if new_channels else weights
    except Exception as error:  # of any model of any family
        raise UserError(f'{what}: {one_line(error)}') from None
    head, modules = heads_of(model), {name.partition('.')[0] for name in own}
    if new_head:
        other = {name for name in weights if name.startswith(head) and not _same_shape(weights, own, name)}
        other |= {name for name in weights if name.partition('.')[0] not in modules}
        if outside := sorted(name for name in other if not name.startswith(head)):
            _logger.info(f'{file}: loaded without {_shorten(outside)}, which {architecture_of(model)} has not')
        weights = {name: tensor for name, tensor in weights.items() if name not in other}
    missing = {name for name in own.keys() - weights if not name.endswith('.num_batches_tracked')}  # as torch does
    left = {name for name in missing if name.startswith(head)} if new_head else set()
    shapes = {name for name in own.keys() & weights if not _same_shape(weights, own, name)}
    faults = {'missing': missing - left, 'unexpected': weights.keys() - own, 'of another shape': shapes}
    if any(faults.values()):
        told = '; '.join(f'{fault}: {_shorten(sorted(names))}' for fault, names in faults.items() if names)
        rest = all(name.startswith(head) for names in faults.values() for name in names)
        raise UserError(f'{what}: {told}' + ('; the rest fits, for what makes a new classifier' if rest else ''))
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f'{what}: {one_line(error)}') from None
    return left


def stated_sizes(weights: Weights | None, model: Any) -> dict[str, int]:
    """Read `num_classes` and `in_chans` off weights, where they are not those of a model of that architecture."""
    if weights is None:
        return {}
    found, weights = dict[str, int](), _rename(model, weights, model.state_dict())
    for head in heads_of(model)[:1]:
        if (weight := weights.get(f'{head}weight')) is not None and weight.ndim > 1:
            found |= {'num_classes': len(weight)} if len(weight) != model.num_classes else {}
    for name, conv in _first_convs(model)[:1]:
        weight, own = weights.get(f'{name}.weight'), conv.weight
        if weight is not None and weight.ndim == 4 and weight.shape[1] != own.shape[1]:
            # A stem may fold pixels into channels, of which it then has a multiple.
            found['in_chans'] = weight.shape[1] * get_model_input_config(model)['input_size'][0] // own.shape[1]
    return found


def heads_of(model: Any) -> tuple[str, ...]:
    """Beginnings of the names of a classifier's tensors."""
    return tuple(f'{name}.' for name in _names(model.pretrained_cfg.get('classifier')))


def _rename(model: Any, weights: Weights, own: Mapping[str, Tensor]) -> Weights:
    """Weights under the model's names, by what its module in timm does to published weights."""
    module = inspect.getmodule(type(model))
    change = next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)
    fits = all(_same_shape(weights, own, name) for name in own.keys() | weights)
    if fits or change is None:
        return dict(weights)
    one = len(inspect.signature(change).parameters) == 1  # of the weights, as timm allows
    return change(dict(weights)) if one else change(dict(weights), model)


def _adapt_channels(model: Any, weights: Weights) -> Weights:
    """Weights for the model's number of input channels."""
    channels = get_model_input_config(model)['input_size'][0]
    for name, conv in _first_convs(model):
        weight, own = weights.get(f'{name}.weight'), conv.weight
        if weight is not None and weight.shape != own.shape and weight.shape[::2] == own.shape[::2]:
            base = weight.shape[1] * channels // own.shape[1]
            weights[f'{name}.weight'] = adapt_input_conv(channels, weight, base)
    return weights


def _first_convs(model: Any) -> list[tuple[str, nn.Conv2d]]:
    modules = {name: model.get_submodule(name) for name in _names(model.pretrained_cfg.get('first_conv'))}
    return [(name, conv) for name, conv in modules.items() if isinstance(conv, nn.Conv2d)]


def _same_shape(weights: Weights, own: Mapping[str, Tensor], name: str) -> bool:
    return name in weights and name in own and weights[name].shape == own[name].shape


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _shorten(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
