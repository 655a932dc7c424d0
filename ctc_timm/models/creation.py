"""The model to train, by timm's flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_name, resolve_model_input_args
from torch import nn

from ..cli.arguments import KeyValues, positive_float, probability, whole_number
from ..runs import check_hash
from ..training.sync_bn import synchronize
from ..utils.errors import UserError, nearest, one_line
from .backbones import architecture, has_classification_head

MOST_CLASSES = 10**6
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's model flags."""
    group = parser.add_argument_group('Model')
    group.add_argument(
        '--model', default='resnet50', metavar='NAME', help='any timm name, hf-hub:REPO or local-dir:FOLDER'
    )
    group.add_argument('--pretrained', action='store_true', help="start from the name's pretrained weights")
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from these weights')
    group.add_argument(
        '--num-classes',
        type=whole_number(1, MOST_CLASSES),
        metavar='N',
        help="outputs; the data set's classes when not given",
    )
    add_architecture_arguments(group)


def add_architecture_arguments(group: Any) -> None:
    """Declare timm's flags of how a model is built."""
    group.add_argument('--gp', metavar='POOL', help='global pooling type')
    group.add_argument('--drop', type=probability, default=0.0, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=probability, metavar='P', help='stochastic depth')
    group.add_argument('--drop-block', type=probability, metavar='P', help='drop block')
    group.add_argument('--bn-momentum', type=probability, metavar='M', help='batch norm momentum')
    group.add_argument('--bn-eps', type=positive_float, metavar='EPS', help='batch norm epsilon')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more for the model'
    )


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's flags for how a model runs."""
    group = parser.add_argument_group('Execution')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    group.add_argument('--grad-checkpointing', action='store_true', help='trade time for memory')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    group.add_argument('--torchcompile-mode', choices=COMPILE_MODES, help="torch.compile's mode")
    add_shared_norm_arguments(group)


def add_shared_norm_arguments(group: Any) -> None:
    """Declare timm's flags for batch norm where there are several processes."""
    group.add_argument('--sync-bn', action='store_true', help='batch norm over all processes')
    group.add_argument(
        '--dist-bn',
        choices=('reduce', 'broadcast', ''),
        default='reduce',
        help='how processes share batch norm statistics after an epoch',
    )


def create_model(args: argparse.Namespace, num_classes: int | None) -> Any:
    """The model that the flags describe.

    Args:
        args: Model and data flags.
        num_classes: Outputs; None leaves the model's own.

    Raises:
        UserError: An unknown model, weights that do not exist or do not fit, arguments that it refuses.
    """
    name = args.model
    if ':' not in name and not timm.is_model(name):
        raise UserError(f'--model {name}: unknown to timm{nearest(get_arch_name(name), timm.list_models())}')
    try:
        resolved = resolve_model_input_args(name, vars(args), **{'num_classes': num_classes, **model_options(args)})
        model = timm.create_model(pretrained=args.pretrained, **{k: v for k, v in resolved.items() if v is not None})
    except UserError as error:
        raise UserError(f'--model {name}: {error}') from None
    except Exception as error:  # timm's, torch's and the client's of the Hub, about weights and configs of other people
        raise UserError(f'--model {name}: {one_line(error)}') from None
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, '--initial-checkpoint')
    if not has_classification_head(model):
        raise UserError(f'--model {name}: has no classification head to train; choose a model with one')
    return model


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What timm's `create_model` is asked for beside name and classes; None leaves the model's own."""
    options: dict[str, Any] = dict(
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
        drop_rate=args.drop or None,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    return {**options, **args.model_kwargs}


def checkpoint_gradients(model: Any, name: str) -> None:
    """Have a model trade time for memory.

    Raises:
        UserError: timm's model of that name can't.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        raise UserError(f'--grad-checkpointing: {name} has none') from None


def prepare_model(model: Any, args: argparse.Namespace, device: torch.device, num_processes: int) -> Any:
    """The model on its device, as the execution flags say.

    Raises:
        UserError: It has no checkpointing.
    """
    if args.grad_checkpointing:
        checkpoint_gradients(model, architecture(model))
    if args.sync_bn and num_processes > 1:
        model = synchronize(model, device)
    model.to(device)
    if args.channels_last:
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
            f'--torchcompile {backend}: no such backend{nearest(backend, known)}; there are {", ".join(known)}'
        )


def load_weights(model: nn.Module, path: str | Path, flag: str) -> None:
    """Load a weights file into a model, all of it.

    Raises:
        UserError: No such file, not a weights file, or weights of another architecture.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'{flag} {path}: no such file')
    try:
        if file.suffix == '.safetensors':
            check_hash(file)
        timm.models.load_checkpoint(model, str(file), weights_only=True)
    except Exception as error:
        raise UserError(f'{flag} {path}: not weights of {architecture(model)}: {one_line(error)}') from None
