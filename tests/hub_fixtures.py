"""Fixtures of what talks to a Hub: the Hub on loopback, processes that know no other, and a run to publish."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub_client import ALICE, FORKER, Client
from hub_server import Blob, Hub, Repo


@pytest.fixture(scope='session')
def forker():
    """The process that forks clients."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-c', FORKER], stdin=-1, stdout=-1, text=True, env=env)
    assert process.stdout and process.stdout.readline() == 'ready\n'
    yield process
    process.kill()
    process.wait(10)


@pytest.fixture
def hub():
    """An empty Hub."""
    with Hub() as server:
        yield server
    assert not server.errors


@pytest.fixture
def client(forker, hub, tmp_path):
    """Processes that know only this Hub, with an empty cache, logged in as alice."""
    (tmp_path / 'client').mkdir()
    env = {f'HF_HUB_DISABLE_{name}': '1' for name in ('XET', 'PROGRESS_BARS', 'TELEMETRY')}
    env |= {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'cache'), 'HF_TOKEN': ALICE}
    return Client(forker, tmp_path / 'client', {**env, 'HF_HUB_DOWNLOAD_TIMEOUT': '5'})


@pytest.fixture
def anyone(client):
    """Others: who they are by their token, and what is theirs."""

    def make(token: str = '', cache: str = 'cache', **env: str) -> Client:
        theirs = {**client.env, 'HF_TOKEN': token, 'HF_HOME': str(client.folder.parent / cache), **env}
        return Client(client.forker, client.folder, theirs)

    return make


@pytest.fixture(scope='session')
def trained(forker, tiny, tmp_path_factory):
    """A run of both stages on digits, with twelve classes of which two never occur, and its validation."""
    folder = tmp_path_factory.mktemp('trained')
    client = Client(forker, folder, {'HF_HUB_OFFLINE': '1'})
    words = [word if word != 'test_resnet' else 'test_resnet_ctc' for word in tiny]
    where = ['--num-classes', '12', '--epochs', '3', '--output', 'runs', '--experiment', 'digits']
    for command in (['train', *words, *where], ['validate', str(folder / 'runs' / 'digits'), '-j', '0']):
        done = client.command(*command)
        assert done.code == 0, done.err
    return folder / 'runs' / 'digits'


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / 'runs' / 'mine'))


@pytest.fixture(scope='session')
def export(forker, trained, tmp_path_factory):
    """The files of that run's repo, as `ctc-timm publish` makes them."""
    client = Client(forker, tmp_path_factory.mktemp('export'), {'HF_HUB_OFFLINE': '1'})
    done = client.command('publish', str(trained), '--repo-id', 'alice/test_resnet_ctc.digits', '--dry-run')
    assert done.code == 0, done.err
    folder = trained / 'publish'
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    shutil.rmtree(folder)
    return {name: Blob(data, lfs=name.endswith(('.safetensors', '.png'))) for name, data in files.items()}


@pytest.fixture
def shelve(hub, export):
    """Put that run into a repo, with files of one's own in place of some."""

    def make(repo_id: str, files: dict[str, Blob | None] | None = None, private: bool = False) -> Repo:
        repo = hub.repos.get(repo_id) or hub.create(repo_id, private)
        mine = {**export, **(files or {})}
        hub.commit(repo, 'main', 'shelved', {name: blob for name, blob in mine.items() if blob is not None})
        return repo

    return make
