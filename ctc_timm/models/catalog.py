"""Catalogs of weights: where each set lies, its hash, its input, its numbers and its recipe.

A catalog is a JSON file, the one shipped with this package and those named by `CTC_TIMM_ZOO`:

    {"version": 1,
     "models": {"resnet50_ctc.mine": {
         "hub_id": "USER/resnet50_ctc.mine", "revision": "<commit>", "filename": "model.safetensors",
         "sha256": "...",
         "pretrained_cfg": {"num_classes": 10, "input_size": [3, 224, 224], "mean": [...], "std": [...], ...},
         "model_args": {}, "license": "apache-2.0", "results": [...], "recipe": {...}}}}

Weights on this machine have a `path` in place of hub_id, revision and filename; a relative one starts at the
catalog's folder and stays in it. Catalogs come from other people, so each value is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..utils.errors import UserError
from ..utils.files import write_text
from .pretrained_cfg import base_of, check_model_args, check_pretrained_cfg

ENVIRONMENT = 'CTC_TIMM_ZOO'
SHIPPED = Path(__file__).with_name('zoo.json')
BASELINES = Path(__file__).with_name('baselines.json')  # supervised training, to compare with; names without the suffix
VERSION = 1
WEIGHTS = 'model.safetensors'

NAME = re.compile(r'[a-z0-9][a-z0-9_]*_ctc(\.[A-Za-z0-9_][A-Za-z0-9_.-]*)?')
_BASELINE = re.compile(r'[a-z0-9][a-z0-9_]*\.[A-Za-z0-9_][A-Za-z0-9_.-]*')


class NoCatalog(UserError):
    """There is no file of that name."""


@dataclass(frozen=True)
class Entry:
    """One set of weights, on the Hub or, with a `path`, on this machine."""

    name: str  # '<arch>_ctc' or '<arch>_ctc.<tag>'
    pretrained_cfg: dict[str, Any]  # input and shape, by the names of timm's PretrainedCfg
    sha256: str = ''  # empty for a repo that no catalog lists
    hub_id: str = ''
    revision: str = ''
    filename: str = WEIGHTS
    path: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)  # what the architecture is built with besides
    license: str = ''
    results: list[dict[str, Any]] = field(default_factory=list)  # each of dataset, metric and value
    recipe: dict[str, Any] = field(default_factory=dict)  # settings that the weights were trained with

    @property
    def architecture(self) -> str:
        return base_of(self.name)

    @property
    def tag(self) -> str:
        return self.name.partition('.')[2]

    def to_timm(self) -> PretrainedCfg:
        """timm's config, pointing at the pinned weights."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.pretrained_cfg.items()}
        if self.hub_id:
            values |= {'hf_hub_id': f'{self.hub_id}@{self.revision}', 'hf_hub_filename': self.filename}
        values |= {'file': self.path or None, 'tag': self.tag or None, 'license': self.license or None}
        return PretrainedCfg(architecture=self.name.partition('.')[0], **values)

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """What a catalog holds; a path inside the catalog's `folder` is written relative to it."""
        values = dataclasses.asdict(self)
        for key in ('name', *(('hub_id', 'revision', 'filename') if self.path else ('path',))):
            del values[key]
        if self.path and folder is not None and Path(self.path).is_relative_to(folder):
            values['path'] = str(Path(self.path).relative_to(folder))
        return values


def named_files() -> list[Path]:
    """The catalogs that `CTC_TIMM_ZOO` names, separated like the entries of PATH."""
    return [Path(word).expanduser() for word in os.environ.get(ENVIRONMENT, '').split(os.pathsep) if word.strip()]


def load_all() -> tuple[dict[str, Entry], list[UserError]]:
    """Load the shipped catalog and those of `CTC_TIMM_ZOO`: entries by name, and what is wrong with unusable files.

    A name may stand in two files if both mean the same weights, say on the Hub and in a folder; the later one is used.
    """
    entries: dict[str, Entry] = {}
    problems: list[UserError] = []
    for file in [SHIPPED, *named_files()]:
        try:
            loaded = load(file)
            for name, entry in loaded.items():
                if name in entries and entries[name].sha256 != entry.sha256:
                    raise UserError(f'{file}: {name} is other weights than in the catalogs before it; rename it')
        except UserError as error:
            problems.append(error)
        else:
            entries.update(loaded)
    return entries, problems


def load(file: Path) -> dict[str, Entry]:
    """Load a catalog, or raise NoCatalog for no file and a UserError for anything in it that is not sound.

    The names in `BASELINES` are ARCH.TAG, those in all others ARCH_ctc or ARCH_ctc.TAG.
    """
    try:
        content = json.loads(file.read_text(encoding='utf-8'), object_pairs_hook=_unique)
        sound = isinstance(content, dict) and set(content) == {'version', 'models'} and content['version'] == VERSION
        if not sound or not isinstance(content['models'], dict):
            raise UserError(f'{file}: not a catalog of version {VERSION}')
        folder = file.absolute().parent
        return {name: parse(name, raw, str(file), folder) for name, raw in content['models'].items()}
    except UserError:
        raise
    except FileNotFoundError:
        raise NoCatalog(f'{file}: no such catalog; make one with `ctc-timm zoo add`') from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: not a catalog: {error}') from None


def save(file: Path, entries: Iterable[Entry]) -> None:
    """Write a catalog, complete or not at all."""
    file = file.absolute()
    models = {entry.name: entry.to_json(file.parent) for entry in sorted(entries, key=lambda entry: entry.name)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({'version': VERSION, 'models': models}, indent=2) + '\n')


def parse(name: str, raw: Any, where: str, folder: Path = Path()) -> Entry:
    """Check an entry of the catalog `where`, or raise a UserError; a relative path starts in the folder."""
    if not (_BASELINE if where == str(BASELINES) else NAME).fullmatch(name):
        raise UserError(f'{where}: {name!r} is no name of a model: it must be ARCH_ctc or ARCH_ctc.TAG')
    where = f'{where}: {name!r}'
    if not isinstance(raw, dict):
        raise UserError(f'{where}: the entry must be a mapping')
    needed = {*(('hub_id', 'revision', 'filename') if 'hub_id' in raw else ('path',)), 'sha256', 'pretrained_cfg'}
    known = {*needed, 'model_args', 'license', 'results', 'recipe'}
    if odd := (needed - set(raw)) | (set(raw) - known):
        raise UserError(f'{where}: its keys must be of {", ".join(sorted(known))}; missing or unknown: {sorted(odd)}')
    for key, value in raw.items():
        if key in _CHECKS and not _CHECKS[key][0](value):
            raise UserError(f'{where}: {key} must be {_CHECKS[key][1]}')
    values = {**raw, 'pretrained_cfg': check_pretrained_cfg(raw['pretrained_cfg'], where)}
    values['model_args'] = check_model_args(raw.get('model_args', {}), where)
    if 'path' in raw:
        values['path'] = str(folder / raw['path'])
    return Entry(name, **values)


def is_repo_id(text: Any) -> bool:
    """Whether a text can only be USER/NAME: no path, no revision, nothing that means more."""
    parts = text.split('/') if isinstance(text, str) and len(text) <= 96 else []
    return len(parts) == 2 and all(map(is_word, parts))


def is_word(text: str) -> bool:
    """Whether a text can be one half of a repo's id."""
    return bool(re.fullmatch(r'[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?', text)) and not re.search(r'\.\.|--', text)


def is_result(row: Any) -> bool:
    """Whether this is a measured number: dataset and metric, printable texts, and value."""
    if not isinstance(row, dict) or set(row) != {'dataset', 'metric', 'value'}:
        return False
    texts = all(isinstance(row[key], str) and row[key].isprintable() for key in ('dataset', 'metric'))
    return texts and type(row['value']) in (int, float) and abs(row['value']) < math.inf


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value))


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'hub_id': (is_repo_id, 'USER/NAME'),
    'revision': (_matches(r'[0-9a-f]{40}'), 'a whole commit, 40 hexadecimal digits'),
    'filename': (_matches(r'[\w-][\w.-]*\.safetensors'), 'a .safetensors file'),
    'path': (
        _matches(r'(?!([^\0]*[\\/])?\.\.[\\/])[^\0]*\.safetensors'),
        "a .safetensors file in the catalog's folder, or an absolute path",
    ),
    'sha256': (_matches(r'[0-9a-f]{64}'), '64 hexadecimal digits'),
    'license': (lambda value: isinstance(value, str), 'text'),
    'results': (lambda v: isinstance(v, list) and all(map(is_result, v)), 'a list of dataset, metric and value'),
    'recipe': (lambda value: isinstance(value, dict), 'a mapping'),
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError('a name stands twice in one mapping')
    return dict(pairs)
