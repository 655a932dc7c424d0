"""A Hub on loopback: the HTTP protocol of the Hugging Face Hub as the real huggingface_hub client speaks it.

It keeps repos with commits, branches, pull requests and large files in memory, knows users by their tokens, and can be
made to fail. Large files go by plain HTTP (a client's HF_HUB_DISABLE_XET=1), from another host name than the API's, as
on the real Hub: there no token may arrive.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard
from huggingface_hub.utils.sha import git_hash

REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else git_hash(self.data)


@dataclass
class Commit:
    """A state of a repo."""

    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repo."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str = 'main') -> Commit:
        return self.commits[self.refs.get(revision, revision)]


class Hub:
    """The server. Use it as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        # By token; one that is not here is refused.
        self.users = {'hf_aliceAliceAliceAliceAlice': 'alice', 'hf_bobBobBobBobBobBobBobBob': 'bob'}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, int]] = []  # '<method> <path>', and the status that was answered
        self.faults: list[tuple[str, int | str]] = []
        self.released, self.reached = threading.Event(), threading.Event()  # of requests that a fault holds up
        self.errors: list[BaseException | None] = []  # what this server itself did wrong
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self._server.handle_error = lambda *_: self.errors.append(sys.exc_info()[1])  # type: ignore[method-assign]
        self._server.daemon_threads = True
        self._server.block_on_close = False
        port = self._server.server_address[1]
        self.url, self.cdn = f'http://127.0.0.1:{port}', f'http://localhost:{port}'

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, request: str, kind: int | str) -> None:
        """From now on, until `faults` is emptied, requests fail in whose '<method> <path>' the expression is found.

        The kind is a status; 'gated'; 'stall' (no content, but no end either), 'break' (the end in place of the
        content), 'corrupt' (other bytes of the same number), 'hold' (nothing is done until `released`).
        """
        self.faults.append((request, kind))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        """A new repo, with the one file that the Hub puts into it."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        self.commit(repo, 'main', 'initial commit', {'.gitattributes': Blob(b'*.safetensors filter=lfs\n')})
        return repo

    def commit(self, repo: Repo, ref: str, title: str, files: dict[str, Blob]) -> Commit:
        """Put a state of all files on a branch."""
        oid = hashlib.sha1(f'{repo.id} {ref} {len(repo.commits)}'.encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, title, files)
        repo.refs[ref] = oid
        return commit

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, Blob]:
        """What a repo holds."""
        return self.repos[repo_id].at(revision).files

    def asked(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request, _ in self.requests)


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = '', message: str = '') -> None:
        self.status, self.code, self.message = status, code, message


_routes: list[tuple[str, re.Pattern, Callable]] = []


def _route(method: str, pattern: str) -> Callable:
    def keep(function: Callable) -> Callable:
        _routes.append((method, re.compile(pattern), function))
        return function

    return keep


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.name = f'{self.command} {unquote(parts.path)}'
        self.body, self.fault = self.rfile.read(int(self.headers.get('Content-Length') or 0)), ''
        try:
            self._suffer()
            for method, pattern, function in _routes:
                match = pattern.fullmatch(parts.path)
                if match and method == self.command.replace('HEAD', 'GET'):
                    return function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
            raise _Refused(404, message='no such route')
        except _Refused as refused:
            headers = {'X-Error-Code': refused.code, 'X-Error-Message': refused.message}
            headers |= {'Retry-After': '0'} if refused.status in (429, 500, 502, 503, 504) else {}
            self.send({'error': refused.message}, refused.status, {k: v for k, v in headers.items() if v})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do

    def _suffer(self) -> None:
        if re.match('(GET /get|PUT /put)/', self.name) and self.headers.get('Authorization'):
            raise _Refused(400, message='a token was sent to the storage')
        for kind in [kind for request, kind in self.hub.faults if re.search(request, self.name)]:
            if isinstance(kind, int):
                raise _Refused(kind, 'EntryNotFound' if kind == 404 else '', f'made to answer {kind}')
            if kind == 'gated':
                raise _Refused(403, 'GatedRepo', 'Access to this model is restricted.')
            if kind == 'hold':
                self.hub.reached.set()
                self.hub.released.wait(60)
            self.fault = kind

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with bytes, or with JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.requests.append((self.name, status))
        self.send_response(status)
        for key, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault in ('stall', 'break'):
            self.wfile.flush()
            if self.fault == 'stall':
                self.hub.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(bytes(255 - byte for byte in data) if self.fault == 'corrupt' else data)

    def user(self) -> str:
        """Who asks, or an empty text."""
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.hub.users:
            raise _Refused(401, message='Invalid credentials in Authorization header')
        return self.hub.users.get(token, '')

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """The repo, if the one who asks may read or write it."""
        user, repo, owner = self.user(), self.hub.repos.get(repo_id), repo_id.partition('/')[0]
        if repo is None or (repo.private and user != owner):
            raise _Refused(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if write and user != owner:
            raise _Refused(403 if user else 401, message='You have no right to write here')
        return repo

    def state(self, repo: Repo, revision: str) -> Commit:
        if repo.refs.get(revision, revision) not in repo.commits:
            raise _Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repo.at(revision)

    @_route('GET', '/api/whoami-v2')
    def whoami(self) -> None:
        if not self.user():
            raise _Refused(401, message='Invalid credentials in Authorization header')
        self.send({'type': 'user', 'name': self.user(), 'auth': {'accessToken': {'role': 'write'}}})

    @_route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> None:
        assert ModelCard(json.loads(self.body)['content']).data  # or it raises a ValueError
        self.send({'errors': [], 'warnings': []})

    @_route('POST', '/api/repos/create')
    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        repo_id = f'{asked.get("organization") or user}/{asked["name"]}'
        if not user or user != repo_id.partition('/')[0]:
            raise _Refused(403 if user else 401, message='You have no right to create this repo')
        answer = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.hub.repos:
            return self.send({**answer, 'error': 'You already created this model repo'}, 409)
        self.hub.create(repo_id, asked.get('private') is True or asked.get('visibility') == 'private')
        self.send(answer)

    @_route('POST', f'/api/models/{REPO}/branch/(?P<branch>[^/]+)')
    def branch(self, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        found.refs.setdefault(branch, found.refs['main'])
        self.send({})

    @_route('POST', f'/api/models/{REPO}/preupload/(?P<revision>[^/]+)')
    def preupload(self, repo: str, revision: str) -> None:
        files = self.state(self.repo(repo, write='create_pr' not in self.query), revision).files
        answers = []
        for file in json.loads(self.body)['files']:
            large = b'\0' in base64.b64decode(file['sample']) or file['path'].endswith('.safetensors')
            answer = {'path': file['path'], 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False}
            old = files.get(file['path'])
            answers.append({**answer, 'oid': old.etag} if old else answer)
        self.send({'files': answers})

    @_route('POST', f'/{REPO}.git/info/lfs/objects/batch')
    def batch(self, repo: str) -> None:
        self.repo(repo)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            actions = {'upload': {'href': f'{self.hub.cdn}/put/{wanted["oid"]}'}}
            objects.append({**wanted, **({} if wanted['oid'] in self.hub.objects else {'actions': actions})})
        self.send({'transfer': 'basic', 'objects': objects})

    @_route('PUT', '/put/(?P<oid>[0-9a-f]{64})')
    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message='the content has another hash')
        self.hub.objects[oid] = self.body
        self.send(b'')

    @_route('POST', f'/api/models/{REPO}/commit/(?P<revision>[^/]+)')
    def commit(self, repo: str, revision: str) -> None:
        create_pr = self.query.get('create_pr') == '1'
        found = self.repo(repo, write=not create_pr)
        files, title = dict(self.state(found, revision).files), ''
        if not self.user():
            raise _Refused(401, message='You must be logged in')
        for item in map(json.loads, self.body.splitlines()):
            value = item['value']
            if item['key'] == 'header':
                title = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']))
            else:
                assert item['key'] == 'lfsFile'
                files[value['path']] = Blob(self.hub.objects[value['oid']], lfs=True)
        ref = f'refs/pr/{sum(r.startswith("refs/pr/") for r in found.refs) + 1}' if create_pr else revision
        made = self.hub.commit(found, ref, title, files)
        url = f'{self.hub.url}/{repo}'
        pull = f'{url}/discussions/{ref.rpartition("/")[2]}' if create_pr else None
        self.send({'commitUrl': f'{url}/commit/{made.oid}', 'commitOid': made.oid, 'pullRequestUrl': pull})

    @_route('GET', f'/api/models/{REPO}(/revision/(?P<revision>[^/]+))?')
    def info(self, repo: str, revision: str = 'main') -> None:
        found = self.repo(repo)
        state, siblings = self.state(found, revision), []
        for path, blob in state.files.items():
            lfs = {'sha256': blob.sha256, 'size': len(blob.data), 'pointerSize': 134} if blob.lfs else None
            siblings.append({'rfilename': path, 'size': len(blob.data), 'lfs': lfs if 'blobs' in self.query else None})
        card = ModelCard(found.at().files.get('README.md', Blob(b'')).data.decode()).data.to_dict()
        facts = {'private': found.private, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0, 'tags': []}
        self.send({'id': repo, 'sha': state.oid, **facts, 'cardData': card, 'siblings': siblings})

    @_route('GET', f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
    def resolve(self, repo: str, revision: str, path: str) -> None:
        state = self.state(self.repo(repo), revision)
        if path not in state.files:
            raise _Refused(404, 'EntryNotFound', 'Entry not found')
        blob = state.files[path]
        headers = {'X-Repo-Commit': state.oid, 'ETag': f'"{blob.etag}"'}
        if not blob.lfs:
            return self.send(blob.data, headers=headers)
        self.hub.objects.setdefault(blob.sha256, blob.data)
        headers |= {'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(len(blob.data))}
        self.send(b'', 302, {**headers, 'Location': f'{self.hub.cdn}/get/{blob.sha256}/{repo}/{path}'})

    @_route('GET', '/get/(?P<oid>[0-9a-f]{64})/.+')
    def get(self, oid: str) -> None:
        self.send(self.hub.objects[oid], headers={'ETag': f'"{oid}"'})
