"""A run on the Hub: timm's own export, a card written from the run, one atomic commit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from ..models.catalog import is_repo_id
from ..models.download import HubError, translate_errors
from ..models.pretrained_cfg import own_config
from ..utils.errors import UserError, one_line
from ..utils.weights_files import read_weights, tensors_hash
from .model_card import write_card
from .privacy import Private
from .summary import RunDetails, summarize

DRY_RUN = 'publish'  # folder in the run


@dataclass(frozen=True)
class Published:
    """Where a run was published: URL of the commit or folder of a dry run, and the line that loads exactly this."""

    url: str
    load: str
    pull_request: str  # its URL, or empty
    notes: list[str]  # what was left out, and why

    def report(self) -> str:
        """Lines for people; the commit's URL and the pinned line to load it come last."""
        lines = [f'left out: {note}' for note in self.notes]
        lines += [f'pull request: {self.pull_request}'] if self.pull_request else []
        done = 'published' if '://' in self.url else 'written'
        return '\n'.join([*lines, f'{done}: {self.url}', self.load])


def push(
    run: str | os.PathLike,
    repo_id: str,
    settings: Collection[str],
    *,
    private: bool | None = None,
    revision: str = '',
    create_pr: bool = False,
    tags: Sequence[str] = (),
    license: str = 'apache-2.0',
    dry_run: bool = False,
) -> Published:
    """Publish a run's best weights on the Hub, with a card, in one commit; the options are of `PublishSettings`.

    The recipe holds none but these `settings`, by name: a run may be of other people, who write anything there.

    The repo, and the branch `revision`, are created where they are missing; the Hub decides on a `private` of None.

    Raises:
        UserError: A run that can't be published, or a Hub that does not take it; nothing is visible then.
    """
    _check(repo_id, revision, tags, license)
    hidden = Private()
    details = summarize(run, settings, hidden)
    with tempfile.TemporaryDirectory(prefix='ctc-timm-') as temporary:
        folder = details.path / DRY_RUN if dry_run else Path(temporary)
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
        _write_folder(details, folder, repo_id, license, tags, hidden)
        if dry_run:
            return Published(str(folder), _load_line(details, f'local-dir:{folder}'), '', details.notes)
        info = _upload(folder, repo_id, private, revision, create_pr, f'Publish {details.architecture}, by ctc-timm')
    load = _load_line(details, f'hf-hub:{repo_id}@{info.oid}')
    return Published(str(info.commit_url), load, str(info.pr_url or ''), details.notes)


def check_target(repo_id: str) -> None:
    """Raise a UserError, before a long run, for what is no name of a repo, and where nobody is logged in."""
    _check(repo_id)
    with translate_errors(repo_id):
        try:
            HfApi().whoami()
        except LocalTokenNotFoundError:
            raise HubError(f'{repo_id}: log in with `hf auth login`, or set HF_TOKEN') from None


def _write_folder(
    run: RunDetails, folder: Path, repo_id: str, license: str, tags: Sequence[str], hidden: Private
) -> None:
    """Write everything that goes into the repo: weights, config.json, card, recipe and pictures."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _export(run, folder)
        (folder / 'recipe.yaml').write_text(yaml.safe_dump(run.recipe, sort_keys=True), encoding='utf-8')
        card = write_card(run, repo_id, license, tags, _copy_pictures(run, folder))
        (folder / 'README.md').write_text(card, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{folder}: {one_line(error)}') from None
    hidden.check_folder(folder)


def _copy_pictures(run: RunDetails, folder: Path) -> dict[str, str]:
    """Copy the run's pictures as pixels alone, as their metadata may tell who made them; titles by file in the repo."""
    pictures = {}
    for title, file in run.pictures.items():
        try:
            with Image.open(file) as image:
                pixels = image.convert('RGBA')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            run.notes.append(f'{file.name}, which is no sound picture: {one_line(error)}')
            continue
        (folder / 'plots').mkdir(exist_ok=True)
        Image.frombytes('RGBA', pixels.size, pixels.tobytes()).save(folder / 'plots' / file.name, optimize=True)
        pictures[f'plots/{file.name}'] = title
    return pictures


def _export(run: RunDetails, folder: Path) -> None:
    """Write weights and config.json by timm's own export, and check that they are the run's."""
    try:
        model = timm.create_model(f'local-dir:{run.path}', pretrained=False)
        weights, _ = read_weights(run.weights)
        if tensors_hash(weights) != run.tensors_hash:  # whose numbers the card shows
            raise UserError(f'{run.weights}: was exchanged while it was being published; publish again')
        model.load_state_dict(weights)
        about = {'label_names': run.class_names, 'epoch': run.epoch, 'stage': run.stage}
        about = {name: value for name, value in about.items() if value not in (None, '', [])}
        own_config(model)
        save_for_hf(model, str(folder), model_config=about, safe_serialization=True)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{run.weights}: cannot be exported: {one_line(error)}') from None
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f'{run.weights}: holds values that are not finite; train again')
    written = load_file(folder / 'model.safetensors')
    if set(written) != set(weights) or any(not torch.equal(written[name], weights[name]) for name in weights):
        raise UserError(f'{run.weights}: its export differs from it')
    # timm gives the classes twice, and the second time keeps transformers from building the model.
    file = folder / 'config.json'
    config = json.loads(file.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    file.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _upload(folder: Path, repo_id: str, private: bool | None, revision: str, create_pr: bool, title: str) -> Any:
    """Send a folder as one commit; the Hub shows all of it or nothing."""
    api = HfApi(library_name='ctc-timm')
    with translate_errors(repo_id):
        if create_pr:  # which needs no right to write, so the repo has to be there
            api.repo_info(repo_id)
        else:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision and revision != 'main':
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        options: dict[str, Any] = dict(commit_message=title, revision=revision or None, create_pr=create_pr)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def _check(repo_id: str, revision: str = '', tags: Sequence[str] = (), license: str = 'other') -> None:
    if not is_repo_id(repo_id):
        raise UserError(f'`repo_id` {repo_id!r}: must be USER/NAME, of letters, digits, dots, dashes and underscores')
    if not re.fullmatch(r'(\w(?!.*\.\.)[\w./-]{0,199})?', revision):
        raise UserError(f'`revision` {revision!r}: must be the name of a branch')
    for tag in tags:
        if not re.fullmatch(r'\w[\w .:/+-]{0,63}', tag):
            raise UserError(f'`tags` {tag!r}: must be short texts of letters, digits, spaces and . : / + -')
    if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]{0,63}', license):
        raise UserError(f'`license` {license!r}: must be an identifier of the Hub such as apache-2.0, mit or other')


def _load_line(run: RunDetails, name: str) -> str:
    """One line for a shell that loads exactly what was published."""
    modules = 'timm' if run.stock else 'timm, ctc_timm'
    code = f'import {modules}; model = timm.create_model({name!r}, pretrained=True)'
    return f'python -c "{code}"' if re.fullmatch(r'[\w.:/@-]+', name) else f'python -c {shlex.quote(code)}'
