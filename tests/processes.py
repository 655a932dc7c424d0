"""Several processes of a test, over gloo, and batch norm over all of them, which PyTorch's own refuses on the CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def _run(rank: int, world: int, port: int, function: Callable[..., Any], file: str) -> None:
    place = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    torch.save(function(rank, world), f'{file}-{rank}.pt')
    dist.destroy_process_group()


def run_processes(function: Callable[[int, int], Any], world: int, folder: Any) -> list[Any]:
    """Call a module-level function(rank, world) in so many processes and return what each gave."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    file = f'{folder}/{world}'
    # Forked, as each would import everything anew otherwise.
    mp.start_processes(_run, (world, port, function, file), nprocs=world, start_method='fork')
    return [torch.load(f'{file}-{rank}.pt') for rank in range(world)]


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """Batch norm of x, [B, C, ...], with the statistics of all processes' images, summed in float64."""
    axes, shape, channels = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)], x.shape[1]
    wide = x.double()
    here = [wide.sum(axes), wide.square().sum(axes), wide.new_tensor([x.numel() / channels])]
    total = all_reduce(torch.cat(here))  # its gradient is the sum of the processes' gradients
    count, mean_C = total[-1], total[:channels] / total[-1]
    var_C = (total[channels:-1] / count - mean_C.square()).clamp_min(0)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean_C.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_((var_C * (count / (count - 1))).to(norm.running_var), norm.momentum)
    result = (wide - mean_C.view(shape)) / (var_C + norm.eps).sqrt().view(shape)
    return (result * norm.weight.view(shape) + norm.bias.view(shape)).to(x.dtype)


class _BatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return _normalize(self, input) if self.training else super().forward(input)


class _BatchNormAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalize(self, x))) if self.training else super().forward(x)


def synchronize(model: nn.Module) -> nn.Module:
    """Have a model's batch norms see the images of all processes; parameters and names stay."""
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.__class__ = _BatchNormAct
        elif isinstance(module, nn.BatchNorm2d):
            module.__class__ = _BatchNorm
    return model
