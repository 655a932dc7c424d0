"""The information bank: the frozen copy of the model that the temporal stage contrasts it with."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..models.backbones import features_and_logits
from ..models.folding import fold_batch_norms


class InformationBank(nn.Module):
    """A copy of a timm model in evaluation mode, without gradients.

    `model` is that copy, which a state holds. Images pass through another one, whose batch norms are folded into its
    convolutions at the first pass: the same features to rounding, for less than a forward pass of the model.

    Args:
        model: A timm model with a head.
        compile_kwargs: For `torch.compile`, or None.
    """

    def __init__(self, model: nn.Module, compile_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        # Compiled or not is a property of the module that deepcopy would carry along; the copy is made plain.
        self.model = deepcopy(model).requires_grad_(False).eval()
        self._compile_kwargs = compile_kwargs
        self._folded: list[nn.Module] = []  # in a list, so that it is part of no state

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> InformationBank:
        self._folded.clear()
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute features [B, D] of images [B, ...]."""
        if not self._folded:
            folded = fold_batch_norms(self.model, images[:2])
            if self._compile_kwargs is not None:
                folded.compile(**self._compile_kwargs)
            self._folded.append(folded)
        return features_and_logits(self._folded[0], images)[0]
