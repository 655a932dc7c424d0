"""Texts from outside, made harmless: as a line for people, and as the name of a file.

Names of models, data sets, classes and files come with data and weights of other people, and a value that was typed
may hold a token. Neither may rule a terminal, leave a folder, or be shown to those it is not meant for.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

_TOKEN = re.compile(
    r'\b((hf|ghp|gho|github_pat)_\w{20,}|sk-[A-Za-z0-9]{20,}|glpat-[\w-]{20,}|xox[abp]-[\w-]{10,}|AKIA[A-Z0-9]{16})'
)
# What stands before the @ of a URL; with one slash too, as paths are tidied to.
_LOGIN = re.compile(r'(\b[A-Za-z][\w+.-]*:/)(/[^\s/@]*|[^\s/@:]*:[^\s/@]*)([^\s/]*@)')
_QUERY = re.compile(r'([?&][\w.-]*(?:token|secret|passw|key|signature|credential)[\w.-]*=)[^&#\s]+', re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r'TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL', re.IGNORECASE)
_LONGEST = 120  # bytes of a file's name that is made of a text; file systems take 255


def secret_values() -> set[str]:
    """What the environment holds under a name that speaks of a secret, unless it only says where one lies."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8}
    return {value for value in values if not os.path.exists(value)}


def without_tokens(text: str) -> str:
    """A text with stars in place of tokens, of passwords in URLs, and of the environment's secrets."""
    for secret in secret_values():
        text = text.replace(secret, '***')
    text = _LOGIN.sub(lambda match: match[1] + ('/' if match[2].startswith('/') else '') + '***@', text)
    return _TOKEN.sub('***', _QUERY.sub(r'\1***', text))


def holds_token(value: Any) -> bool:
    """Whether a flag's value, or a part of it, is something that `without_tokens` would not show."""
    if isinstance(value, dict):
        return any(map(holds_token, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return any(map(holds_token, value))
    return isinstance(value, str) and without_tokens(value) != value


def sanitize(text: Any) -> str:
    """A text for a terminal: one line, without tokens, what a terminal would obey or hide written out."""
    told = without_tokens(str(text))
    return ''.join(c if c.isprintable() else ' ' if c.isspace() else c.encode('unicode_escape').decode() for c in told)


def file_name(text: str, otherwise: str = 'unnamed') -> str:
    """A text as the name of one file or folder: no separator, nothing hidden, not too long; else `otherwise`."""
    name = ''.join(c if c.isalnum() or c in '._-' else '_' for c in text).strip('.') or otherwise
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]
    return f'{name.encode()[:_LONGEST].decode(errors="ignore")}-{digest}'
