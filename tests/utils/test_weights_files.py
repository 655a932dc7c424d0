"""Weights files: equal contents give equal bytes, and what was changed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctc_timm.utils.errors import UserError
from ctc_timm.utils.weights_files import HASH, METADATA_HASH, read_weights, save_weights, weights_metadata

TENSORS = {
    'head.weight': torch.arange(12.0).reshape(3, 4).T,  # not contiguous
    'norm.count': torch.tensor(7),
    'half': torch.ones(5, dtype=torch.bfloat16),
}
METADATA = {f'eval_{i}': f'{i}.5' for i in range(12)} | {'name': 'Grüße "und" \\ mehr', 'epoch': 3}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_weights(tmp_path / 'weights.safetensors', TENSORS, METADATA)
    return tmp_path / 'weights.safetensors'


def test_equal_contents_are_equal_bytes(file: Path, tmp_path: Path) -> None:
    """safetensors orders metadata anew at each call; of 14 entries hardly ever as before."""
    for _ in range(3):
        again = tmp_path / 'again.safetensors'
        save_weights(again, dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
        assert again.read_bytes() == file.read_bytes()


def test_plain_safetensors_reads_them(file: Path) -> None:
    loaded = load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(file, framework='pt') as weights:
        metadata = weights.metadata()
    assert {k: v for k, v in metadata.items() if k not in (HASH, METADATA_HASH, 'format')} == {
        k: str(v) for k, v in METADATA.items()
    }
    tensors, read = read_weights(file)
    assert read == metadata == weights_metadata(file)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    'old, new', [(b'"4.5"', b'"9.5"'), (b'"eval_3"', b'"eval_z"'), (b'"epoch":"3"', b'"epoch":"8"')]
)
def test_changed_metadata_are_refused(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    for read in (read_weights, weights_metadata):
        with pytest.raises(UserError, match='was changed after it was written'):
            read(file)


def test_changed_tensors_are_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for place in (-1, -20):
        changed = content.copy()
        changed[place] ^= 64
        file.write_bytes(changed)
        with pytest.raises(UserError, match='was changed after it was written'):
            read_weights(file)


def test_weights_of_others_have_no_hashes(tmp_path: Path) -> None:
    save_file({'a': torch.ones(2)}, tmp_path / 'a.safetensors')
    tensors, metadata = read_weights(tmp_path / 'a.safetensors')
    assert torch.equal(tensors['a'], torch.ones(2)) and metadata == {}


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\x00' * 8,
        b'\xff' * 40,
        b'no weights at all',
        (2).to_bytes(8, 'little') + b'[]',
        b'\x02' + bytes(7) + b'{',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'a.safetensors').write_bytes(content)
    for read in (read_weights, weights_metadata):
        with pytest.raises(UserError, match='not a sound safetensors file'):
            read(tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match='not a sound safetensors file'):
        read_weights(tmp_path / 'none.safetensors')


def test_the_header_stays_as_long_as_it_says(file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    assert list(header['__metadata__']) == sorted(header['__metadata__']) and length % 8 == 0
