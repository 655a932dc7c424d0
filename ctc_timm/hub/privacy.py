"""What must not be published: paths, names and secrets of the machine that a run was made on.

Texts of a run are checked one by one, and those that tell something are left out; what is then written is
searched once more as a whole.
"""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.text import secret_values, without_tokens

# A slash that begins a path, which is not one inside a word, a URL or a closing tag; a home, a drive, a server.
_PATH = re.compile(
    r'(?<![\w.:/~<])(?<!&lt;)/[\w.@+-]|(?<![\w.])\.\.?/|(?<![\w/])~[\w.-]*/|\b[A-Za-z]:[\\/](?!/)|\\\\[\w.-]+\\|\bfile:'
)


class Private:
    """Knows what this machine would give away.

    Args:
        *more: Further texts that must not appear, such as a token that was given.
    """

    def __init__(self, *more: str | None) -> None:
        from huggingface_hub import get_token

        self.secrets = {text for text in (*more, get_token(), *secret_values()) if text}
        names = {Path.home().name, socket.gethostname(), socket.gethostname().partition('.')[0]}
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            names.add(getpass.getuser())
        self.names = {name for name in names if len(name) > 1 and name != 'localhost'}

    def found_in(self, text: str) -> str:
        """What a text of a run would give away, or nothing."""
        words = set(re.split(r'[^\w.-]+', text)) | set(re.split(r'\W+', text))
        return self.found_in_all(text) or ('a user or host name' if words & self.names else '')

    def found_in_all(self, text: str) -> str:
        """As `found_in`, without names: one may also be an ordinary word of the card."""
        if any(secret in text for secret in self.secrets) or without_tokens(text) != text:
            return 'a token'
        return 'a path' if _PATH.search(text) else ''

    def clean(self, value: Any) -> Any:
        """A value without the texts that would give something away; None where nothing is left.

        Args:
            value: As YAML or JSON hold it.
        """
        if isinstance(value, dict):
            items = {k: self.clean(v) for k, v in value.items() if not self.found_in(str(k))}
            return {k: v for k, v in items.items() if v is not None}
        if isinstance(value, (list, tuple)):
            parts = [self.clean(v) for v in value]
            return None if None in parts else parts
        if isinstance(value, str):
            return None if self.found_in(value) else value
        return value if isinstance(value, (bool, int, float)) else None

    def refuse(self, folder: Path) -> None:
        """Search everything that is about to be published.

        Raises:
            UserError: A file would give something away.
        """
        for file in sorted(path for path in folder.rglob('*') if path.is_file()):
            content = file.read_bytes()
            if any(secret.encode() in content for secret in self.secrets):
                raise UserError(f'{file.name} would publish a token; nothing was uploaded')
            if file.suffix in ('.md', '.json', '.yaml'):
                found = self.found_in_all(content.decode('utf-8'))
                if found:
                    raise UserError(f'{file.name} would publish {found}; nothing was uploaded')
