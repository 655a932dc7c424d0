"""The optimizer and gradient clipping, timm's own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import optimizer_kwargs
from timm.task import TrainingTask
from timm.utils import adaptive_clip_grad
from torch import nn

from ..utils.errors import UserError, nearest, one_line
from .settings import OptimizerSettings


def resolve_lr(optimizer: OptimizerSettings, batch_size: int, world_size: int) -> float:
    """`lr`, or `lr_base` scaled by the images in a step over all processes, as timm does."""
    if optimizer.lr is not None:
        return optimizer.lr
    adaptive = any(word in optimizer.opt.lower() for word in ('ada', 'lamb'))
    scale = optimizer.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = batch_size * world_size * optimizer.grad_accum_steps / optimizer.lr_base_size
    return optimizer.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_optimizer(optimizer: OptimizerSettings, module: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer over all parameters that need a gradient; `lr` is set, see `resolve_lr`.

    Raises:
        UserError: An unknown optimizer, or settings that it refuses.
    """
    known = [str(name) for name in list_optimizers()]
    if optimizer.opt.lower() not in known:
        raise UserError(f'`opt` {optimizer.opt}: unknown to timm{nearest(optimizer.opt, known)}')
    values = SimpleNamespace(**dataclasses.asdict(optimizer), opt_args=optimizer.opt_kwargs or None)
    options: dict[str, Any] = optimizer_kwargs(values)
    try:
        return create_optimizer_v2(module, **options, filter_bias_and_bn=optimizer.filter_bias_and_bn)
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError, ImportError) as error:
        what = f'`opt` {optimizer.opt} with `opt_betas` {optimizer.opt_betas} and `opt_kwargs` {optimizer.opt_kwargs}'
        raise UserError(f'{what}: {one_line(error)}') from None


def clip_gradients(accelerator: Accelerator, task: TrainingTask, optimizer: OptimizerSettings) -> None:
    """Clip gradients, after mixed precision's scale is taken out."""
    if optimizer.clip_grad is None:
        return
    if optimizer.clip_mode == 'norm':
        accelerator.clip_grad_norm_(task.get_clip_parameters(), optimizer.clip_grad)
    elif optimizer.clip_mode == 'value':
        accelerator.clip_grad_value_(task.get_clip_parameters(), optimizer.clip_grad)
    else:
        accelerator.unscale_gradients()
        adaptive_clip_grad(task.get_clip_parameters(exclude_head=True), optimizer.clip_grad, norm_type=2.0)
