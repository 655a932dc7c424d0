"""A Hub on loopback: the HTTP protocol of the Hugging Face Hub as the real huggingface_hub client speaks it.

It keeps repos with commits, branches, pull requests and large files in memory, knows users by their tokens, and can be
made to fail. Large files go by plain HTTP (a client's HF_HUB_DISABLE_XET=1), from another host name than the API's, as
on the real Hub: there no token may arrive.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

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
    def oid(self) -> str:
        """git's hash of it."""
        return hashlib.sha1(b'blob %d\0' % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


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

    def card(self) -> dict[str, Any]:
        """The front matter of its card."""
        return front_matter(self.at().files.get('README.md', Blob(b'')).data.decode())


@dataclass
class Fault:
    """Something that goes wrong."""

    request: re.Pattern
    kind: int | str


class Hub:
    """The server. Use it as a context manager.

    Attributes:
        repos: By id.
        users: Names by token; a token that is not here is refused.
        requests: '<method> <path>' of all that was asked, and the status that was answered.
        released: Lets requests that a fault holds up go on.
        reached: Set when a request is held up.
        errors: What this server itself did wrong.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users = {'hf_aliceAliceAliceAliceAlice': 'alice', 'hf_bobBobBobBobBobBobBobBob': 'bob'}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, int]] = []
        self.faults: list[Fault] = []
        self.released, self.reached = threading.Event(), threading.Event()
        self.count = itertools.count()
        self.errors: list[BaseException | None] = []
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
        """From now on, until `faults` is emptied, requests that match fail.

        Args:
            request: Regular expression searched for in '<method> <path>'.
            kind: A status; 'gated'; 'stall' (no content, but no end either), 'break' (the end in place of the
                content), 'corrupt' (other bytes of the same number), 'hold' (nothing is done until `released`).
        """
        self.faults.append(Fault(re.compile(request), kind))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        """A new repo, with the one file that the Hub puts into it."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        self.commit(repo, 'main', 'initial commit', {'.gitattributes': Blob(b'*.safetensors filter=lfs\n')})
        return repo

    def commit(self, repo: Repo, ref: str, title: str, files: dict[str, Blob]) -> Commit:
        """Put a state of all files on a branch."""
        oid = hashlib.sha1(f'{repo.id} {ref} {next(self.count)}'.encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, title, files)
        repo.refs[ref] = oid
        return commit

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, Blob]:
        """What a repo holds."""
        return self.repos[repo_id].at(revision).files

    def asked(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request, _ in self.requests)


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the head of a card."""
    match = re.match(r'---\n(.*?)\n---\n', card, re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else {}


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
        self.body, self.fault = self._read(), ''
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

    def _read(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _suffer(self) -> None:
        for fault in self.hub.faults:
            if not fault.request.search(self.name):
                continue
            if isinstance(fault.kind, int):
                raise _Refused(fault.kind, 'EntryNotFound' if fault.kind == 404 else '', f'made to answer {fault.kind}')
            if fault.kind == 'gated':
                raise _Refused(403, 'GatedRepo', 'Access to this model is restricted.')
            if fault.kind == 'hold':
                self.hub.reached.set()
                self.hub.released.wait(60)
            self.fault = fault.kind

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

    def no_token(self) -> None:
        if self.headers.get('Authorization'):
            raise _Refused(400, message='a token was sent to the storage')

    @_route('GET', '/api/whoami-v2')
    def whoami(self) -> None:
        if not self.user():
            raise _Refused(401, message='Invalid credentials in Authorization header')
        self.send({'type': 'user', 'name': self.user(), 'auth': {'accessToken': {'role': 'write'}}})

    @_route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> None:
        problems = _problems(json.loads(self.body)['content'])
        self.send({'errors': [{'message': p} for p in problems], 'warnings': []}, 400 if problems else 200)

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
            upload = {'href': f'{self.hub.cdn}/put/{wanted["oid"]}'}
            actions = {'upload': upload, 'verify': {'href': f'{self.hub.url}/{repo}.git/info/lfs/verify'}}
            objects.append({**wanted, **({} if wanted['oid'] in self.hub.objects else {'actions': actions})})
        self.send({'transfer': 'basic', 'objects': objects})

    @_route('PUT', '/put/(?P<oid>[0-9a-f]{64})')
    def put(self, oid: str) -> None:
        self.no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message='the content has another hash')
        self.hub.objects[oid] = self.body
        self.send(b'')

    @_route('POST', f'/{REPO}.git/info/lfs/verify')
    def verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted['oid'], b'')) != wanted['size']:
            raise _Refused(404, message='not uploaded')
        self.send({})

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
        self.send(_info(found, self.state(found, revision), 'blobs' in self.query))

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
        self.no_token()
        self.send(self.hub.objects[oid], headers={'ETag': f'"{oid}"'})


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    """What the API tells of a repo."""
    siblings = []
    for path, blob in commit.files.items():
        lfs = {'sha256': blob.sha256, 'size': len(blob.data), 'pointerSize': 134}
        more = {'size': len(blob.data), 'blobId': blob.oid, **({'lfs': lfs} if blob.lfs else {})}
        siblings.append({'rfilename': path, **(more if blobs else {})})
    card = repo.card()
    name = {'id': repo.id, 'modelId': repo.id, 'author': repo.id.partition('/')[0], 'sha': commit.oid}
    facts = {'private': repo.private, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0}
    return {**name, **facts, 'tags': card.get('tags') or [], 'cardData': card, 'siblings': siblings}


def _problems(card: str) -> list[str]:
    """What the Hub would say against a card's front matter."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f'not YAML: {error}']
    lists = {key: data.get(key, []) for key in ('tags', 'datasets', 'metrics')}
    problems = [
        f'"{key}" must be a list of texts'
        for key, value in lists.items()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value)
    ]
    for model in data.get('model-index', []):
        for result in model.get('results', [{}]):
            if not {'type'} <= set(result.get('task', {})) or not {'type', 'name'} <= set(result.get('dataset', {})):
                problems.append('"model-index" lacks a task or a dataset')
            if not all({'type', 'value'} <= set(metric) for metric in result.get('metrics', [])):
                problems.append('"model-index" lacks a metric')
    return problems
