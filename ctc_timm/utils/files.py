"""Durable files and folders: complete or not there at all, and verified before they are used.

A folder is written under another name, a manifest with the size and SHA-256 of every file is put into it, all of it
is flushed to the disk, and then it is renamed: a power cut leaves the old folder or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj

MANIFEST = 'manifest.json'


def sha256(file: Path) -> str:
    """Hash a file's bytes."""
    with file.open('rb') as stream:
        return sha_fileobj(stream).hex()


def write_text(file: Path, text: str) -> None:
    """Replace a text file as a whole."""
    temporary = file.with_name(file.name + '.tmp')
    temporary.write_text(text, encoding='utf-8', newline='')
    atomic_rename(temporary, file)


def atomic_rename(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder, once it is on the disk; a folder replaces one of that name."""
    if temporary.is_dir():
        for path in sorted(temporary.rglob('*')):
            _flush(path)
    _flush(temporary)
    if final.is_dir():  # a folder can't be renamed over another one that has files
        shutil.rmtree(final)
    os.replace(temporary, final)
    _flush(final.parent)


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of a folder into its manifest."""
    files = {
        path.relative_to(folder).as_posix(): {'size': path.stat().st_size, 'sha256': sha256(path)}
        for path in sorted(folder.rglob('*'))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({'files': files}, indent=1), encoding='utf-8')


def verify(folder: Path) -> str | None:
    """Compare a folder with its manifest: what is wrong with the first file that is missing or differs, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))['files']
        listed = {str(name): (int(facts['size']), str(facts['sha256'])) for name, facts in files.items()}
    except FileNotFoundError:
        return f'it has no {MANIFEST}'
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f'its {MANIFEST} is unreadable'
    try:
        for name, (size, digest) in listed.items():
            path = folder / name
            if not path.is_file():
                return f'{name} is missing'
            if path.stat().st_size != size:
                return f'{name} has {path.stat().st_size} bytes, not {size}'
            if sha256(path) != digest:
                return f'{name} was changed after it was written'
        extra = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()} - {MANIFEST, *listed}
    except (OSError, ValueError) as error:
        return ' '.join(str(error).split())
    return f'{min(extra)} does not belong to it' if extra else None


def _flush(path: Path) -> None:
    """Have the system write what it still holds of a file, or of a folder's list of names."""
    if os.name == 'nt' and path.is_dir():  # folders can't be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
