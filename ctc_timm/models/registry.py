"""`<arch>_ctc`: a second name for every timm architecture, under which only CTC weights are ever loaded.

A `_ctc` model is the base architecture itself, class and parameter names included, and takes every argument
the base takes. What differs is where `pretrained=True` looks: in the catalog of CTC weights, never among
the weights of the base. So a mistyped or not yet published name is an error, not a quietly different model.
"""

from __future__ import annotations

import dataclasses
import logging
import os
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

from ..utils.errors import UserError, one_line
from . import catalog as catalog
from .catalog import SUFFIX, Entry
from .pretrained_cfg import FACTS

__all__ = ['NoPretrainedWeights', 'register_all']

_logger = logging.getLogger(__name__)

NAMESPACE = 'CTC_TIMM_NAMESPACE'

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks

_catalogd: dict[str, dict[str, Entry]] = {}  # by architecture and tag
_problems: list[UserError] = []  # with catalogs that can't be used


class NoPretrainedWeights(UserError, RuntimeError):
    """No CTC weights are published for what was asked. A RuntimeError too, as timm's own models raise."""


def register_all() -> None:
    """Register `<arch>_ctc` for every architecture timm lists, ours for 32x32 images included.

    Names that are registered already are left as they are, so calling it again does no harm.
    """
    from . import cifar  # noqa: F401  (registers its models)

    _read_catalogs()
    for arch in list_models():
        name = arch + SUFFIX
        if arch.endswith(SUFFIX) or is_model(name):
            continue
        default_cfgs[name] = _cfgs(arch)
        entry = _entry_point(arch)
        globals()[name] = entry  # register_model lists it in __all__
        register_model(entry)


def _read_catalogs() -> None:
    entries, problems = catalog.load_all()
    _problems[:] = problems
    for problem in problems:
        if not isinstance(problem, catalog.NoCatalog):  # which `ctc-timm zoo add` may be about to make
            _logger.warning('%s: %s', catalog.ENVIRONMENT, problem)
    for entry in entries.values():
        _catalogd.setdefault(entry.architecture, {})[entry.tag] = entry


def _cfgs(arch: str) -> DefaultCfg:
    """The configs of `<arch>_ctc` by tag; the first one, or one without a tag, is the default, as in timm."""
    catalogd = _catalogd.get(arch)
    if catalogd:
        tags = sorted(catalogd, key=bool)  # stable: only the empty tag moves, to the front
        cfgs = {tag: catalogd[tag].pretrained_cfg() for tag in tags}
        return DefaultCfg(tags=deque(tags), cfgs=cfgs, is_pretrained=True)
    # timm's public look-up copies deeply, which over all architectures is most of the time `import ctc_timm`
    # may take. Its table is only read here, and what is taken from it doesn't change.
    cfg = getattr(_registry, '_model_pretrained_cfgs', {}).get(arch) or get_pretrained_cfg(arch)
    kept = {key: getattr(cfg, key) for key in FACTS} if cfg else {}
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
        NoPretrainedWeights: The tag is unknown, or weights are wanted and nobody published any.
        HubError: There are weights, but they can't be had, or are not those that were published.
    """
    cache_dir = kwargs.get('cache_dir')
    cfg, entry = _resolve(arch, pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
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
        cfg = dataclasses.replace(cfg, tag=_default_tag(arch))
    if entry is not None and pretrained:
        model = _with_weights(arch, entry, cfg, kwargs)
    else:
        model = model_entrypoint(arch)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    if entry is not None:
        # timm's factory records the arguments it was given; an export needs those that were filled in, too.
        filled = {k: v for k, v in kwargs.items() if k in entry.model_args}
        model._model_args = {**getattr(model, '_model_args', {}), **filled}  # type: ignore[assignment]
    if lent:
        for module in model.modules():  # a features_only wrapper and the model inside have their own copies
            for alias in ('pretrained_cfg', 'default_cfg'):
                getattr(module, alias, {}).pop('tag', None)
    return model


def _resolve(
    arch: str, pretrained: bool, pretrained_cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any
) -> tuple[PretrainedCfg, Entry | None]:
    """The config that was meant, and the published weights it points at, if it does."""
    name = arch + SUFFIX
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else ''
    try:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    except RuntimeError as error:  # a tag that no catalog has
        if not pretrained:
            raise _not_published(name, tag) from error
        cfg = None
    if cfg is not None:
        entry = _entry_of(arch, cfg)
        if entry is not None and pretrained:
            _require_catalogs(name)
        if entry is not None or cfg.has_weights or cfg.state_dict or not pretrained:
            return cfg, entry
    _require_catalogs(name)
    found = _in_namespace(name, tag, cache_dir)
    if found is None:
        raise _not_published(name, tag)
    whole: Any = found.pretrained_cfg()  # which timm takes too, beside the dict it declares
    return resolve_pretrained_cfg(name, whole, overlay), found


def _entry_of(arch: str, cfg: PretrainedCfg) -> Entry | None:
    """The catalog's entry that a config is of, if timm would load its weights for that config."""
    entry = _catalogd.get(arch, {}).get(cfg.tag or '')
    place = (cfg.file, '') if cfg.file else (cfg.hf_hub_id, cfg.hf_hub_filename)
    return entry if entry is not None and place == entry.source and not cfg.state_dict else None


def _require_catalogs(name: str) -> None:
    """Refuse to guess which weights a name means while a catalog that may say so can't be read."""
    if _problems:
        raise NoPretrainedWeights(f'{name}: {catalog.ENVIRONMENT}: {_problems[0]}')


def _in_namespace(name: str, tag: str, cache_dir: Any) -> Entry | None:
    """The weights of that name that the user's own namespace on the Hub holds, or None."""
    namespace = os.environ.get(NAMESPACE, '').strip()
    if not namespace:
        return None
    from . import download as hub
    from . import failures

    if not catalog.is_word(namespace):
        raise NoPretrainedWeights(f'{NAMESPACE}={namespace!r}: must be the name of a user or an organization')
    tag, _, revision = tag.partition('@')
    full = f'{name}.{tag}' if tag else name
    if not catalog.NAME.fullmatch(full):
        raise NoPretrainedWeights(f'{full!r} is no name of a model')
    try:
        return hub.find(f'{namespace}/{full}', full, revision, cache_dir)
    except failures.NotPublished as error:
        near = _near_in_namespace(namespace, name)
        raise _not_published(name, tag, f'; {error}' + (f'; there is {near}' if near else '')) from None


def _near_in_namespace(namespace: str, name: str) -> str:
    """What the namespace holds for an architecture, if the Hub says so."""
    from . import download as hub
    from . import failures

    try:
        found = [repo.partition('/')[2] for repo in hub.published(namespace, name)]
    except failures.HubError:
        return ''
    return ', '.join([repo for repo in found if repo.partition('.')[0] == name][:10])


def _with_weights(arch: str, entry: Entry, cfg: PretrainedCfg, kwargs: dict[str, Any]) -> nn.Module:
    """Build and load, once the weights lie here and are those that were published."""
    from safetensors import SafetensorError

    from . import download as hub
    from . import failures

    hub.fetch(entry, kwargs.get('cache_dir'))
    try:
        return model_entrypoint(arch)(pretrained=True, pretrained_cfg=cfg, **kwargs)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise failures.HubError(f'{entry.name}: {entry.source[0]} does not fit {arch}: {one_line(error)}') from error


def _not_published(name: str, tag: str, more: str = '') -> NoPretrainedWeights:
    """What there is, and how to have what there is not."""
    arch = name.removesuffix(SUFFIX)
    asked = f'{name}.{tag}' if tag else name
    names = [entry.name for entry in _catalogd.get(arch, {}).values()]
    there = f'there is {", ".join(names)}' if names else f'there is nothing for {arch} yet'
    text = (
        f'no CTC weights are catalogd for {asked!r}: {there}{more}; train it with `train.py --model {arch} '
        f'--mode ctc` and publish it with `ctc-timm publish RUN --repo-id USER/{asked}`'
    )
    return NoPretrainedWeights(text if tag else f'{text}, or create it with pretrained=False')


def _default_tag(arch: str) -> str | None:
    """The tag of the weights timm takes for `arch` by default."""
    cfg = get_pretrained_cfg(arch)
    return cfg.tag if cfg else None
