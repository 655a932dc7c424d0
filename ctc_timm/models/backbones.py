"""Features and logits of any timm model, from one pass through its body.

Every timm model splits in two: `forward_features`, the body, and `forward_head`, which pools, and stops
before the classifier when asked for `pre_logits`. So nothing here knows one family of models from another.

Letters: B batch, D feature size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.errors import UserError, one_line

__all__ = ['architecture', 'check_input', 'feature_dim', 'features_and_logits', 'has_classification_head']


def features_and_logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features and class scores of a batch, for which the body runs once and the head twice.

    The logits are those of `model(images)`, also in training: the same kernels run in the same order on the
    same random numbers, and batch statistics are taken in once. A head that drops out draws a mask of its own
    for the features. Under `torch.compile` or DistributedDataParallel, compile or wrap a module whose forward
    calls this; a wrapper given as `model` would be bypassed.

    Args:
        model: A timm model with a classification head.
        images: [B, channels, height, width].

    Returns:
        features [B, D] and logits [B, C].

    Raises:
        UserError: The model has no classification head.
    """
    _require_head(model)
    timm_model: Any = model
    body = timm_model.forward_features(images)
    logits = timm_model.forward_head(body)

    # Some heads hold a BatchNorm before the classifier (MobileNetV4, EfficientViT). It has just seen this
    # batch; now it normalizes by the batch again, but must not count it a second time.
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        features = timm_model.forward_head(body, pre_logits=True)
    finally:
        for norm in norms:
            norm.track_running_stats = True
    return features.flatten(1), logits


def feature_dim(model: nn.Module) -> int:
    """D of the features that `features_and_logits` gives.

    Args:
        model: A timm model with a classification head.

    Returns:
        What the model states as its `head_hidden_size`, which held for every architecture of timm 1.0.31, or
        for a model that states none, what one image shows.

    Raises:
        UserError: The model has no classification head.
    """
    _require_head(model)
    stated = getattr(model, 'head_hidden_size', None)
    return int(stated) if stated else _measured_dim(model)


def has_classification_head(model: nn.Module) -> bool:
    """Whether the model ends in a classifier of at least one class.

    Args:
        model: Any module.

    Returns:
        False for timm's encoders, `features_only` models, models created with `num_classes=0`, and modules
        that are no timm model.
    """
    return hasattr(model, 'forward_head') and getattr(model, 'num_classes', 0) > 0


def architecture(model: Any) -> str:
    """The name of the model's architecture in timm's registry."""
    return model.pretrained_cfg.get('architecture') or type(model).__name__


def check_input(model: nn.Module, input_size: Sequence[int]) -> None:
    """Show the model one blank image of the size that the data will have.

    Raises:
        UserError: It cannot take that size.
    """
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = 'x'.join(map(str, input_size))
        raise UserError(f'`img_size`: {architecture(model)} cannot take {size} images: {one_line(error)}') from None
    finally:
        model.train(training)


def _require_head(model: nn.Module) -> None:
    """Raise a UserError for a model without a classification head."""
    if not has_classification_head(model):
        name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
        raise UserError(
            f'model {name!r} has no classification head: create it with num_classes of at least 1, '
            'or take another model if it is an encoder only'
        )


@torch.no_grad()
def _measured_dim(model: nn.Module) -> int:
    """The size of the features of one blank image, with the model left as it was found."""
    parameter = next(model.parameters())
    size = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    blank = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return features_and_logits(model, blank)[0].shape[1]
    finally:
        for module, training in modes:
            module.training = training
