"""Batch norms of a frozen model, folded into the convolutions before them.

In evaluation mode a batch norm is an affine map of each channel, which a convolution can do by other weights:
W' = W g / sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .backbones import features_and_logits

_TOLERANCE = 1e-3  # of the largest feature; rounding gives about 1e-6


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy in evaluation mode for forward passes alone, with fewer batch norms and the same features.

    What follows what is seen on a pass of `images` [B, C, H, W], so no architecture has to be known. A model that has
    nothing to fold, or whose features on these images would change, is copied as it is.

    Args:
        model: A timm model with a head, not compiled.
        images: As the model takes them; two are enough.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _fold(deepcopy(model).eval().requires_grad_(False), images.to(next(model.parameters()).dtype))


def _fold(plain: nn.Module, images: Tensor) -> nn.Module:
    folded = deepcopy(plain)
    modules: dict[str, Any] = dict(folded.named_modules())
    for conv, norm in _pairs(plain, images):
        one, other = modules[conv], modules[norm]
        statistics = other.running_mean, other.running_var, other.eps, other.weight, other.bias
        weight, bias = fuse_conv_bn_weights(one.weight, one.bias, *statistics)
        one.weight, one.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        rest = nn.Sequential(other.drop, other.act) if isinstance(other, BatchNormAct2d) else nn.Identity()
        parent, _, name = norm.rpartition('.')
        setattr(modules[parent], name, rest.eval())
    try:
        expected, found = (features_and_logits(net, images)[0].float() for net in (plain, folded))
    except (AttributeError, RuntimeError, TypeError):  # a model that reads its batch norms by itself
        return plain
    # Features that are not finite leave the copy as it is.
    return folded if bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max()) else plain


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of each convolution and the batch norm that takes its output, where each of them runs once in a pass."""
    norms: Any = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats and module.affine
    }
    convs = {name: module for name, module in model.named_modules() if type(module) in (nn.Conv2d, Conv2dSame)}
    outputs: list[tuple[Tensor, str]] = []  # held, so that no other tensor gets the identity of one
    inputs: list[tuple[Tensor, str]] = []
    hooks = [
        conv.register_forward_hook(lambda module, given, output, name=name: outputs.append((output, name)))
        for name, conv in convs.items()
    ]
    hooks += [
        norm.register_forward_pre_hook(lambda module, given, name=name: inputs.append((given[0], name)))
        for name, norm in norms.items()
    ]
    try:
        features_and_logits(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    made = {id(output): name for output, name in outputs}
    calls = [name for _, name in (*outputs, *inputs)]
    found = [(made[id(taken)], norm) for taken, norm in inputs if id(taken) in made]
    return [(conv, norm) for conv, norm in found if calls.count(conv) == calls.count(norm) == 1]
