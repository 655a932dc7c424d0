"""Keeping part of a model as it was loaded: its stem, or all but its classifier."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from ..models.backbones import architecture
from ..utils.errors import UserError

PARTS = ('none', 'stem', 'body')


def freeze(model: Any, part: str) -> list[str]:
    """Take part of a model out of training.

    Its parameters need no gradient any more, so that timm's optimizer factory leaves them out. That does not stop
    batch norm from counting: the modules returned must be kept in evaluation mode, see `tasks.SupervisedTask`.
    timm's own `freeze` would put other modules in place of 2d batch norms, and leave other norms running.

    Args:
        model: A timm model with a classifier.
        part: 'none'; 'stem', the first of the groups that timm cuts the model into; 'body', all but the classifier.

    Returns:
        Names of the outermost modules all of whose parameters and buffers are frozen.

    Raises:
        UserError: The model has no such part, or nothing besides.
    """
    if part == 'none':
        return []
    parameters = dict(model.named_parameters())
    names = [*parameters, *(name for name, _ in model.named_buffers())]
    frozen = _stem(model, names, parameters) if part == 'stem' else _body(model, names)
    chosen = [tensor for name, tensor in parameters.items() if name in frozen]
    if not 0 < len(chosen) < len(parameters):
        size = 'all' if chosen else 'none'
        raise UserError(f'`freeze` {part}: that is {size} of {architecture(model)}; choose another part, or none')
    for tensor in chosen:
        tensor.requires_grad_(False)
    modules: list[str] = []
    for module, _ in model.named_modules():
        if not module or any(module.startswith(f'{outer}.') for outer in modules):
            continue
        own = [name for name in names if name.startswith(f'{module}.')]
        if own and frozen.issuperset(own):
            modules.append(module)
    return modules


def _stem(model: Any, names: list[str], parameters: Collection[str]) -> set[str]:
    """The tensors up to the first group with parameters."""
    try:
        groups = group_with_matcher(((name, None) for name in names), model.group_matcher(coarse=True))
    except (AttributeError, AssertionError):
        raise UserError(
            f'`freeze` stem: timm does not say what the stem of {architecture(model)} is (no coarse group_matcher); '
            f'use body or none'
        ) from None
    frozen: set[str] = set()
    for group in groups.values():  # in the order of the model
        frozen.update(group)
        if any(name in parameters for name in group):
            break
    return frozen


def _body(model: Any, names: list[str]) -> set[str]:
    found = model.get_classifier()
    classifiers = [found] if isinstance(found, nn.Module) else list(found)  # distilled models have several
    prefixes = tuple(f'{name}.' for name, module in model.named_modules() if any(module is c for c in classifiers))
    return {name for name in names if not name.startswith(prefixes)}
