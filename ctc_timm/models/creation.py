"""The model to train, from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import get_arch_name, resolve_model_input_args
from torch import nn

from ..runs import check_hash
from ..utils.errors import UserError, nearest, one_line
from .backbones import architecture, has_classification_head
from .settings import ArchitectureSettings, BatchNormSettings, ExecutionSettings, ModelSettings


class InputSettings(Protocol):
    """The settings of data that shape a model."""

    @property
    def img_size(self) -> int | None:
        """Height and width of the images."""

    @property
    def in_chans(self) -> int | None:
        """Channels of the images."""

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height and width of the images."""


def create_model(
    model: ModelSettings, architecture: ArchitectureSettings, images: InputSettings, num_classes: int | None
) -> Any:
    """Create the model to train.

    Args:
        model: Which one, and its first weights.
        architecture: How timm builds it.
        images: Channels and size of its images.
        num_classes: Outputs; None leaves the model's own.

    Raises:
        UserError: An unknown model, weights that do not exist or do not fit, arguments that it refuses.
    """
    name = model.model
    if ':' not in name and not timm.is_model(name):
        raise UserError(f'`model` {name}: unknown to timm{nearest(get_arch_name(name), timm.list_models())}')
    wanted = {'img_size': images.img_size, 'in_chans': images.in_chans, 'input_size': images.input_size}
    try:
        options = {'num_classes': num_classes, **model_options(architecture, images)}
        resolved = resolve_model_input_args(name, wanted, **options)
        created = timm.create_model(pretrained=model.pretrained, **{k: v for k, v in resolved.items() if v is not None})
    except Exception as error:  # timm's, torch's and the client's of the Hub, about weights and configs of other people
        raise UserError(f'`model` {name}: {one_line(error)}') from None
    if model.initial_checkpoint:
        load_weights(created, model.initial_checkpoint, 'initial_checkpoint')
    if not has_classification_head(created):
        raise UserError(f'`model` {name}: has no classification head to train; choose a model with one')
    return created


def model_options(architecture: ArchitectureSettings, images: InputSettings) -> dict[str, Any]:
    """Collect arguments of timm's `create_model` beside name and classes; None leaves the model's own."""
    options: dict[str, Any] = dict(
        in_chans=images.in_chans or (images.input_size[0] if images.input_size else None),
        drop_rate=architecture.drop or None,
        drop_path_rate=architecture.drop_path,
        drop_block_rate=architecture.drop_block,
        global_pool=architecture.gp,
        bn_momentum=architecture.bn_momentum,
        bn_eps=architecture.bn_eps,
    )
    return {**options, **architecture.model_kwargs}


def checkpoint_gradients(model: Any, name: str) -> None:
    """Turn gradient checkpointing on.

    Raises:
        UserError: timm's model of that name has none.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        raise UserError(f'`grad_checkpointing`: {name} has none') from None


def prepare_model(
    model: Any, execution: ExecutionSettings, norms: BatchNormSettings, device: torch.device, num_processes: int
) -> Any:
    """Move the model to its device, as the execution settings say.

    Raises:
        UserError: It has no gradient checkpointing, or batch norm is to be synchronized on the CPU.
    """
    if execution.grad_checkpointing:
        checkpoint_gradients(model, architecture(model))
    if norms.sync_bn and num_processes > 1:
        if device.type == 'cpu':
            raise UserError('`sync_bn`: needs a GPU')  # as PyTorch's SyncBatchNorm does
        model = convert_sync_batchnorm(model)
    model.to(device)
    if execution.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def check_compiler(backend: str) -> None:
    """Refuse a `torch.compile` backend that does not exist.

    Raises:
        UserError: Unknown.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(
            f'`torchcompile` {backend}: no such backend{nearest(backend, known)}; there are {", ".join(known)}'
        )


def load_weights(model: nn.Module, path: str | Path, setting: str) -> None:
    """Load all of a weights file into a model.

    Args:
        model: Of the same architecture.
        path: Safetensors, or a checkpoint that loads with `weights_only=True`.
        setting: That names the file, for messages.

    Raises:
        UserError: No such file, not a weights file, or weights of another architecture.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'`{setting}` {path}: no such file')
    try:
        if file.suffix == '.safetensors':
            check_hash(file)
        timm.models.load_checkpoint(model, str(file), weights_only=True)
    except Exception as error:
        raise UserError(f'`{setting}` {path}: not weights of {architecture(model)}: {one_line(error)}') from None
