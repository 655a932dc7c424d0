"""Ways for a fine-tuned model to keep what its start knew, beside the temporal term: they are its rivals."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .settings import RetentionSettings


def retain(optimizer: Optimizer, model: Any, settings: RetentionSettings) -> None:
    """Change an optimizer as the settings say; the start is the model as it is now, before the first step."""
    body = body_of(model)
    if settings.body_lr_scale != 1:
        scale_body_lr(optimizer, body, settings.body_lr_scale)
    if settings.l2_sp:
        pull_to_start(optimizer, body, settings.l2_sp)


def body_of(model: Any) -> list[nn.Parameter]:
    """List what is trained of a model but its classifier."""
    found = model.get_classifier()
    heads = [found] if isinstance(found, nn.Module) else list(found)  # distilled models have several
    classifier = {id(parameter) for head in heads for parameter in head.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in classifier]


def scale_body_lr(optimizer: Optimizer, body: list[nn.Parameter], scale: float) -> None:
    """Give the body a learning rate of its own, as timm scales those of layers; the classifier's groups come last."""
    inside, groups = {id(parameter) for parameter in body}, optimizer.param_groups
    halves: tuple[list[Any], list[Any]] = [], []
    for group in groups:
        for half, wanted in zip(halves, (True, False)):
            if chosen := [p for p in group['params'] if (id(p) in inside) is wanted]:
                factor = group.get('lr_scale', 1.0) * (scale if wanted else 1.0)
                half.append({**group, 'params': chosen, 'lr_scale': factor})
    groups[:] = halves[0] + halves[1]


def pull_to_start(optimizer: Optimizer, body: list[nn.Parameter], strength: float) -> None:
    """Add the gradient of strength / 2 * |w - start|^2 to each step, L2-SP (arXiv 1802.01483, equation 2).

    The start is what the parameters are now. Weight decay stays as it is.
    """
    start = [parameter.detach().clone() for parameter in body]

    @torch.no_grad()
    def pull(*_: Any) -> None:
        for parameter, at_start in zip(body, start):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - at_start, alpha=strength)

    optimizer.register_step_pre_hook(pull)
