"""timm's own args.yaml as a recipe: what it states that is off, or has no counterpart and no effect, is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import UserError
from .settings import shorten

# Flags of timm's training script alone, of which every args.yaml of it holds all.
_MARKS = {'aug_splits', 'jsd_loss', 'recovery_interval', 'local_rank', 'no_resume_opt', 'worker_seeding'}
# How timm runs, not what it trains: the device and its processes are Accelerate's, states are saved anyway.
_NO_EFFECT = {
    *('amp_impl', 'device', 'dist_backend', 'fuser', 'local_rank', 'no_ddp_bb', 'no_prefetcher'),
    *('recovery_interval', 'save_images', 'synchronize_step', 'use_multi_epochs_loader', 'worker_seeding'),
}

_RENAMED = {'data': 'data_dir', 'val_interval': 'eval_interval'}
_SWITCHES = {'naflex_': 'naflex_loader', 'kd_': 'kd_model_name', 'wandb_': 'log_wandb'}  # what a prefix is of
_INSTEAD = {
    'drop_connect': '`drop_path`',
    'epoch_repeats': '`epochs`',
    'log_wandb': "`log_with='wandb'`",
    'no_resume_opt': '`initial_checkpoint`',
    'start_epoch': '`initial_checkpoint`',
    'torchscript': '`torchcompile`',
}


def from_timm(values: Mapping[str, Any], known: Mapping[str, Any], where: str = '') -> dict[str, Any]:
    """Translate what timm's training script writes as args.yaml; any other recipe is returned as it is.

    `known` are the names of settings. Others are left out if they are off or have no effect here. timm writes None and
    empty texts for what was not given.

    Raises:
        UserError: Others that are on, all in one line that begins with `where`.
    """
    if len(_MARKS & values.keys()) < len(_MARKS) - 1:
        return dict(values)
    given = {key: value for key, value in values.items() if value is not None and value != ''}
    for old, new in _RENAMED.items():
        if old in given and new in known:
            given.setdefault(new, given.pop(old))
            given.pop(old, None)
    off = tuple(prefix for prefix, switch in _SWITCHES.items() if not given.get(switch))
    asked = [key for key, value in given.items() if key not in known and value and key not in _NO_EFFECT]
    if unknown := [key for key in asked if not key.startswith(off)]:
        names = [f'{shorten(key)} (use {_INSTEAD[key]})' if key in _INSTEAD else shorten(key) for key in unknown[:40]]
        raise UserError(
            f"{where}: {len(unknown)} of timm's settings do not exist here: {', '.join(names)}; leave them out"
        )
    return {key: value for key, value in given.items() if key in known}
