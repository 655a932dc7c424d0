"""Weights files: safetensors whose bytes are a function of what they hold, with hashes of tensors and metadata.

safetensors writes metadata in an order that differs from process to process, so the header is sorted afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .errors import UserError, one_line

HASH, METADATA_HASH = 'tensors_sha256', 'metadata_sha256'  # names in the metadata
_LENGTH = 8  # bytes at the beginning, which hold the header's length


def save_weights(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata, as texts, with the hashes of both; equal contents give equal bytes."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    facts = {
        'format': 'pt',
        **{k: str(v) for k, v in metadata.items() if k != METADATA_HASH},
        HASH: tensors_hash(plain),
    }
    save_file(plain, file, metadata={**facts, METADATA_HASH: _metadata_hash(facts)})
    with file.open('r+b') as stream:
        length = int.from_bytes(stream.read(_LENGTH), 'little')
        header = json.loads(stream.read(length))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        stream.seek(_LENGTH)
        stream.write(json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode().ljust(length))


def read_weights(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata, both from the same bytes; raise a UserError where they differ from their hashes."""
    with _translate_errors(file):
        content = Path(file).read_bytes()
        tensors = load(content)
        metadata = _parse_metadata(content[_LENGTH : _LENGTH + int.from_bytes(content[:_LENGTH], 'little')])
    if metadata.get(HASH, digest := tensors_hash(tensors)) != digest:
        raise _changed(file)
    return tensors, _checked(metadata, file)


def weights_metadata(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata alone; raise a UserError where it differs from its hash, or this is no safetensors file."""
    with _translate_errors(file), open(file, 'rb') as stream:
        length = int.from_bytes(stream.read(_LENGTH), 'little')
        metadata = _parse_metadata(stream.read(min(length, os.path.getsize(file))))
    return _checked(metadata, file)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata_hash(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()


def _parse_metadata(header: bytes) -> dict[str, str]:
    return dict(json.loads(header).get('__metadata__') or {})


def _checked(metadata: dict[str, str], file: str | os.PathLike[str]) -> dict[str, str]:
    stated = {name: value for name, value in metadata.items() if name != METADATA_HASH}
    if METADATA_HASH in metadata and metadata[METADATA_HASH] != _metadata_hash(stated):
        raise _changed(file)
    return metadata


def _changed(file: str | os.PathLike[str]) -> UserError:
    return UserError(f'{os.fspath(file)}: was changed after it was written (its hash differs); take another one')


@contextmanager
def _translate_errors(file: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f'{os.fspath(file)}: not a sound safetensors file: {one_line(error)}') from None
