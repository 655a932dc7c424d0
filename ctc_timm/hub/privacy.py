"""What must not be published: paths, names and secrets of the machine that a run was made on.

Texts of a run are checked one by one, and those that give something away are left out; what is then written is searched
once more as a whole.
"""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from ..utils.errors import UserError
from ..utils.text import secret_values, without_tokens

# A slash that begins a path, which is not one inside a word or a closing tag; a home, a drive, a server.
_PATH = re.compile(
    r'(?<![\w.~<])(?<!&lt;)/[\w.@+-]|(?<![\w.])\.\.?/|(?<!\w)~[\w.-]*/|\$\{?\w+\}?/|%\w+%[\\/]|\b[A-Za-z]:[\\/](?!/)|'
    r'\\\\[\w.-]+\\|\bfile:'
)
_KNOWN_URL = re.compile(r'https://(huggingface\.co|github\.com|arxiv\.org)(/[\w./#?=&%+-]*)?(?![\w.@:-])')
_HOST = re.compile(
    r'(?<!file)://|\b[\w.-]+@[\w.-]+:|\b[\w-]+\.(local|internal|intranet|intra|corp|lan)\b|\b\d+(\.\d+){3}\b'
)


class Private:
    """Knows the secrets and names of this machine."""

    def __init__(self) -> None:
        self.secrets = {text for text in (get_token(), *secret_values()) if text}
        names = {Path.home().name, socket.gethostname(), socket.gethostname().partition('.')[0]}
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            names.add(getpass.getuser())
        self.names = {name for name in names if len(name) > 1 and name != 'localhost'}
        self.folders = [Path()]  # where a relative path may start

    def is_file(self, name: str) -> bool:
        """Whether a name is a file or a folder of this machine."""
        return any((folder / name).exists() for folder in self.folders)

    def find(self, text: str) -> str:
        """What a text of a run would give away, or an empty text."""
        words = set(re.split(r'[^\w.-]+', text)) | set(re.split(r'\W+', text))
        return self.find_in_file(text) or ('a user or host name' if words & self.names else '')

    def find_in_file(self, text: str) -> str:
        """As `find`, without names: one may also be an ordinary word of the card."""
        if any(secret in text for secret in self.secrets) or without_tokens(text) != text:
            return 'a token'
        text = _KNOWN_URL.sub('', text)
        return 'the place of a server' if _HOST.search(text) else 'a path' if _PATH.search(text) else ''

    def clean(self, value: Any) -> Any:
        """Leave out what would give something away of a value as YAML holds it; None where nothing is left."""
        if isinstance(value, dict):
            items = {k: self.clean(v) for k, v in value.items() if not self.find(str(k))}
            return {k: v for k, v in items.items() if v is not None}
        if isinstance(value, (list, tuple)):
            parts = [self.clean(v) for v in value]
            return None if None in parts else parts
        if isinstance(value, str):
            return None if self.find(value) else value
        return value if isinstance(value, (bool, int, float)) else None

    def check_folder(self, folder: Path) -> None:
        """Search everything that is about to be published, and raise a UserError for what gives something away."""
        for file in sorted(path for path in folder.rglob('*') if path.is_file()):
            content = file.read_bytes()
            found = 'a token' if any(secret.encode() in content for secret in self.secrets) else ''
            if not found and file.suffix in ('.md', '.json', '.yaml'):
                found = self.find_in_file(content.decode('utf-8'))
            if found:
                raise UserError(f'{file.name} would publish {found}; nothing was uploaded')
