"""New entries for a catalog: from a run's folder, from a repo, or from all repos of a namespace."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import is_model
from timm.models._hub import download_from_hf, load_model_config_from_path

from ..models.catalog import NAME, SUFFIX, WEIGHTS, Entry, NoCatalog, base_of, is_repo_id, is_result, load, save
from ..models.download import entry_of, fetch, published, read_config, sha256
from ..models.failures import HubError, NotPublished, Unfit, translate_errors
from ..utils.errors import UserError
from ..utils.yaml_files import read_values
from .privacy import Private
from .summary import RunDetails, read_run, recipe

_NUMBER_OF_RESULTS = 40  # of a card from elsewhere


def add(source: str, file: Path, name: str = '', tag: str = '', overwrite: bool = False) -> Entry:
    """Catalog a run's folder or a repo of the Hub, pinned and with its hash.

    Args:
        source: A run's folder, or USER/NAME[@REVISION].
        file: The catalog; made where it is missing.
        name: '<arch>_ctc[.tag]'; made of the architecture and the run's or repo's name when empty.
        tag: In place of a whole name.
        overwrite: Whether other weights of that name may be replaced.

    Returns:
        The entry.

    Raises:
        UserError: Nothing there, weights that don't fit, or a name that is taken.
    """
    make: Callable[[str, str, str], Entry] = entry_of_run if Path(source).is_dir() else entry_of_repo
    entry = make(source, name, tag)
    _merge(file, [entry], overwrite)
    return entry


def sync(namespace: str, file: Path, say: Callable[[str], None]) -> list[Entry]:
    """Catalog every repo of a namespace that is tagged `ctc`, each at the commit it stands at now.

    Args:
        namespace: User or organization.
        file: The catalog; entries of that namespace are brought up to date, others stay.
        say: Told each repo that is left out, and why.

    Returns:
        The entries found.

    Raises:
        HubError: The Hub can't be asked, or not about all of them; the catalog is left as it was.
    """
    entries: dict[str, Entry] = {}
    for repo_id in published(namespace):
        try:
            entry = entry_of_repo(repo_id, '', '')
            if entry.name in entries:
                raise UserError(f'{repo_id}: {entry.name} is {entries[entry.name].hub_id} already; add it by --name')
        except UserError as error:
            if isinstance(error, HubError) and not isinstance(error, (Unfit, NotPublished)):
                raise  # the Hub may say more when it is asked again
            say(f'left out {error}')
        else:
            entries[entry.name] = entry
    _merge(file, list(entries.values()), namespace=namespace)
    return list(entries.values())


def entry_of_run(folder: str, name: str, tag: str) -> Entry:
    """An entry for a run on this machine.

    Raises:
        UserError: No run there.
    """
    path = Path(folder).absolute()
    private = Private()
    run = read_run(path, private)
    config, architecture, model_args = load_model_config_from_path(path)
    name = _name(base_of(architecture), name, tag or path.name)
    return entry_of(
        name,
        config,
        model_args,
        f'{folder}/config.json',
        path=str(run.weights),
        sha256=sha256(run.weights),
        results=_results_of_run(run),
        recipe=recipe(run, private),
    )


def entry_of_repo(source: str, name: str, tag: str) -> Entry:
    """An entry for a repo of the Hub, pinned to a commit.

    Raises:
        Unfit: It holds no weights of timm.
        HubError: It can't be had.
    """
    from huggingface_hub import HfApi

    repo_id, _, revision = source.partition('@')
    if not is_repo_id(repo_id):
        raise UserError(f'{source!r}: neither the folder of a run nor a repo of the Hub, USER/NAME[@REVISION]')
    with translate_errors(source):
        info = HfApi().model_info(repo_id, revision=revision or None, files_metadata=True)
        commit = str(info.sha)
        weights = next((file for file in info.siblings or [] if file.rfilename == WEIGHTS), None)
        if weights is None:
            raise Unfit(f'{source}: has no {WEIGHTS}; only safetensors are taken')
        config, architecture, model_args = read_config(f'{repo_id}@{commit}')
        base = base_of(architecture)
        if not is_model(base):
            raise Unfit(f'{source}: {base!r} is unknown to timm')
        card = info.card_data.to_dict() if info.card_data else {}
        entry = entry_of(
            _name(base, name, tag or _tag_of(repo_id, base), bare=not tag),
            config,
            model_args,
            f'{source}: config.json',
            hub_id=repo_id,
            revision=commit,
            sha256=str(weights.lfs.sha256) if weights.lfs else '',
            license=str(card.get('license') or ''),
            results=_results_of_card(card),
            recipe=_recipe_of_repo(f'{repo_id}@{commit}', [file.rfilename for file in info.siblings or []]),
        )
        if not entry.sha256:  # too small for the Hub to keep a hash of it
            entry = replace(entry, sha256=sha256(fetch(entry)))
    return entry


def _merge(file: Path, entries: list[Entry], overwrite: bool = False, namespace: str = '') -> None:
    """Write entries into a catalog."""
    try:
        known = load(file)
    except NoCatalog:
        known = {}
    for entry in entries:
        old = known.get(entry.name)
        own = bool(old and namespace and old.hub_id.partition('/')[0] == namespace)
        if old and not (overwrite or own) and old.sha256 != entry.sha256:
            raise UserError(f'{file}: {entry.name} is other weights already; give --replace, or another --name')
        known[entry.name] = entry
    with translate_errors(str(file)):
        save(file, known.values())


def _name(base: str, name: str, tag: str, bare: bool = False) -> str:
    """The name to be catalogd under."""
    if not name:
        tag = re.sub(r'[^A-Za-z0-9_.-]+', '_', tag).strip('.-')
        if not tag and not bare:
            raise UserError('--tag: must be of letters, digits, dots, dashes and underscores')
        name = f'{base}{SUFFIX}.{tag}' if tag else f'{base}{SUFFIX}'
    if not NAME.fullmatch(name) or name.partition('.')[0] != f'{base}{SUFFIX}':
        raise UserError(
            f'--name {name!r}: must be {base}{SUFFIX} or {base}{SUFFIX}.TAG, as these are weights of {base}'
        )
    return name


def _tag_of(repo_id: str, base: str) -> str:
    """The tag that a repo's name means: what follows '<arch>_ctc.', nothing for '<arch>_ctc', else all of it."""
    model = repo_id.partition('/')[2]
    head, _, tag = model.partition('.')
    return tag if head == f'{base}{SUFFIX}' else model


def _results_of_run(run: RunDetails) -> list[dict[str, Any]]:
    rows = [*run.source, *(result for result in run.transfer if result.shots is None)]
    return [
        {'dataset': row.dataset, 'metric': f'top-1 %{", " + row.method if row.method else ""}', 'value': row.top1}
        for row in rows
    ]


def _results_of_card(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured numbers of a card, as short texts and numbers."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        found = model_index_to_eval_results(card.get('model-index') or [])[1]
        rows = [
            {'dataset': str(r.dataset_name)[:80], 'metric': str(r.metric_name)[:80], 'value': float(r.metric_value)}
            for r in found[:_NUMBER_OF_RESULTS]
        ]
        return [row for row in rows if is_result(row)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []


def _recipe_of_repo(pinned: str, files: list[str]) -> dict[str, Any]:
    """The flags that a repo's recipe gives, or none."""
    if 'recipe.yaml' not in files:
        return {}
    try:
        found = read_values(Path(download_from_hf(pinned, 'recipe.yaml')).read_text(encoding='utf-8'))
    except ValueError:
        return {}
    found = found if isinstance(found, dict) else {}
    return {str(k): v for k, v in found.items() if isinstance(v, (bool, int, float, str)) and len(str(v)) < 200}
