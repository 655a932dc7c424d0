"""Which CTC weights exist: where each set lies, its hash, its input, its numbers and its recipe.

A catalog is a JSON file, the one shipped with this package and those named by `CTC_TIMM_ZOO`:

    {"version": 1,
     "models": {"resnet50_ctc.mine": {
         "hub_id": "USER/resnet50_ctc.mine", "revision": "<commit>", "filename": "model.safetensors",
         "sha256": "...",
         "pretrained_cfg": {"num_classes": 10, "input_size": [3, 224, 224], "mean": [...], "std": [...], ...},
         "model_args": {}, "license": "apache-2.0", "results": [...], "recipe": {...}}}}

Weights on this machine have a `path` in place of hub_id, revision and filename; a relative one starts at the
catalog's folder and stays in it. Catalogs come from elsewhere, so everything in them is checked before it is
believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..utils.errors import UserError
from .pretrained_cfg import check_facts, check_model_args, is_number

ENVIRONMENT = 'CTC_TIMM_ZOO'
SHIPPED = Path(__file__).with_name('zoo.json')
BASELINES = Path(__file__).with_name('baselines.json')  # plain training, to compare with; names without the suffix
VERSION = 1
SUFFIX = '_ctc'
WEIGHTS = 'model.safetensors'

_BASELINE = re.compile(r'[a-z0-9][a-z0-9_]*\.[A-Za-z0-9_][A-Za-z0-9_.-]*')
NAME = re.compile(r'[a-z0-9][a-z0-9_]*_ctc(\.[A-Za-z0-9_][A-Za-z0-9_.-]*)?')
WORD = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]*')  # of a repo, a tag, a namespace
_HASH = re.compile(r'[0-9a-f]{64}')
_COMMIT = re.compile(r'[0-9a-f]{40}')


class NoCatalog(UserError):
    """There is no file of that name."""


@dataclass(frozen=True)
class Entry:
    """One set of weights.

    Attributes:
        name: '<arch>_ctc' or '<arch>_ctc.<tag>'.
        config: Facts about input and shape, by the names of timm's PretrainedCfg.
        sha256: Of the weights file; empty where nobody vouches for one.
        hub_id: Repo on the Hub, or empty.
        revision: Commit in it.
        filename: Weights in it, always safetensors.
        path: Weights on this machine, or empty.
        model_args: What the architecture is built with besides.
        license: By its identifier on the Hub.
        results: Measured numbers, one dict a number.
        recipe: The flags that matter, by name.
    """

    name: str
    config: dict[str, Any]
    sha256: str = ''
    hub_id: str = ''
    revision: str = ''
    filename: str = WEIGHTS
    path: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    license: str = ''
    results: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The base architecture."""
        return self.name.partition('.')[0].removesuffix(SUFFIX)

    @property
    def tag(self) -> str:
        """The part after the dot, or empty."""
        return self.name.partition('.')[2]

    @property
    def source(self) -> tuple[str, str]:
        """What tells these weights from others: where they are, in the words of timm's config."""
        return (f'{self.hub_id}@{self.revision}', self.filename) if self.hub_id else (self.path, '')

    def pretrained_cfg(self) -> PretrainedCfg:
        """timm's config, pointing at the pinned weights."""
        where, filename = self.source
        place = {'hub_id': where, 'filename': filename} if self.hub_id else {}
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.config.items()}
        return PretrainedCfg(
            hf_hub_id=place.get('hub_id'),
            hf_hub_filename=place.get('filename'),
            file=self.path or None,
            architecture=self.name.partition('.')[0],
            tag=self.tag or None,
            license=self.license or None,
            **facts,
        )

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """What a catalog holds; a path inside the catalog's `folder` is written relative to it."""
        where: dict[str, Any] = {'hub_id': self.hub_id, 'revision': self.revision, 'filename': self.filename}
        if self.path:
            path = Path(self.path)
            inside = folder is not None and path.is_relative_to(folder)
            where = {'path': str(path.relative_to(folder) if inside and folder else path)}
        return {
            **where,
            'sha256': self.sha256,
            'pretrained_cfg': self.config,
            'model_args': self.model_args,
            'license': self.license,
            'results': self.results,
            'recipe': self.recipe,
        }


def named_files() -> list[Path]:
    """The catalogs that `CTC_TIMM_ZOO` names, separated like the entries of PATH."""
    return [Path(word).expanduser() for word in os.environ.get(ENVIRONMENT, '').split(os.pathsep) if word.strip()]


def load_all() -> tuple[dict[str, Entry], list[UserError]]:
    """Every entry that can be had, and what stands in the way of the rest.

    A name may stand in two files if both mean the same weights, say on the Hub and in a folder; the later one
    is used.

    Returns:
        Entries by name, shipped ones first, and what is wrong with each file that can't be used.
    """
    entries: dict[str, Entry] = {}
    problems: list[UserError] = []
    for file in [SHIPPED, *named_files()]:
        try:
            found = load(file)
            for name, entry in found.items():
                if name in entries and entries[name].sha256 != entry.sha256:
                    raise UserError(f'{file}: {name} is other weights than in the catalogs before it; rename it')
        except UserError as error:
            problems.append(error)
        else:
            entries.update(found)
    return entries, problems


def load(file: Path) -> dict[str, Entry]:
    """The entries of one catalog, by name. Those of `BASELINES` are called ARCH.TAG, those of all others ARCH_ctc.

    Raises:
        NoCatalog: No such file.
        UserError: Not a catalog, or an entry that is not sound.
    """
    try:
        text = file.read_text(encoding='utf-8')
    except FileNotFoundError:
        raise NoCatalog(f'{file}: no such catalog; make one with `ctc-timm zoo add`') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: cannot be read: {error}') from None
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file}: not a catalog: {error}') from None
    if not isinstance(content, dict) or content.get('version') != VERSION or set(content) != {'version', 'models'}:
        raise UserError(f'{file}: not a catalog of version {VERSION}')
    if not isinstance(content['models'], dict):
        raise UserError(f'{file}: "models" must be a mapping of names to entries')
    folder = file.absolute().parent
    return {name: parse(name, raw, str(file), folder) for name, raw in content['models'].items()}


def save(file: Path, entries: Iterable[Entry]) -> None:
    """Write a catalog, complete or not at all."""
    file = file.absolute()
    models = {entry.name: entry.to_json(file.parent) for entry in sorted(entries, key=lambda entry: entry.name)}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + '.tmp')
    with temporary.open('w', encoding='utf-8') as stream:
        json.dump({'version': VERSION, 'models': models}, stream, indent=2)
        stream.write('\n')
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def parse(name: str, raw: Any, where: str, folder: Path | None = None) -> Entry:
    """An entry from what a catalog says.

    Args:
        name: The model's name.
        raw: What stands there.
        where: For error messages: the file.
        folder: Where a relative path starts.

    Raises:
        UserError: Anything that is missing, unknown, or not what it should be.
    """

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f'{where}: {name!r}: {key} must be {wanted}')

    if not (_BASELINE if where == str(BASELINES) else NAME).fullmatch(name):
        raise UserError(f'{where}: {name!r} is no name of a model: it must be ARCH_ctc or ARCH_ctc.TAG')
    if not isinstance(raw, dict):
        raise refuse('the entry', 'a mapping')
    at_hub = 'hub_id' in raw
    places = {'hub_id', 'revision', 'filename'} if at_hub else {'path'}
    needed = {*places, 'sha256', 'pretrained_cfg'}
    known = {*needed, 'model_args', 'license', 'results', 'recipe'}
    if set(raw) - known or needed - set(raw):
        raise refuse('its keys', f'of {", ".join(sorted(known))}; missing or unknown: {_differing(raw, needed, known)}')
    if not isinstance(raw['sha256'], str) or not _HASH.fullmatch(raw['sha256']):
        raise refuse('sha256', '64 hexadecimal digits')
    path = ''
    if at_hub:
        if not is_repo_id(raw['hub_id']):
            raise refuse('hub_id', 'USER/NAME')
        if not isinstance(raw['revision'], str) or not _COMMIT.fullmatch(raw['revision']):
            raise refuse('revision', 'a whole commit, 40 hexadecimal digits')
        if not isinstance(raw['filename'], str) or not re.fullmatch(r'[\w-][\w.-]*\.safetensors', raw['filename']):
            raise refuse('filename', 'a .safetensors file')
    else:
        if not isinstance(raw['path'], str) or not raw['path'].endswith('.safetensors') or '\0' in raw['path']:
            raise refuse('path', 'a .safetensors file')
        if '..' in re.split(r'[\\/]', raw['path']):
            raise refuse('path', "a .safetensors file in the catalog's folder, or an absolute path")
        path = str((folder or Path()) / raw['path'])
    for key, kind, wanted in (
        ('model_args', dict, 'a mapping'),
        ('recipe', dict, 'a mapping'),
        ('license', str, 'text'),
        ('results', list, 'a list'),
    ):
        if not isinstance(raw.get(key, kind()), kind):
            raise refuse(key, wanted)
    for row in raw.get('results', []):
        if not is_result(row):
            raise refuse('results', f'mappings of dataset, metric and value, not {row!r}')
    return Entry(
        name=name,
        config=check_facts(raw['pretrained_cfg'], f'{where}: {name!r}'),
        sha256=raw['sha256'],
        hub_id=raw['hub_id'] if at_hub else '',
        revision=raw['revision'] if at_hub else '',
        filename=raw['filename'] if at_hub else WEIGHTS,
        path=path,
        model_args=check_model_args(raw.get('model_args', {}), f'{where}: {name!r}'),
        license=raw.get('license', ''),
        results=raw.get('results', []),
        recipe=raw.get('recipe', {}),
    )


def is_repo_id(text: Any) -> bool:
    """Whether a text can only be USER/NAME: no path, no revision, nothing that means more."""
    parts = text.split('/') if isinstance(text, str) else []
    return len(parts) == 2 and all(is_word(part) for part in parts) and len(text) <= 96


def is_word(text: str) -> bool:
    """Whether a text can be one half of a repo's id."""
    return bool(WORD.fullmatch(text)) and not any(bad in text for bad in ('..', '--')) and text[-1] not in '.-'


def base_of(architecture: Any) -> str:
    """The base architecture of a config, which may name it with the suffix, and with a tag, as timm lets it."""
    return str(architecture).partition('.')[0].removesuffix(SUFFIX)


def is_result(row: Any) -> bool:
    """Whether this is a measured number: dataset and metric, short texts for a terminal, and value."""
    return (
        isinstance(row, dict)
        and set(row) == {'dataset', 'metric', 'value'}
        and all(isinstance(row[key], str) and row[key].isprintable() for key in ('dataset', 'metric'))
        and is_number(row['value'])
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError('a name stands twice in one mapping')
    return found


def _differing(raw: dict[str, Any], needed: set[str], known: set[str]) -> str:
    return ', '.join(sorted(map(repr, (needed - set(raw)) | (set(raw) - known))))
