"""Failures of the Hub, the network and the disk, each told in one line that ends with what to do."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from ..utils.errors import UserError, one_line


class HubError(UserError, RuntimeError):
    """The Hub did not give or take what was asked. A RuntimeError too, as timm's own failures are."""


class NotPublished(HubError):
    """There is no such repo, or none that may be seen."""


class Unfit(HubError):
    """There is a repo, but not with weights that can be used."""


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Tell failures of the Hub, the network and the disk in one line.

    Args:
        what: Whose failure it is: a repo's id, a file, a step.

    Raises:
        HubError: What failed, and what to do; anything else passes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = explain(error, what.partition('@')[0])
        if text is None:
            raise
        kinds = [type(cause) for cause in _chain(error)]
        raised = {RepositoryNotFoundError: NotPublished, RemoteEntryNotFoundError: Unfit}
        raise next((raised[kind] for kind in kinds if kind in raised), HubError)(f'{what}: {text}') from None


def explain(error: BaseException, repo_id: str = 'REPO') -> str | None:
    """What failed and what to do, or None for an error that is not the Hub's, the network's or the disk's."""
    chain = list(_chain(error))
    for tell in (_told_by_the_hub, _told_by_the_network, _told_by_the_disk):
        for cause in chain:
            text = tell(cause)
            if text:
                return text.format(repo=repo_id)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _told_by_the_hub(error: BaseException) -> str:
    """What to do about an answer of the Hub, or nothing if this is none."""
    if isinstance(error, GatedRepoError):
        return f'gated: accept its conditions at {constants.ENDPOINT}/{{repo}}, and log in with `hf auth login`'
    if isinstance(error, RevisionNotFoundError):
        return 'no such branch, tag or commit there; look at its history on the Hub'
    if isinstance(error, RepositoryNotFoundError):
        return (
            'not on the Hub, or private: check the name, or log in with `hf auth login` (or HF_TOKEN) '
            'as someone who may see it'
        )
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE keeps the Hub away, and the cache does not hold it; unset that, or fill the cache'
    if isinstance(error, RemoteEntryNotFoundError):
        return f'has no {_plain(str(error.response.url).rpartition("/")[2])}; publish it again with `ctc-timm publish`'
    if isinstance(error, HfHubHTTPError):
        return _told_by_status(error.response.status_code, error.server_message or 'no reason given')
    by_xet = re.search(r'HTTP status \w+ error \((\d{3})', str(error))  # of the client's own transport, in words
    return _told_by_status(int(by_xet[1]), one_line(error)) if by_xet else ''


def _told_by_status(code: int, reason: str) -> str:
    """What to do about a status of HTTP."""
    if code == 401:
        return 'the Hub asks who you are: log in with `hf auth login`, or set a valid HF_TOKEN'
    if code == 403:
        return 'forbidden: use a token that may do this (https://huggingface.co/settings/tokens), or ask its owner'
    if code == 429:
        return 'too many requests; wait a few minutes, log in if you are not, then retry'
    if code >= 500:
        return f'the Hub is in trouble (HTTP {code}); retry later'
    return f'the Hub refused (HTTP {code}): {_plain(reason)}'


def _told_by_the_network(error: BaseException) -> str:
    """What to do about a connection, or nothing; the client's library has one of several names."""
    module, kind = type(error).__module__, type(error).__name__
    if not module.startswith(('httpx', 'httpcore')):
        return ''
    if 'Timeout' in kind:
        return 'the connection stalled; retry, or allow it more seconds with HF_HUB_DOWNLOAD_TIMEOUT'
    if kind in ('RemoteProtocolError', 'LocalProtocolError', 'ReadError', 'WriteError', 'CloseError'):
        return 'the connection broke before all was transferred; retry'
    return f'{constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT, then retry'


def _told_by_the_disk(error: BaseException) -> str:
    """What to do about a file here, or a name."""
    if isinstance(error, LocalEntryNotFoundError):
        return 'not in the cache, and the Hub gave no sound answer; check HF_ENDPOINT, then retry'
    if isinstance(error, HFValidationError):
        return f'not a name the Hub takes: {_plain(one_line(error))}'
    if isinstance(error, SafetensorError):
        return f'not sound weights: {_plain(one_line(error))}'
    if not isinstance(error, (OSError, RuntimeError)):  # Xet's own failures are either
        return ''
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 'the disk is full; make room, or use another one by HF_HOME and TMPDIR'
    if 'Consistency check failed' in str(error):
        return 'the download came short; retry'
    if type(error) is ConnectionError:
        return f'the connection failed; check the network, then retry: {_plain(one_line(error))}'
    return _plain(one_line(error))


def _plain(text: str) -> str:
    """A text from elsewhere on one line, for `str.format`."""
    return ' '.join(text.split())[:200].replace('{', '{{').replace('}', '}}')
