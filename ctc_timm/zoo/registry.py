"""`<arch>_ctc`: a second name for every timm architecture, under which only CTC weights are ever loaded.

A `_ctc` model is the base architecture itself, class and parameter names included, and takes every argument
the base takes. What differs is where `pretrained=True` looks: in the catalogue of CTC weights, never among
the weights of the base. So a mistyped or not yet published name is an error, not a quietly different model.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    _registry,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..errors import UserError

__all__ = ['NoPretrainedWeights', 'register_all']

SUFFIX = '_ctc'

# Facts about the data and the shape of a model, which hold for any weights of it. A list of what to keep, not
# of what to drop: a kind of weight source that timm adds later must not slip through.
KEPT = (
    'input_size',
    'test_input_size',
    'min_input_size',
    'fixed_input_size',
    'interpolation',
    'crop_pct',
    'test_crop_pct',
    'crop_mode',
    'mean',
    'std',
    'num_classes',
    'pool_size',
    'test_pool_size',
    'first_conv',
    'classifier',
)

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks


class NoPretrainedWeights(UserError, RuntimeError):
    """No CTC weights are catalogued for what was asked. A RuntimeError too, as timm's own models raise."""


def register_all() -> None:
    """Register `<arch>_ctc` for every architecture timm lists, ours for 32x32 images included.

    Names that are registered already are left as they are, so calling it again does no harm.
    """
    from . import cifar  # noqa: F401  (registers its models)

    for arch in list_models():
        name = arch + SUFFIX
        if arch.endswith(SUFFIX) or is_model(name):
            continue
        default_cfgs[name] = _cfgs(arch)
        entry = _entry_point(arch)
        globals()[name] = entry  # register_model lists it in __all__
        register_model(entry)


def _cfgs(arch: str) -> DefaultCfg:
    """The configs of `<arch>_ctc` by tag; the first one is the default. Catalogued weights will come here."""
    # timm's public look-up copies deeply, which over all architectures is most of the time `import ctc_timm`
    # may take. Its table is only read here, and what is taken from it doesn't change.
    cfg = getattr(_registry, '_model_pretrained_cfgs', {}).get(arch) or get_pretrained_cfg(arch)
    kept = {key: getattr(cfg, key) for key in KEPT} if cfg else {}
    return DefaultCfg(tags=deque(['']), cfgs={'': PretrainedCfg(**kept)})


def _entry_point(arch: str) -> Callable[..., nn.Module]:
    """The function timm calls to build `<arch>_ctc`."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(arch, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = arch + SUFFIX
    entry.__doc__ = f'timm {arch}, to be trained by CTC or loaded with CTC weights.'
    return entry


def _create(
    arch: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the base architecture with the config of its `_ctc` name.

    Args:
        arch: The base architecture.
        pretrained: Load weights from the config's source.
        pretrained_cfg: A tag, or a whole config (a dict or a PretrainedCfg) that replaces the registered one.
        pretrained_cfg_overlay: Single entries that replace those of the config.
        **kwargs: What the base architecture takes.

    Returns:
        The base architecture's model.

    Raises:
        NoPretrainedWeights: The tag is unknown, or weights are wanted and the config has no source of any.
    """
    name = arch + SUFFIX
    try:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    except RuntimeError as error:
        raise NoPretrainedWeights(f'{name} has no CTC weights with the tag {pretrained_cfg!r}') from error
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise NoPretrainedWeights(
            f'no CTC weights are catalogued for {name}: train it with `train.py --model {arch} --mode ctc`, '
            'or create it with pretrained=False'
        )
    if cfg.architecture == name:
        # Exported configs name the base, so that plain timm can load them.
        cfg = dataclasses.replace(cfg, architecture=arch)

    # A few architectures (Qwen's and DeepSeek's encoders) read a layer's width off the tag of their weights.
    # They are lent the base's own tag, which the finished model must not carry: it has none of those weights.
    lent = not cfg.tag and not pretrained_cfg
    if lent:
        cfg = dataclasses.replace(cfg, tag=_default_tag(arch))
    model = model_entrypoint(arch)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    if lent:
        for module in model.modules():  # a features_only wrapper and the model inside have their own copies
            for alias in ('pretrained_cfg', 'default_cfg'):
                getattr(module, alias, {}).pop('tag', None)
    return model


def _default_tag(arch: str) -> str | None:
    """The tag of the weights timm takes for `arch` by default."""
    cfg = get_pretrained_cfg(arch)
    return cfg.tag if cfg else None
