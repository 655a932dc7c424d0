"""The model to train, from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import get_arch_name, resolve_model_input_args

from ..utils.errors import UserError, nearest, one_line
from .backbones import architecture, has_classification_head
from .checkpoint import heads_of
from .layout import use_layout
from .loading import load_weights
from .pretrained_cfg import check_source
from .settings import ArchitectureSettings, BatchNormSettings, ExecutionSettings, ModelSettings

if TYPE_CHECKING:
    from ..data.settings import DataSettings


def create_model(model: ModelSettings, built: ArchitectureSettings, data: DataSettings, num_classes: int | None) -> Any:
    """Create the model to train; `num_classes` of None leaves its own.

    Raises:
        UserError: An unknown model, weights that do not exist or do not fit, arguments that it refuses.
    """
    name = model.model
    if ':' not in name and not timm.is_model(name):
        raise UserError(f'`model` {name}: unknown to timm{nearest(get_arch_name(name), timm.list_models())}')
    try:
        check_source(name)
        options = {'num_classes': num_classes, **model_options(built, data)}
        resolved = resolve_model_input_args(name, vars(data), **options)
        options = {'pretrained': model.pretrained and not model.pretrained_path, **resolved}
        created = timm.create_model(**{key: value for key, value in options.items() if value is not None})
    except Exception as error:  # of timm, torch and huggingface_hub, about weights and configs of other people
        raise UserError(f'`model` {name}: {one_line(error)}') from None
    if file := model.pretrained_path:
        # As in timm the classifier is a new one, whatever classes the file is of.
        head = {k: v.clone() for k, v in created.state_dict().items() if k.startswith(heads_of(created))}
        load_weights(created, Path(file), f'`pretrained_path` {file}', new_head=True, use_ema=model.use_ema)
        created.load_state_dict(head, strict=False)
    if file := model.initial_checkpoint:
        load_weights(created, Path(file), f'`initial_checkpoint` {file}', use_ema=model.use_ema)
    if not has_classification_head(created):
        raise UserError(f'`model` {name}: has no classification head to train; choose a model with one')
    return created


def model_options(built: ArchitectureSettings, data: DataSettings) -> dict[str, Any]:
    """Collect arguments of timm's `create_model` beside name and classes; None leaves the model's own."""
    options: dict[str, Any] = dict(
        in_chans=data.in_chans or (data.input_size[0] if data.input_size else None),
        drop_rate=built.drop or None,
        drop_path_rate=built.drop_path,
        drop_block_rate=built.drop_block,
        global_pool=built.gp,
        bn_momentum=built.bn_momentum,
        bn_eps=built.bn_eps,
    )
    return {**options, **built.model_kwargs}


def checkpoint_gradients(model: Any, name: str) -> None:
    """Turn gradient checkpointing on, or raise a UserError for a model that has none."""
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        raise UserError(f'`grad_checkpointing`: {name} has none') from None


def prepare_model(
    model: Any, execution: ExecutionSettings, norms: BatchNormSettings, device: torch.device, num_processes: int
) -> Any:
    """Move the model to its device, as the settings say; a UserError is raised for what it or the device can't do."""
    if execution.grad_checkpointing:
        checkpoint_gradients(model, architecture(model))
    if norms.sync_bn and num_processes > 1:
        if device.type == 'cpu':
            raise UserError('`sync_bn`: needs a GPU')  # as PyTorch's SyncBatchNorm does
        model = convert_sync_batchnorm(model)
    return use_layout(model.to(device), execution.channels_last, device)


def check_compiler(backend: str) -> None:
    """Raise a UserError for a `torch.compile` backend that does not exist."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        near = nearest(backend, known)
        raise UserError(f'`torchcompile` {backend}: no such backend{near}; there are {", ".join(known)}')
