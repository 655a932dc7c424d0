"""Keeping part of a model as it was loaded: its stem, or all but its classifier."""

from __future__ import annotations

from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from ..models.backbones import architecture
from ..utils.errors import UserError


def freeze(model: Any, part: str) -> list[str]:
    """Take part of a model out of training.

    Its parameters need no gradient any more, so that timm's optimizer factory leaves them out. That does not stop
    batch norm from counting: the modules returned must be kept in evaluation mode, see `tasks.SupervisedTask`.
    timm's own `freeze` would put other modules in place of 2d batch norms, and leave other norms running.

    Args:
        model: A timm model with a classifier.
        part: 'none'; 'stem', the first of the groups that timm cuts the model into; 'body', all but the classifier;
            'batch_norm', every batch norm.

    Returns:
        Names of the outermost modules all of whose parameters and buffers are frozen.

    Raises:
        UserError: The model has no such part, or nothing besides.
    """
    if part == 'none':
        return []
    parameters = dict(model.named_parameters())
    names = [*parameters, *(name for name, _ in model.named_buffers())]
    if part == 'batch_norm':
        norms = [name for name, m in model.named_modules() if getattr(m, 'running_mean', None) is not None]
        frozen = {f'{norm}.{name}' for norm in norms for name in model.get_submodule(norm).state_dict()}
    elif part == 'stem':
        frozen = stage_tensors(model, 1, '`freeze` stem')
    else:
        found = model.get_classifier()
        heads = [found] if isinstance(found, nn.Module) else list(found)  # distilled models have several
        outside = tuple(f'{name}.' for name, module in model.named_modules() if module in heads)
        frozen = {name for name in names if not name.startswith(outside)}
    chosen = [tensor for name, tensor in parameters.items() if name in frozen]
    if not 0 < len(chosen) < len(parameters):
        size = 'all' if chosen else 'none'
        raise UserError(f'`freeze` {part}: that is {size} of {architecture(model)}; choose another part, or none')
    for tensor in chosen:
        tensor.requires_grad_(False)
    modules: list[str] = []
    for module, _ in model.named_modules():
        inside = [name for name in names if name.startswith(f'{module}.')]
        if inside and frozen.issuperset(inside) and not module.startswith(tuple(f'{outer}.' for outer in modules)):
            modules.append(module)
    return modules


def stage_tensors(model: Any, stages: int, setting: str) -> set[str]:
    """Names of the parameters and buffers of a model's first stages, as timm groups them; 1 is the stem.

    Raises:
        UserError: timm does not say what the stages are, or there are not so many.
    """
    parameters = dict(model.named_parameters())
    names = [*parameters, *dict(model.named_buffers())]
    try:
        groups = group_with_matcher(((name, None) for name in names), model.group_matcher(coarse=True))
    except (AttributeError, AssertionError):
        what = f'timm does not say what the stages of {architecture(model)} are (no coarse group_matcher)'
        raise UserError(f'{setting}: {what}; use another value') from None
    found, left = set[str](), stages
    for group in groups.values():  # in the order of the model; some hold buffers only
        if left:
            found.update(group)
            left -= not parameters.keys().isdisjoint(group)
    if left:
        raise UserError(f'{setting}: {architecture(model)} has {stages - left} stages, stem included')
    return found
