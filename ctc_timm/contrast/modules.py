"""What a CTC task trains, as modules: the body, and body and losses together.

Letters: B batch, C classes, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from ..models.backbones import features_and_logits
from .losses import InstanceDiscriminationLoss, TemporalContrastLoss
from .negatives import Draw


class Backbone(nn.Module):
    """A timm model whose forward gives features and logits, so that both can be compiled and wrapped as one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, ...] to features [B, D] and logits [B, C]."""
        return features_and_logits(self.model, images)


class CTCModule(nn.Module):
    """All that has gradients: the model and both losses' projectors, one module so that DDP sees one forward.

    The banks are left out of DDP's buffer broadcast: every process already holds the same ones, see `banks`.
    """

    def __init__(self, model: nn.Module, instance: InstanceDiscriminationLoss, temporal: TemporalContrastLoss) -> None:
        super().__init__()
        self.body = Backbone(model)
        self.instance = instance
        self.temporal = temporal
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith(('instance.', 'temporal.'))
        ]

    def forward(
        self,
        images: Tensor,
        index_B: Tensor | None = None,
        lam_B: Tensor | None = None,
        past_BD: Tensor | None = None,
        draw: Draw | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C] and the contrast of the stage: temporal with drawn rows, else instance, if any."""
        features_BD, logits_BC = self.body(images)
        if index_B is None:
            return logits_BC, None
        if draw is None:
            return logits_BC, self.instance(features_BD, index_B, lam_B)
        contrast = self.temporal(features_BD, past_BD, index_B, *draw, lam_B)
        return logits_BC, contrast

    def no_weight_decay(self) -> set[str]:
        """The model's own exceptions, under this module's names (read by timm's optimizer factory)."""
        model: Any = self.body.model
        exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
        return {f'body.model.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The model's layers, then the projectors with its head (read by timm for layer-wise learning rates)."""
        model: Any = self.body.model
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('body.model.'), last)
