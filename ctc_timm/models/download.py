"""Weights from the Hub: found, downloaded by timm's own client, and checked before anything reads them.

Tokens, endpoints, caches, offline mode and timeouts are those of huggingface_hub, by its own environment
variables.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from timm.models._hub import download_from_hf, load_model_config_from_hf

from ..utils.errors import one_line
from .catalog import SUFFIX, Entry, base_of, is_repo_id
from .failures import HubError, Unfit, translate_errors
from .pretrained_cfg import check_model_args, known_facts

CacheDir = str | Path | None
_COMMIT = re.compile(r'[0-9a-f]{40}')  # or git's hash of a file
_SHA256 = re.compile(r'[0-9a-f]{64}')


def fetch(entry: Entry, cache_dir: CacheDir = None) -> Path:
    """Have an entry's weights on this machine, whole, and those that were meant.

    A cached file that is not what it should be is taken out of the cache, so that no later load finds it.

    Args:
        entry: Of a catalog, or found on the Hub.
        cache_dir: As timm's: where downloads are kept; huggingface_hub's own cache when None.

    Returns:
        The weights file.

    Raises:
        HubError: They can't be had, or are not what they should be.
    """
    if not entry.hub_id:
        file = Path(entry.path)
        if not file.is_file():
            raise HubError(f'{entry.name}: {file} is not there; restore it, or catalog other weights')
        with translate_errors(str(file)):
            if sha256(file) != entry.sha256:
                raise HubError(
                    f'{entry.name}: {file} is not the file that was catalogd (its sha256 differs); '
                    'restore it, or catalog it anew with `ctc-timm zoo add --replace`'
                )
        return file
    return _download(*entry.source, cache_dir, entry.sha256)


def find(repo_id: str, name: str, revision: str = '', cache_dir: CacheDir = None) -> Entry:
    """A repo's weights as an entry, pinned to the commit that answers now.

    Args:
        repo_id: USER/NAME.
        name: '<arch>_ctc[.tag]', what the weights are to be called.
        revision: Branch, tag or commit; the main branch when empty.
        cache_dir: As timm's.

    Raises:
        NotPublished: No such repo.
        Unfit: It holds no weights of that architecture.
        HubError: It can't be read.
    """
    if not is_repo_id(repo_id):
        raise HubError(f'{repo_id!r} is no repo of the Hub; it must be USER/NAME')
    wanted = f'{repo_id}@{revision}' if revision else repo_id
    commit = _download(wanted, 'config.json', cache_dir).parent.name  # as the client's cache is laid out
    if not _COMMIT.fullmatch(commit):
        raise HubError(f'{wanted}: the cache does not say which commit it holds; clear it and retry')
    config, architecture, model_args = read_config(f'{repo_id}@{commit}', cache_dir)
    base = name.partition('.')[0].removesuffix(SUFFIX)
    if base_of(architecture) != base:
        raise Unfit(f'{wanted}: holds weights of {architecture!r}, not of {base}')
    return entry_of(name, config, model_args, f'{wanted}: config.json', hub_id=repo_id, revision=commit)


def read_config(pinned: str, cache_dir: CacheDir = None) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A repo's config.json, as timm reads it.

    Args:
        pinned: USER/NAME@COMMIT.
        cache_dir: As timm's.

    Returns:
        Its pretrained_cfg, architecture and model_args.

    Raises:
        Unfit: timm can't read it.
        HubError: It can't be had.
    """
    with translate_errors(pinned):
        try:
            return load_model_config_from_hf(pinned, cache_dir=cache_dir)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Unfit(f'{pinned}: config.json is none of timm: {one_line(error)}') from None


def entry_of(name: str, config: dict[str, Any], model_args: dict[str, Any], where: str, **place: Any) -> Entry:
    """An entry from timm's config.json, read by timm.

    Args:
        name: '<arch>_ctc[.tag]'.
        config: Its pretrained_cfg.
        model_args: Its model_args.
        where: For error messages.
        **place: More of the entry.

    Raises:
        UserError: Facts that are missing or unsound.
    """
    return Entry(name, known_facts(config, where), model_args=check_model_args(model_args, where), **place)


def sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def published(namespace: str, search: str = '') -> list[str]:
    """The repos of a user or an organization that are tagged `ctc`.

    Args:
        namespace: User or organization.
        search: Only those with this in their name.

    Raises:
        HubError: The Hub can't be asked.
    """
    from huggingface_hub import HfApi

    with translate_errors(namespace):
        found = HfApi().list_models(author=namespace, filter='ctc', search=search or None)
        return sorted(info.id for info in found if is_repo_id(info.id))


def _download(where: str, filename: str, cache_dir: CacheDir, wanted: str = '') -> Path:
    """A file of a repo, checked against what it should be, or at least against what the Hub said it was.

    Args:
        where: USER/NAME, or USER/NAME@REVISION.
        filename: In the repo.
        cache_dir: As timm's.
        wanted: Its sha256, if somebody vouches for one.

    Raises:
        HubError: It can't be had, or is another file.
    """
    with translate_errors(where):
        file = Path(download_from_hf(where, filename, cache_dir=cache_dir))
        # A snapshot's file points at one that is called by the hash that the Hub announced: a sha256, or git's for
        # small files. What that one may point at in turn is called by Xet's own hash.
        announced = Path(os.readlink(file)).name if file.is_symlink() else ''
        if not wanted and _SHA256.fullmatch(announced):
            wanted = announced
        sound = sha256(file) == wanted if wanted else not _COMMIT.fullmatch(announced) or _git_hash(file) == announced
        if not sound:
            _forget(file)
            raise HubError(
                f'{where}: {filename} is not the file that was published (its hash differs) and was removed from the '
                'cache; retry, and if it stays so, do not trust that repo'
            )
    return file


def _git_hash(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False).hexdigest()


def _forget(file: Path) -> None:
    """Take a file out of the cache: the name in the snapshot, and what it points at."""
    while file.is_symlink():
        target = file.parent / os.readlink(file)
        file.unlink()
        file = target
    file.unlink(missing_ok=True)
