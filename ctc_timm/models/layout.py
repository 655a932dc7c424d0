"""The memory layout that a model runs in: channels-last where that was measured to be faster, else PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_DENSE_CHANNELS, _DENSE_SHARE = 64, 0.9


def use_layout(model: Any, channels_last: bool | None, device: torch.device) -> Any:
    """Lay a model's convolutions out, channels-last or as PyTorch does, or by `prefers_channels_last` with None.

    Images need no change: a convolution takes them in any layout, and gives its output in that of its weights.
    """
    if prefers_channels_last(model, device) if channels_last is None else channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether channels-last is the faster layout, by what benchmarks/layout.py measures.

    It is not where nothing is convolved but patches. On a CPU it is not where nearly all weights are those of dense
    convolutions over many channels, as in ResNet-18, which oneDNN runs in a layout of its own.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(convs) < 4 or device.type not in ('cpu', 'cuda'):
        return False
    total = sum(conv.weight.numel() for conv in convs)
    dense = sum(
        conv.weight.numel()
        for conv in convs
        if conv.groups == 1 and min(conv.kernel_size) > 1 and conv.in_channels >= _DENSE_CHANNELS
    )
    return device.type == 'cuda' or dense < _DENSE_SHARE * total
