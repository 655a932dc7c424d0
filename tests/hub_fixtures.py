"""Fixtures of what talks to a Hub: the Hub on loopback, and processes that know no other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import ALICE, Client, hub_environment, start_forker
from hub_server import Hub


@pytest.fixture(scope='session')
def forker() -> Iterator[subprocess.Popen]:
    """The process that forks clients."""
    process = start_forker()
    yield process
    process.kill()
    process.wait(10)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub."""
    with Hub() as server:
        yield server
    assert not server.errors


@pytest.fixture
def client(forker: subprocess.Popen, hub: Hub, tmp_path: Path) -> Client:
    """Processes that know only this Hub, with an empty cache, logged in as alice."""
    folder = tmp_path / 'client'
    folder.mkdir()
    return Client(forker, folder, hub_environment(hub, tmp_path / 'cache', ALICE))
