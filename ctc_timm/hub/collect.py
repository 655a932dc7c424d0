"""New entries for a catalog: from a run's folder, or from a repo."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..models.catalog import NAME, WEIGHTS, Entry, NoCatalog, is_repo_id, is_result, load, save
from ..models.download import fetch, find, translate_errors
from ..models.pretrained_cfg import SUFFIX
from ..utils.errors import UserError
from ..utils.files import sha256
from .summary import summarize


def add(
    source: str | os.PathLike,
    file: Path,
    settings: Collection[str],
    name: str = '',
    tag: str = '',
    overwrite: bool = False,
) -> Entry:
    """Catalog a run's folder or a repo of the Hub, USER/NAME[@REVISION], pinned and with its hash.

    Its name is made of the architecture and the `tag`, or else the name of the run or repo, unless a `name` is given.
    A run's recipe holds none but these `settings`, see `push`.

    Raises:
        UserError: Nothing there, weights that don't fit, or a name that is taken.
    """
    source = os.fspath(source)
    local = Path(source).is_dir()
    entry = entry_of_run(source, settings, name, tag) if local else entry_of_repo(source, name, tag)
    try:
        known = load(file)
    except NoCatalog:
        known = {}
    if entry.name in known and not overwrite and known[entry.name].sha256 != entry.sha256:
        raise UserError(f'{file}: {entry.name} is other weights already; give `replace=True`, or another `name`')
    with translate_errors(str(file)):
        save(file, (known | {entry.name: entry}).values())
    return entry


def entry_of_run(folder: str, settings: Collection[str], name: str = '', tag: str = '') -> Entry:
    """Make an entry of a run on this machine, see `add`."""
    path = Path(folder).absolute()
    run = summarize(path, settings)
    rows = [(row.dataset, f'top-1 %, {row.method}' if row.method else 'top-1 %', row.top1) for row in run.results]
    return Entry(
        _name(run.architecture, name, tag or path.name),
        run.config,
        sha256(run.weights),
        path=str(run.weights),
        model_args=run.model_args,
        results=[{'dataset': dataset, 'metric': metric, 'value': value} for dataset, metric, value in rows],
        recipe=run.recipe,
    )


def entry_of_repo(source: str, name: str = '', tag: str = '') -> Entry:
    """Make an entry of a repo of the Hub, pinned to a commit, see `add`."""
    repo_id, _, revision = source.partition('@')
    if not is_repo_id(repo_id):
        raise UserError(f'{source!r}: neither the folder of a run nor a repo of the Hub, USER/NAME[@REVISION]')
    entry = find(repo_id, revision=revision)
    with translate_errors(source):
        info = HfApi().model_info(repo_id, revision=entry.revision, files_metadata=True)
    weights = next((file for file in info.siblings or [] if file.rfilename == WEIGHTS), None)
    if weights is None:
        raise UserError(f'{source}: has no {WEIGHTS}; only safetensors are taken')
    base, model, card = entry.name, repo_id.partition('/')[2], info.card_data
    head, _, rest = model.partition('.')
    entry = replace(
        entry,
        name=_name(base, name, tag or (rest if head == f'{base}{SUFFIX}' else model)),
        sha256=str(weights.lfs.sha256) if weights.lfs else '',
        license=str(card.get('license') or '') if card else '',
        results=_rows_of_card(card),
    )
    # Of a file that is too small for LFS the Hub keeps no sha256.
    return entry if entry.sha256 else replace(entry, sha256=hashlib.sha256(fetch(entry)).hexdigest())


def _name(base: str, name: str, tag: str) -> str:
    """The name of an entry: as given, or made of the architecture and a tag."""
    tag = re.sub(r'[^A-Za-z0-9_.-]+', '_', tag).strip('.-')
    name = name or f'{base}{SUFFIX}{f".{tag}" if tag else ""}'
    if not NAME.fullmatch(name) or name.partition('.')[0] != f'{base}{SUFFIX}':
        raise UserError(
            f'`name` {name!r}: must be {base}{SUFFIX} or {base}{SUFFIX}.TAG, as these are weights of {base}'
        )
    return name


def _rows_of_card(card: Any) -> list[dict[str, Any]]:
    """The measured numbers of a repo's card, as short texts and numbers."""
    rows = []
    for result in (getattr(card, 'eval_results', None) or [])[:40]:  # a card from elsewhere may hold any number
        texts = {'dataset': str(result.dataset_name)[:80], 'metric': str(result.metric_name)[:80]}
        rows.append({**texts, 'value': result.metric_value})
    return [row for row in rows if is_result(row)]
