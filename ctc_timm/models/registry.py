"""`<arch>_ctc`: a second name for every timm architecture, under which only CTC weights are ever loaded.

A `_ctc` model is the base architecture itself, class and parameter names included, and takes every argument the base
takes. What differs is where `pretrained=True` looks: in the catalogs of CTC weights, never among the weights of the
base. So a mistyped or not yet published name is an error, not a quietly different model.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
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

from ..utils.errors import UserError, one_line
from . import catalog
from .catalog import Entry
from .pretrained_cfg import FIELDS, SUFFIX

__all__ = ['NoPretrainedWeights', 'register_all']

_logger = logging.getLogger(__name__)

NAMESPACE = 'CTC_TIMM_NAMESPACE'

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks

_entries: dict[str, dict[str, Entry]] = {}  # by architecture and tag
_problems: list[UserError] = []  # with catalogs that can't be used


class NoPretrainedWeights(UserError, RuntimeError):
    """No CTC weights are published for what was asked. A RuntimeError too, as timm's own models raise."""


def register_all() -> None:
    """Register `<arch>_ctc` for every architecture timm lists, ours for 32x32 images included.

    Names that are registered already are left as they are, so calling it again does no harm.
    """
    from . import cifar  # noqa: F401  (registers its models)

    entries, _problems[:] = catalog.load_all()
    for problem in _problems:
        if not isinstance(problem, catalog.NoCatalog):  # which `ctc-timm zoo add` may be about to make
            _logger.warning('%s: %s', catalog.ENVIRONMENT, problem)
    for entry in entries.values():
        _entries.setdefault(entry.architecture, {})[entry.tag] = entry
    for arch in list_models():
        name = arch + SUFFIX
        if arch.endswith(SUFFIX) or is_model(name):
            continue
        default_cfgs[name] = _make_cfgs(arch)
        globals()[name] = entrypoint = _make_entrypoint(arch)  # register_model lists it in __all__
        register_model(entrypoint)


def _make_cfgs(arch: str) -> DefaultCfg:
    """Make the configs of `<arch>_ctc` by tag; the one without a tag, or else the first, is the default, as in timm."""
    entries = _entries.get(arch)
    if entries:
        tags = sorted(entries, key=bool)  # stable: only the empty tag moves, to the front
        return DefaultCfg(deque(tags), {tag: entries[tag].to_timm() for tag in tags}, is_pretrained=True)
    # timm's public look-up copies deeply, which takes long over all architectures; its table is only read here.
    cfg = getattr(_registry, '_model_pretrained_cfgs', {}).get(arch) or get_pretrained_cfg(arch)
    kept = {key: getattr(cfg, key) for key in FIELDS} if cfg else {}
    return DefaultCfg(deque(['']), {'': PretrainedCfg(**kept)})


def _make_entrypoint(arch: str) -> Callable[..., nn.Module]:
    """Make the function that timm calls to build `<arch>_ctc`."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(arch, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = arch + SUFFIX
    entrypoint.__doc__ = f'timm {arch}, to be trained by CTC or loaded with CTC weights.'
    return entrypoint


def _create(
    arch: str, pretrained: bool, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **kwargs: Any
) -> nn.Module:
    """Build the base architecture with the config of its `_ctc` name, from arguments as timm's factory gives them.

    Raises:
        NoPretrainedWeights: The tag is unknown, or weights are wanted and nobody published any.
        HubError: There are weights, but they can't be had, or are not those that were published.
    """
    cfg, entry = _resolve(arch, pretrained, pretrained_cfg, pretrained_cfg_overlay, kwargs.get('cache_dir'))
    if entry is not None:
        # What the weights were made with is the default, as it is for timm's hf-hub: and local-dir: names.
        kwargs = {**entry.model_args, 'pretrained_model_args': dict(entry.model_args), **kwargs}
    if cfg.architecture == arch + SUFFIX:
        # Exported configs name the base, so that plain timm can load them.
        cfg = dataclasses.replace(cfg, architecture=arch)

    # A few architectures (Qwen's and DeepSeek's encoders) read a layer's width off the tag of their weights.
    # They are lent the base's own tag, which the finished model must not carry: it has none of those weights.
    lent = entry is None and not cfg.tag and not pretrained_cfg
    if lent:
        base_cfg = get_pretrained_cfg(arch)
        cfg = dataclasses.replace(cfg, tag=base_cfg.tag if base_cfg else None)
    create = partial(model_entrypoint(arch), pretrained=pretrained, **kwargs)
    if entry is None or not pretrained:
        model = create(pretrained_cfg=cfg)
    else:
        model = _with_weights(create, cfg, entry, kwargs.get('cache_dir'))
    if entry is not None:
        # timm's factory records the arguments it was given; an export needs those that were filled in, too.
        filled = {k: v for k, v in kwargs.items() if k in entry.model_args}
        model._model_args = {**getattr(model, '_model_args', {}), **filled}
    if lent:
        for module in model.modules():  # a features_only wrapper and the model inside have their own copies
            for alias in ('pretrained_cfg', 'default_cfg'):
                getattr(module, alias, {}).pop('tag', None)
    return model


def _resolve(
    arch: str, pretrained: bool, pretrained_cfg: Any, overlay: Any, cache_dir: Any
) -> tuple[PretrainedCfg, Entry | None]:
    """Find the config that was meant, and the published weights that it points at, if it does."""
    name, tag = arch + SUFFIX, pretrained_cfg if isinstance(pretrained_cfg, str) else ''
    try:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    except RuntimeError as error:  # a tag that no catalog has
        if not pretrained:
            raise _not_published(name, tag) from error
        cfg = PretrainedCfg()
    entry = _entries.get(arch, {}).get(cfg.tag or '')
    if entry is not None:  # which is meant if timm would load its weights for that config
        theirs = entry.to_timm()
        same = all(getattr(cfg, key) == getattr(theirs, key) for key in ('file', 'hf_hub_id', 'hf_hub_filename'))
        entry = entry if same and not cfg.state_dict else None
    if not pretrained or (entry is None and (cfg.has_weights or cfg.state_dict)):
        return cfg, entry
    if _problems:  # a catalog that can't be read may say which weights are meant
        raise NoPretrainedWeights(f'{name}: {catalog.ENVIRONMENT}: {_problems[0]}')
    if entry is None:
        entry = _find_in_namespace(name, tag, cache_dir)
        found: Any = entry.to_timm()  # which timm takes too, beside the dict it declares
        cfg = resolve_pretrained_cfg(name, found, overlay)
    return cfg, entry


def _find_in_namespace(name: str, tag: str, cache_dir: Any) -> Entry:
    """Find the weights of that name in the user's own namespace on the Hub."""
    namespace = os.environ.get(NAMESPACE, '').strip()
    if not namespace:
        raise _not_published(name, tag)
    from .download import NotPublished, find

    if not catalog.is_word(namespace):
        raise NoPretrainedWeights(f'{NAMESPACE}={namespace!r}: must be the name of a user or an organization')
    tag, _, revision = tag.partition('@')
    full = f'{name}.{tag}' if tag else name
    if not catalog.NAME.fullmatch(full):
        raise NoPretrainedWeights(f'{full!r} is no name of a model')
    try:
        return find(f'{namespace}/{full}', full, revision, cache_dir)
    except NotPublished as error:
        raise _not_published(name, tag, f'; {error}') from None


def _with_weights(create: Callable[..., nn.Module], cfg: PretrainedCfg, entry: Entry, cache_dir: Any) -> nn.Module:
    """Build the model, and load the very bytes that were found to be the published ones."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from .download import HubError, fetch

    content = fetch(entry, cache_dir)
    try:
        model = create(pretrained_cfg=dataclasses.replace(cfg, state_dict=load(content)))
        for module in model.modules():
            for alias in ('pretrained_cfg', 'default_cfg'):
                getattr(module, alias, {}).pop('state_dict', None)
        return model
    except (SafetensorError, RuntimeError, KeyError, AssertionError, TypeError, ValueError) as error:
        where = entry.path or f'{entry.hub_id}@{entry.revision}'
        raise HubError(f'{entry.name}: {where} does not fit {entry.architecture}: {one_line(error)}') from error


def _not_published(name: str, tag: str, reason: str = '') -> NoPretrainedWeights:
    """Say what there is, and how to make what there is not."""
    arch = name.removesuffix(SUFFIX)
    wanted = f'{name}.{tag}' if tag else name
    names = ', '.join(entry.name for entry in _entries.get(arch, {}).values()) or f'nothing for {arch} yet'
    text = (
        f'no CTC weights are cataloged for {wanted!r}: there is {names}{reason}; train it with '
        f'`ctc-timm train --model {arch}` and publish it with `ctc-timm publish RUN --repo-id USER/{wanted}`'
    )
    return NoPretrainedWeights(text if tag else f'{text}, or create it with pretrained=False')
