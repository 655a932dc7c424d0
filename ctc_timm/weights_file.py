"""Weights files that tell when they were changed: the hash of their tensors stands in their own metadata.

A safetensors file whose header is sound loads whatever its numbers are, so that a disk's error would pass for
weights. Files without a hash, of other makers, are taken as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError, one_line

HASH = 'tensors_sha256'


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hash(file: str | os.PathLike) -> None:
    """See that a safetensors file holds what was written into it, if it says what that was.

    Raises:
        UserError: It holds something else, or is no safetensors file.
    """
    try:
        with safe_open(file, framework='pt') as stored:
            wanted = (stored.metadata() or {}).get(HASH)
            if wanted is None:
                return
            found = tensors_hash({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f'{os.fspath(file)}: not a sound safetensors file: {one_line(error)}') from None
    if found != wanted:
        raise UserError(f'{os.fspath(file)}: was changed after it was written (its hash differs); take another one')
