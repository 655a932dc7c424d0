"""Contrastive temporal coding (CTC) for every timm backbone.

`import ctc_timm` registers `<arch>_ctc` for every timm architecture with timm's own registry, and the
`cifar_*` models for 32x32 images. The names below are the public interface; they are loaded when first used,
so that the import stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models import registry as _registry

if TYPE_CHECKING:
    from .contrast.losses import InstanceDiscriminationLoss, TemporalContrastLoss
    from .contrast.negatives import NegativeSampler
    from .contrast.task import CTCTask
    from .hub.publish import publish
    from .models.backbones import feature_dim, features_and_logits
    from .utils.errors import UserError

__version__ = '0.1.0'
__all__ = [
    'CTCTask',
    'InstanceDiscriminationLoss',
    'NegativeSampler',
    'TemporalContrastLoss',
    'UserError',
    'feature_dim',
    'features_and_logits',
    'publish',
]

_HOME = {
    'CTCTask': '.contrast.task',
    'InstanceDiscriminationLoss': '.contrast.losses',
    'NegativeSampler': '.contrast.negatives',
    'TemporalContrastLoss': '.contrast.losses',
    'UserError': '.utils.errors',
    'feature_dim': '.models.backbones',
    'features_and_logits': '.models.backbones',
    'publish': '.hub.publish',
}

_registry.register_all()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
