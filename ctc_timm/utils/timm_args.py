"""timm's own args.yaml as a recipe: what it states that is off, or has no counterpart and no effect, is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Flags of timm's training script alone, of which every args.yaml of it holds all.
_MARKS = {'aug_splits', 'jsd_loss', 'recovery_interval', 'local_rank', 'no_resume_opt', 'worker_seeding'}
# How timm runs, not what it trains: the device and its processes are Accelerate's, states are saved anyway.
_NO_EFFECT = {
    *('amp_impl', 'device', 'dist_backend', 'fuser', 'local_rank', 'no_ddp_bb', 'no_prefetcher'),
    *('recovery_interval', 'save_images', 'synchronize_step', 'use_multi_epochs_loader', 'worker_seeding'),
}


def from_timm(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what timm's training script writes as args.yaml; any other recipe is returned as it is.

    `known` are the names of settings. Others stay, to be refused, unless they are off or have no effect here. timm
    writes None and empty texts for what was not given.
    """
    if len(_MARKS & values.keys()) < len(_MARKS) - 1:
        return dict(values)
    given = {key: value for key, value in values.items() if value is not None and value != ''}
    if 'data' in given:
        given.setdefault('data_dir', given.pop('data'))
        given.pop('data', None)
    return {key: value for key, value in given.items() if key in known or (value and key not in _NO_EFFECT)}
