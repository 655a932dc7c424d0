"""Batch norm over all processes, on any device.

PyTorch's own, which timm's `convert_sync_batchnorm` puts in, refuses the CPU. There the sums over the batch are
added up by a differentiable all-reduce, after which several processes compute what one with all their images would.

Letters: C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.utils import distribute_bn, unwrap_model
from torch import Tensor, nn


def synchronize(model: nn.Module, device: torch.device) -> Any:
    """The model with its batch norms over all processes; parameters and names stay."""
    if device.type != 'cpu':
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.__class__ = _BatchNormActOverProcesses
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _BatchNormOverProcesses
    return model


def share_statistics(model: nn.Module, averaged: nn.Module | None, processes: int, how: str) -> None:
    """Give all processes the same running statistics before an evaluation, as timm does.

    Args:
        model: The model that is trained.
        averaged: Its moving average, which has statistics of its own.
        processes: How many there are.
        how: 'reduce' for their mean, 'broadcast' for the first one's, '' to leave them.
    """
    if processes == 1 or not how:
        return
    trained = {name for name, norm in model.named_modules() if norm.training}  # a mean would round frozen ones
    for some in (model, unwrap_model(averaged)) if averaged is not None else (model,):
        for name, norm in some.named_modules():
            if name in trained and getattr(norm, 'running_mean', None) is not None:
                distribute_bn(norm, processes, how == 'reduce')


class _AllSum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """Batch norm of x, [B, C, ...], with the statistics of all processes' images.

    Means and squares are summed in float64: a variance is a small difference of the two.
    """
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.double()
    here = torch.cat([wide.sum(axes), wide.square().sum(axes), wide.new_tensor([x.numel() / x.shape[1]])])
    total = _AllSum.apply(here)
    count = total[-1]
    mean_C = total[: x.shape[1]] / count
    var_C = (total[x.shape[1] : -1] / count - mean_C.square()).clamp_min(0)
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
            norm.running_mean.copy_(norm.running_mean.lerp(mean_C.to(norm.running_mean), float(share)))
            unbiased_C = var_C * (count / (count - 1))
            norm.running_var.copy_(norm.running_var.lerp(unbiased_C.to(norm.running_var), float(share)))
    result = (wide - mean_C.view(shape)) / (var_C + norm.eps).sqrt().view(shape)
    if norm.affine:
        result = result * norm.weight.view(shape) + norm.bias.view(shape)
    return result.to(x.dtype)


class _BatchNormOverProcesses(nn.BatchNorm2d):
    """A batch norm of one, two or three dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return _normalize(self, input) if self.training else super().forward(input)


class _BatchNormActOverProcesses(BatchNormAct2d):
    """timm's, which drops and activates too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalize(self, x))) if self.training else super().forward(x)
