"""Settings of models: which one, how it is built, and how it runs. Nothing here imports torch or timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..utils.settings import setting


@dataclass(frozen=True)
class SourceSettings:
    """A model with its weights, to measure or to start from."""

    source: str | None = setting(
        None, 'run folder, weights file, timm name, hf-hub: or local-dir:', positional='?', metavar='MODEL'
    )
    model: str = setting('', 'timm name, hf-hub: or local-dir:; architecture of a weights file', metavar='NAME')
    checkpoint: str = setting('', 'weights file or run folder', metavar='FILE')
    pretrained: bool = setting(False, 'always meant for a name; taken for timm users')
    use_ema: bool = setting(False, "take a checkpoint's moving average")


@dataclass(frozen=True)
class ModelSettings:
    """The model to train."""

    model: str = setting('resnet50', 'any timm name, hf-hub:REPO or local-dir:FOLDER', metavar='NAME')
    pretrained: bool = setting(False, "start from the name's pretrained weights")
    pretrained_path: str = setting('', 'start from it as from pretrained weights', metavar='FILE')
    initial_checkpoint: str = setting('', 'start from these weights', metavar='FILE')
    use_ema: bool = setting(True, "take a checkpoint's moving average")
    num_classes: int | None = setting(
        None, "outputs; the data set's classes when not given", low=1, high=10**6, metavar='N'
    )


@dataclass(frozen=True)
class ArchitectureSettings:
    """How timm builds a model."""

    gp: str | None = setting(None, 'global pooling type', metavar='POOL')
    drop: float = setting(0.0, 'dropout before the classifier', low=0, high=1, metavar='P')
    drop_path: float | None = setting(None, 'stochastic depth', low=0, high=1, metavar='P')
    drop_block: float | None = setting(None, 'drop block', low=0, high=1, metavar='P')
    bn_momentum: float | None = setting(None, 'batch norm momentum', low=0, high=1, metavar='M')
    bn_eps: float | None = setting(None, 'batch norm epsilon', above=0, metavar='EPS')
    model_kwargs: dict[str, Any] = setting({}, 'more for the model', metavar='KEY=VALUE')


@dataclass(frozen=True)
class ExecutionSettings:
    """How a model runs while it trains."""

    channels_last: bool | None = setting(None, 'channels-last memory layout; where it is faster when not given')
    grad_checkpointing: bool = setting(False, 'trade time for memory')
    torchcompile: str | None = setting(None, 'compile the model', const='inductor', metavar='BACKEND')
    torchcompile_mode: Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'] | None = (
        setting(None, "torch.compile's mode")
    )


@dataclass(frozen=True)
class BatchNormSettings:
    """Batch norm with several processes."""

    sync_bn: bool = setting(False, 'batch norm over all processes')
    dist_bn: Literal['reduce', 'broadcast', ''] = setting(
        'reduce', 'how processes share batch norm statistics after an epoch'
    )
