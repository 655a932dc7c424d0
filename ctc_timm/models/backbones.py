"""Features and logits of any timm model, from one pass through its backbone.

Every timm model splits in two: `forward_features`, the backbone, and `forward_head`, which pools, and stops before the
classifier when asked for `pre_logits`. So nothing here knows one family of models from another.

Letters: B batch, D feature size, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.errors import UserError, one_line


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled features and class scores of a batch: the backbone runs once and the head twice.

    The logits are those of `model(images)`, also in training: the same kernels run in the same order on the same
    random numbers, and batch statistics are counted once. A head with dropout draws another mask for the features.
    Under `torch.compile` or DistributedDataParallel, compile or wrap a module whose forward calls this; a wrapper
    given as `model` would be bypassed.

    Args:
        model: A timm model; a UserError is raised for one without a classification head.
        images: [B, channels, height, width].

    Returns:
        features [B, D] and logits [B, C].
    """
    _require_head(model)
    timm_model: Any = model
    maps = timm_model.forward_features(images)
    logits = timm_model.forward_head(maps)

    # Some heads hold a BatchNorm before the classifier (MobileNetV4, EfficientViT). It has just seen this batch; now
    # it normalizes by the batch again, but must not count it a second time.
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        features = timm_model.forward_head(maps, pre_logits=True)
    finally:
        for norm in norms:
            norm.track_running_stats = True
    return features.flatten(1), logits


def feature_dim(model: nn.Module) -> int:
    """Return D of `features_and_logits`, or raise its UserError: `head_hidden_size`, or else tried on a blank image."""
    _require_head(model)
    if stated := getattr(model, 'head_hidden_size', None):  # true of every architecture of timm 1.0.31
        return int(stated)
    parameter = next(model.parameters())
    size = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    blank = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        return features_and_logits(copy.deepcopy(model).eval(), blank)[0].shape[1]


def has_classification_head(model: nn.Module) -> bool:
    """Whether the model ends in a classifier, as timm's encoders and `features_only` models do not."""
    return hasattr(model, 'forward_head') and getattr(model, 'num_classes', 0) > 0


def architecture(model: Any) -> str:
    """Return the name of the model's architecture in timm's registry."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__


def check_input(model: nn.Module, input_size: Sequence[int], training: bool = False) -> None:
    """Show the model one blank image of the size that the data will have, or raise a UserError if it takes none.

    With `training`, also check that it can be trained on batches of one image.
    """
    blank, size = torch.zeros(1, *input_size), 'x'.join(map(str, input_size))
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(blank)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f'`img_size`: {architecture(model)} cannot take {size} images: {one_line(error)}') from None
    finally:
        model.train(was_training)
    try:
        if training:
            with torch.no_grad():
                copy.deepcopy(model).train()(blank)
    except ValueError:
        fault = f'the batch norms of {architecture(model)} need more than one value a channel to train on'
        raise UserError(f'`batch_size` 1: {fault}, with {size} images; use at least 2') from None


def _require_head(model: nn.Module) -> None:
    if not has_classification_head(model):
        raise UserError(
            f'model {architecture(model)!r} has no classification head: create it with num_classes of at least 1, '
            'or take another model if it is an encoder only'
        )
