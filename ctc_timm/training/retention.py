"""Ways for a fine-tuned model to keep what its start knew, beside the temporal term: they are its rivals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from ..models.backbones import architecture
from ..utils.errors import UserError
from .settings import RetentionSettings


def retain(optimizer: Optimizer, model: Any, settings: RetentionSettings) -> None:
    """Change an optimizer as the settings say; the start is the model as it is now, before the first step."""
    body = body_of(model)
    if settings.body_lr_scale != 1:
        scale_body_lr(optimizer, body, settings.body_lr_scale)
    if settings.l2_sp:
        pull_to_start(optimizer, body, settings.l2_sp)


def set_classifier(model: Any, weights_DC: Tensor, bias_C: Tensor) -> None:
    """Give a model a linear classifier of its features, as linear probing before fine-tuning does (arXiv 2202.10054).

    A class without images has a bias of minus infinity, in whose place comes the smallest other one.

    Raises:
        UserError: The model's classifier is no single linear layer.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, (nn.Linear, nn.Conv2d)) or classifier.weight.numel() != weights_DC.numel():
        raise UserError(f'`probe_first`: the classifier of {architecture(model)} is no linear layer; leave it out')
    finite_C = bias_C.isfinite()
    with torch.no_grad():
        classifier.weight.copy_(weights_DC.T.reshape(classifier.weight.shape))
        if classifier.bias is not None:
            classifier.bias.copy_(torch.where(finite_C, bias_C, bias_C[finite_C].min()))


@torch.no_grad()
def average_with_start(
    model: Any, start: Any, share: float, images: Iterable[Any] | None, device: torch.device, classifier: bool
) -> None:
    """Average weights with those of the start, whose part is `share`, as WiSE-FT does (arXiv 2109.01903, equation 1).

    The classifier is averaged only if asked for: a start that never saw the classes has none to average with. The
    statistics of batch norms are computed anew over `images`, batches whose first part they are; None leaves them.
    """
    averaged = dict(model.named_parameters())
    inside = {id(p) for p in body_of(model, trained=False)}
    for name, at_start in start.named_parameters():
        if classifier or id(averaged[name]) in inside:
            averaged[name].lerp_(at_start.to(averaged[name]), share)
    if images is not None:
        update_bn(images, model, device)
    model.eval()


def body_of(model: Any, trained: bool = True) -> list[nn.Parameter]:
    """List the parameters of a model but its classifier's; only those that are trained, unless told otherwise."""
    found = model.get_classifier()
    heads = [found] if isinstance(found, nn.Module) else list(found)  # distilled models have several
    classifier = {id(parameter) for head in heads for parameter in head.parameters()}
    return [p for p in model.parameters() if (p.requires_grad or not trained) and id(p) not in classifier]


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
