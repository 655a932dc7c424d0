"""The optimizer and gradient clipping, timm's own by timm's flags."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import optimizer_kwargs
from timm.task import TrainingTask
from timm.utils import adaptive_clip_grad
from torch import nn

from ..cli.arguments import KeyValues, momentum, non_negative_float, positive_float
from ..utils.errors import UserError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare timm's optimizer flags."""
    group = parser.add_argument_group('Optimizer')
    group.add_argument(
        '--opt', default='sgd', metavar='NAME', help="timm's optimizer; sgd is Nesterov's, momentum is plain"
    )
    group.add_argument(
        '--lr',
        type=positive_float,
        metavar='LR',
        help='learning rate; --lr-base scaled by the global batch size when not given',
    )
    group.add_argument(
        '--lr-base',
        type=positive_float,
        default=0.1,
        metavar='LR',
        help='learning rate at --lr-base-size images a step',
    )
    group.add_argument(
        '--lr-base-size', type=positive_float, default=256, metavar='N', help='images a step that --lr-base is for'
    )
    group.add_argument(
        '--lr-base-scale', choices=('linear', 'sqrt'), help='how it scales; sqrt for adaptive optimizers, else linear'
    )
    group.add_argument('--momentum', type=momentum, default=0.9, metavar='M', help='momentum')
    group.add_argument('--weight-decay', type=non_negative_float, default=2e-5, metavar='WD', help='weight decay')
    group.add_argument(
        '--filter-bias-and-bn',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='leave biases and norms without weight decay',
    )
    group.add_argument('--opt-eps', type=positive_float, metavar='EPS', help="optimizer's epsilon")
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help="optimizer's betas")
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more for the optimizer'
    )
    group.add_argument('--layer-decay', type=positive_float, metavar='F', help='layer-wise learning rate decay')
    group.add_argument('--clip-grad', type=positive_float, metavar='NORM', help='clip gradients')
    group.add_argument('--clip-mode', choices=('norm', 'value', 'agc'), default='norm', help='how')


def resolve_lr(args: argparse.Namespace, world_size: int) -> float:
    """`--lr`, or `--lr-base` scaled by the images in a step, as timm does."""
    if args.lr is not None:
        return args.lr
    images = args.batch_size * world_size * args.grad_accum_steps
    adaptive = any(word in args.opt.lower() for word in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = images / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over all that the module trains.

    Raises:
        UserError: An unknown optimizer, or settings that it refuses.
    """
    known = [str(name) for name in list_optimizers()]
    if args.opt.lower() not in known:
        raise UserError(f'--opt {args.opt}: unknown to timm{nearest(args.opt, known)}')
    options: dict[str, Any] = optimizer_kwargs(argparse.Namespace(**vars(args), opt_args=args.opt_kwargs or None))
    try:
        return create_optimizer_v2(module, **options, filter_bias_and_bn=args.filter_bias_and_bn)
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(
            f'--opt {args.opt} with --opt-betas {args.opt_betas} and --opt-kwargs {args.opt_kwargs}: '
            f'{" ".join(str(error).split())}'
        ) from None


def clip_gradients(accelerator: Accelerator, task: TrainingTask, args: argparse.Namespace) -> None:
    """Clip as the flags say, after mixed precision's scale is taken out."""
    if args.clip_grad is None:
        return
    if args.clip_mode == 'norm':
        accelerator.clip_grad_norm_(task.get_clip_parameters(), args.clip_grad)
    elif args.clip_mode == 'value':
        accelerator.clip_grad_value_(task.get_clip_parameters(), args.clip_grad)
    else:
        accelerator.unscale_gradients()
        adaptive_clip_grad(task.get_clip_parameters(exclude_head=True), args.clip_grad, norm_type=2.0)
