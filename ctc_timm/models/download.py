"""Weights from the Hub: found, downloaded by timm's own client, and checked before anything reads them.

Tokens, endpoints, caches, offline mode and timeouts are those of huggingface_hub, by its own environment variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that huggingface_hub uses: httpx, or httpx2 in later versions
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.sha import git_hash
from timm.models._hub import download_from_hf, hf_split

from ..utils.errors import UserError, one_line
from .catalog import Entry
from .pretrained_cfg import base_of, read_config

CacheDir = str | Path | None
_HINTS = {
    401: 'log in with `hf auth login`, or set a valid HF_TOKEN',
    403: 'use a token that may do this',
    404: 'check the name, or log in with `hf auth login` as someone who may see it',
}


class HubError(UserError, RuntimeError):
    """The Hub did not give or take what was asked. A RuntimeError too, as timm's own failures are."""


class NotPublished(HubError):
    """There is no such repo or file, or none that may be seen."""


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise failures of the Hub, the network and the disk as a HubError of one line, with a hint.

    It begins with `what` failed, a repo's id or a file, and is a NotPublished for what is not there or may not be seen.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # the client's own, and Xet's
        cause: BaseException = error
        while isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__  # why the Hub was not asked for what the cache does not hold
        missing = isinstance(cause, (RepositoryNotFoundError, RemoteEntryNotFoundError))
        kind = NotPublished if missing and not isinstance(cause, GatedRepoError) else HubError
        raise kind(f'{what}: {_describe(cause)}') from None


def _describe(error: BaseException) -> str:
    """An error's own words, and what to do about it."""
    if not isinstance(error, HfHubHTTPError):
        unreachable = isinstance(error, HTTPError) or type(error) is ConnectionError
        return one_line(error) + ('; check the network and HF_ENDPOINT, then retry' if unreachable else '')
    status = error.response.status_code
    words = ' '.join((error.server_message or error.response.reason_phrase).split())[:200]
    hint = _HINTS.get(status, 'retry later' if status == 429 or status >= 500 else '')
    return f'{words} (HTTP {status})' + (f'; {hint}' if hint else '')


def fetch(entry: Entry, cache_dir: CacheDir = None) -> bytes:
    """Read an entry's weights file, and check that these bytes are the ones that were meant.

    A cached file that is not what it should be is taken out of the cache, so that no later load finds it.

    Raises:
        HubError: It can't be had, or is another file.
    """
    if entry.hub_id:
        return _download(f'{entry.hub_id}@{entry.revision}', entry.filename, cache_dir, entry.sha256)[1]
    file = Path(entry.path)
    if not file.is_file():
        raise HubError(f'{entry.name}: {file} is not there; restore it, or catalog other weights')
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise HubError(
            f'{entry.name}: {file} is not the file that was cataloged (its sha256 differs); '
            'restore it, or catalog it anew with `ctc-timm zoo add --replace`'
        )
    return content


def find(repo_id: str, name: str = '', revision: str = '', cache_dir: CacheDir = None) -> Entry:
    """Make an entry of a repo's weights, called `name` or else by the architecture, pinned to the commit of now.

    Raises:
        UserError: NotPublished for no such repo; or it can't be read, or holds no weights of that architecture.
    """
    wanted = f'{repo_id}@{revision}' if revision else repo_id
    file, _ = _download(wanted, 'config.json', cache_dir)
    commit = file.parent.name  # as the client's cache is laid out
    if not re.fullmatch(r'[0-9a-f]{40}', commit):
        raise HubError(f'{wanted}: the cache does not say which commit it holds; clear it and retry')
    base, config, model_args = read_config(file.parent, wanted)
    if name and base != base_of(name):
        raise UserError(f'{wanted}: holds weights of {base!r}, not of {base_of(name)}')
    return Entry(name or base, config, model_args=model_args, hub_id=repo_id, revision=commit)


def _download(where: str, filename: str, cache_dir: CacheDir, wanted: str = '') -> tuple[Path, bytes]:
    """Download a file of USER/NAME[@REVISION]; check its sha256, or at least the hash that the Hub announced."""
    with translate_errors(where):
        file = Path(download_from_hf(where, filename, cache_dir=cache_dir))
        # A snapshot's file points at one that is called by the hash that the Hub announced: a sha256, or git's for
        # small files. What that one may point at in turn is called by Xet's own hash.
        announced = Path(os.readlink(file)).name if file.is_symlink() else ''
        if not wanted and not announced and not constants.HF_HUB_OFFLINE:  # a cache without links does not keep it
            repo_id, revision = hf_split(where)
            announced = get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision)).etag or ''
        wanted = wanted or (announced if re.fullmatch(r'[0-9a-f]{40}|[0-9a-f]{64}', announced) else '')
        content = file.read_bytes()
        found = git_hash(content) if len(wanted) == 40 else hashlib.sha256(content).hexdigest()
        if wanted and found != wanted:
            while file.is_symlink():
                target = file.parent / os.readlink(file)
                file.unlink()
                file = target
            file.unlink(missing_ok=True)
            raise HubError(
                f'{where}: {filename} is not the file that was published (its hash differs) and was removed from the '
                'cache; retry, and if it stays so, do not trust that repo'
            )
    return file, content
