"""One architecture of each of timm's modules, for tests that must hold for all families."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import nn

HEADLESS = [  # timm 1.0.31's encoders, which take no classifier at all
    *('deepseek_vit_412m_enc', 'gemma4_vit_167m_enc', 'gemma4_vit_570m_enc', 'mobilenetv5_300m_enc'),
    *('qwen3_vit_88m_enc', 'qwen3_vit_306m_enc', 'qwen3_vit_416m_enc'),
]


def small_of_each_module() -> list[str]:
    """Of each of timm's modules the model with a head whose name promises to be small; any would do."""
    words = ['test_', 'atto', 'femto', 'pico', 'nano', 'xxs', 'tiny', '_xs', '_t', '_s', 'b0', '18', 'small', '']
    by_module: dict[str, list[str]] = {}
    for name in timm.list_models(exclude_filters=['*_ctc', *HEADLESS]):
        by_module.setdefault(model_entrypoint(name).__module__, []).append(name)
    return [
        min(names, key=lambda n: next(i for i, word in enumerate(words) if word in n)) for names in by_module.values()
    ]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without values. Drawing initial ones would take most of the time, so nothing is drawn."""
    with torch.device('meta'), pytest.MonkeyPatch.context() as patch:
        for in_place in ('uniform_', 'normal_', 'erfinv_', 'mul_', 'add_', 'clamp_', 'fill_', 'zero_'):
            patch.setattr(torch.Tensor, in_place, lambda self, *_, **__: self)
        return timm.create_model(name, **kwargs)
