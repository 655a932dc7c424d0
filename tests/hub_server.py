"""A Hub on loopback: the HTTP protocol of the Hugging Face Hub as the real huggingface_hub client speaks it.

It keeps repos with commits, branches, pull requests and large files in memory, knows users by their tokens, and
can be told to fail. Large files go by plain HTTP (a client's HF_HUB_DISABLE_XET=1), from another host name than the
API's, as on the real Hub: there no token may arrive. Or, with `xet`, by the client's own Xet transport and a folder.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

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
    parent: str = ''


@dataclass
class Repo:
    """A model repo."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def card(self) -> dict[str, Any]:
        """The front matter of its card."""
        head = self.at('main')
        text = head.files['README.md'].data.decode() if head and 'README.md' in head.files else ''
        return front_matter(text)


@dataclass
class Fault:
    """Something that goes wrong, so many times."""

    request: re.Pattern
    kind: int | str
    times: float


class Hub:
    """The server. Use it as a context manager.

    Attributes:
        repos: By id.
        users: Names by token; a token that is not here is refused.
        requests: '<method> <path>' of all that was asked, and the status that was answered.
        released: Lets requests that a fault holds up go on.
        reached: Set when a request is held up.
        errors: What this server itself did wrong.
        xet: The folder that stands for the Xet storage, which the client reads and writes itself.
        stored: What is expected to be uploaded to it: the Hub is told hashes, not contents.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users = {'hf_aliceAliceAliceAliceAlice': 'alice', 'hf_bobBobBobBobBobBobBobBob': 'bob'}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, int]] = []
        self.faults: list[Fault] = []
        self.released = threading.Event()
        self.reached = threading.Event()
        self.page = 1000
        self.xet: Path | None = None
        self.stored: list[bytes] = []
        self._count = itertools.count()
        self.errors: list[BaseException | None] = []
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), _handler(self))
        self._server.handle_error = lambda *_: self.errors.append(sys.exc_info()[1])  # type: ignore[method-assign]
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.cdn = f'http://localhost:{self.port}'

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, request: str, kind: int | str, times: float = float('inf')) -> None:
        """From now on, until `faults` is emptied, requests that match fail.

        Args:
            request: Regular expression searched for in '<method> <path>'.
            kind: A status; 'gated'; 'stall' (no content, but no end either), 'break' (the end in place of the
                content), 'truncate' (the end after half of it), 'corrupt' (other bytes of the same number), 'hold'
                (nothing is done until `released`).
            times: How often.
        """
        self.faults.append(Fault(re.compile(request), kind, times))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        """A new repo, with the one file that the Hub puts into it."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        self.commit(repo, 'main', 'initial commit', {'.gitattributes': Blob(b'*.safetensors filter=lfs\n')})
        return repo

    def commit(self, repo: Repo, ref: str, title: str, files: dict[str, Blob]) -> Commit:
        """Put a state of all files on a branch."""
        oid = hashlib.sha1(f'{repo.id} {ref} {next(self._count)}'.encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, title, files, repo.refs.get(ref, ''))
        repo.refs[ref] = oid
        return commit

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


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The class that answers for a hub."""
    routes: list[tuple[str, re.Pattern, Callable]] = []

    def route(method: str, pattern: str) -> Callable:
        def keep(function: Callable) -> Callable:
            routes.append((method, re.compile(pattern), function))
            return function

        return keep

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *_: Any) -> None:
            pass

        def do(self) -> None:
            parts = urlsplit(self.path)
            self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            self.name = f'{self.command} {unquote(parts.path)}'
            self.body = self._read()
            self.fault = ''
            try:
                self._suffer()
                method = 'GET' if self.command == 'HEAD' else self.command
                for wanted, pattern, function in routes:
                    match = pattern.fullmatch(parts.path)
                    if wanted == method and match:
                        return function(
                            self, **{key: unquote(value) for key, value in match.groupdict().items() if value}
                        )
                raise _Refused(404, message='no such route')
            except _Refused as refused:
                headers = {'X-Error-Code': refused.code, 'X-Error-Message': refused.message}
                headers |= {'Retry-After': '0'} if refused.status in (429, 500, 502, 503, 504) else {}
                self.send({'error': refused.message}, refused.status, {k: v for k, v in headers.items() if v})
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

        def _read(self) -> bytes:
            if self.headers.get('Transfer-Encoding') == 'chunked':
                chunks = []
                while size := int(self.rfile.readline().split(b';')[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b''.join(chunks)
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))

        def _suffer(self) -> None:
            for fault in hub.faults:
                if fault.times > 0 and fault.request.search(self.name):
                    fault.times -= 1
                    if isinstance(fault.kind, int):
                        codes = {404: 'EntryNotFound'}
                        raise _Refused(fault.kind, codes.get(fault.kind, ''), f'told to answer {fault.kind}')
                    if fault.kind == 'gated':
                        raise _Refused(403, 'GatedRepo', 'Access to this model is restricted.')
                    if fault.kind == 'hold':
                        hub.reached.set()
                        hub.released.wait(60)
                    self.fault = str(fault.kind)

        def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            """Answer with bytes, or with JSON."""
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            hub.requests.append((self.name, status))
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if 'Content-Length' not in (headers or {}):
                self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            if self.command == 'HEAD':
                return
            if self.fault in ('stall', 'break', 'truncate'):
                self.wfile.write(data[: len(data) // 2] if self.fault == 'truncate' else b'')
                self.wfile.flush()
                if self.fault == 'stall':
                    hub.released.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(bytes(255 - byte for byte in data) if self.fault == 'corrupt' else data)

        def user(self) -> str:
            """Who asks, or an empty text."""
            token = self.headers.get('Authorization', '').removeprefix('Bearer ')
            if token and token not in hub.users:
                raise _Refused(401, message='Invalid credentials in Authorization header')
            return hub.users.get(token, '')

        def repo(self, repo_id: str, write: bool = False) -> Repo:
            """The repo, if the one who asks may read or write it."""
            user = self.user()
            repo = hub.repos.get(repo_id)
            owner = repo_id.partition('/')[0]
            if repo is None or (repo.private and user != owner):
                raise _Refused(404 if user else 401, 'RepoNotFound', 'Repository not found')
            if write and user != owner:
                raise _Refused(403 if user else 401, message='You have no right to write here')
            return repo

        def state(self, repo: Repo, revision: str) -> Commit:
            commit = repo.at(revision)
            if commit is None:
                raise _Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
            return commit

    @route('GET', '/api/whoami-v2')
    def whoami(self: Handler) -> None:
        user = self.user()
        if not user:
            raise _Refused(401, message='Invalid credentials in Authorization header')
        self.send({'type': 'user', 'name': user, 'auth': {'accessToken': {'role': 'write'}}})

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self: Handler) -> None:
        problems = _problems(json.loads(self.body)['content'])
        self.send({'errors': [{'message': p} for p in problems], 'warnings': []}, 400 if problems else 200)

    @route('POST', '/api/repos/create')
    def create(self: Handler) -> None:
        asked, user = json.loads(self.body), self.user()
        repo_id = f'{asked.get("organization") or user}/{asked["name"]}'
        if not user or user != repo_id.partition('/')[0]:
            raise _Refused(403 if user else 401, message='You have no right to create this repo')
        answer = {'url': f'{hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in hub.repos:
            self.send({**answer, 'error': 'You already created this model repo'}, 409)
        else:
            hub.create(repo_id, asked.get('private') is True or asked.get('visibility') == 'private')
            self.send(answer)

    @route('POST', f'/api/models/{REPO}/branch/(?P<branch>[^/]+)')
    def branch(self: Handler, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        if branch in found.refs:
            raise _Refused(409, message='Reference already exists')
        found.refs[branch] = found.refs['main']
        self.send({})

    @route('POST', f'/api/models/{REPO}/preupload/(?P<revision>[^/]+)')
    def preupload(self: Handler, repo: str, revision: str) -> None:
        found = self.repo(repo, write='create_pr' not in self.query)
        files = self.state(found, revision).files
        answers = []
        for file in json.loads(self.body)['files']:
            binary = b'\0' in base64.b64decode(file['sample'])
            old = files.get(file['path'])
            answers.append(
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if binary or file['path'].endswith('.safetensors') else 'regular',
                    'shouldIgnore': False,
                    **({'oid': old.etag} if old else {}),
                }
            )
        self.send({'files': answers})

    @route('POST', f'/{REPO}.git/info/lfs/objects/batch')
    def batch(self: Handler, repo: str) -> None:
        self.repo(repo)
        asked, objects = json.loads(self.body), []
        if hub.xet and 'xet' in asked['transfers']:  # older clients ask here which transport to use
            return self.send({'transfer': 'xet', 'objects': asked['objects']})
        for wanted in asked['objects']:
            action = {'href': f'{hub.cdn}/put/{wanted["oid"]}'}
            verify = {'href': f'{hub.url}/{repo}.git/info/lfs/verify'}
            there = wanted['oid'] in hub.objects
            objects.append({**wanted, **({} if there else {'actions': {'upload': action, 'verify': verify}})})
        self.send({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/put/(?P<oid>[0-9a-f]{64})')
    def put(self: Handler, oid: str) -> None:
        self.no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message='the content has another hash')
        hub.objects[oid] = self.body
        self.send(b'')

    @route('POST', f'/{REPO}.git/info/lfs/verify')
    def verify(self: Handler, repo: str) -> None:
        wanted = json.loads(self.body)
        if len(hub.objects.get(wanted['oid'], b'')) != wanted['size']:
            raise _Refused(404, message='not uploaded')
        self.send({})

    @route('GET', f'/api/models/{REPO}/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)')
    def xet_token(self: Handler, repo: str, kind: str, revision: str) -> None:
        self.repo(repo, write=kind == 'write')
        until = str(int(time.time()) + 3600)
        answer = {'X-Xet-Cas-Url': f'local://{hub.xet}', 'X-Xet-Access-Token': 'x', 'X-Xet-Token-Expiration': until}
        self.send({'casUrl': f'local://{hub.xet}', 'exp': int(until), 'accessToken': 'x'}, headers=answer)

    @route('POST', f'/api/models/{REPO}/commit/(?P<revision>[^/]+)')
    def commit(self: Handler, repo: str, revision: str) -> None:
        create_pr = self.query.get('create_pr') == '1'
        found = self.repo(repo, write=not create_pr)
        if not self.user():
            raise _Refused(401, message='You must be logged in')
        files = dict(self.state(found, revision).files)
        title = ''
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                title = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']))
            elif item['key'] == 'lfsFile':
                hub.objects.update((hashlib.sha256(data).hexdigest(), data) for data in hub.stored if hub.xet)
                if value['oid'] not in hub.objects:
                    raise _Refused(400, message=f'{value["path"]} was not uploaded')
                files[value['path']] = Blob(hub.objects[value['oid']], lfs=True)
            else:
                raise _Refused(400, message=f'{item["key"]} is not expected')
        ref = f'refs/pr/{sum(r.startswith("refs/pr/") for r in found.refs) + 1}' if create_pr else revision
        made = hub.commit(found, ref, title, files)
        url = f'{hub.url}/{repo}'
        pull = f'{url}/discussions/{ref.rpartition("/")[2]}' if create_pr else None
        self.send({'commitUrl': f'{url}/commit/{made.oid}', 'commitOid': made.oid, 'pullRequestUrl': pull})

    @route('GET', f'/api/models/{REPO}(/revision/(?P<revision>[^/]+))?')
    def info(self: Handler, repo: str, revision: str = 'main') -> None:
        found = self.repo(repo)
        self.send(_info(found, self.state(found, revision), 'blobs' in self.query))

    @route('GET', '/api/models')
    def listing(self: Handler) -> None:
        user, query = self.user(), self.query
        visible = [r for r in hub.repos.values() if not r.private or r.id.partition('/')[0] == user]
        visible = [r for r in visible if query.get('author') in (None, r.id.partition('/')[0])]
        visible = [r for r in visible if query.get('search', '') in r.id]
        visible = [r for r in visible if query.get('filter') in (None, *(r.card().get('tags') or []))]
        start = int(query.get('cursor', 0))
        page = visible[start : start + hub.page]
        headers = {}
        if start + hub.page < len(visible):
            rest = '&'.join(f'{k}={quote(v)}' for k, v in query.items() if k != 'cursor')
            headers = {'Link': f'<{hub.url}/api/models?{rest}&cursor={start + hub.page}>; rel="next"'}
        self.send([_info(r, self.state(r, 'main'), False) for r in page], headers=headers)

    @route('GET', f'/api/models/{REPO}/tree/(?P<revision>[^/]+)')
    def tree(self: Handler, repo: str, revision: str) -> None:
        files = self.state(self.repo(repo), revision).files
        self.send([{'type': 'file', 'path': p, 'size': len(b.data), 'oid': b.oid} for p, b in files.items()])

    @route('GET', f'/api/models/{REPO}/refs')
    def refs(self: Handler, repo: str) -> None:
        found = self.repo(repo)
        branches = [
            {'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': oid}
            for name, oid in found.refs.items()
            if not name.startswith('refs/pr/')
        ]
        self.send({'branches': branches, 'tags': [], 'converts': []})

    @route('GET', f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
    def resolve(self: Handler, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        if found.gated and self.user() != repo.partition('/')[0]:
            raise _Refused(403, 'GatedRepo', 'Access to this model is restricted.')
        state = self.state(found, revision)
        blob = state.files.get(path)
        if blob is None:
            raise _Refused(404, 'EntryNotFound', 'Entry not found')
        headers = {'X-Repo-Commit': state.oid, 'ETag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes'}
        if blob.lfs:
            hub.objects.setdefault(blob.sha256, blob.data)
            headers |= {'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(len(blob.data))}
            if hub.xet:
                token = f'{hub.url}/api/models/{repo}/xet-read-token/{state.oid}'
                headers |= {'X-Xet-Hash': _xet_hash(blob.data), 'Link': f'<{token}>; rel="xet-auth"'}
            self.send(b'', 302, {**headers, 'Location': f'{hub.cdn}/get/{blob.sha256}/{repo}/{path}'})
        else:
            self.content(blob.data, headers)

    @route('GET', '/get/(?P<oid>[0-9a-f]{64})/(?P<name>.+)')
    def get(self: Handler, oid: str, name: str) -> None:
        self.no_token()
        self.content(hub.objects[oid], {'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'})

    def content(self: Handler, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that was asked for."""
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not match:
            return self.send(data, 200, {**headers, 'Content-Length': str(len(data))})
        first, last = int(match[1]), int(match[2] or len(data) - 1)
        part = data[first : last + 1]
        ranged = {'Content-Range': f'bytes {first}-{first + len(part) - 1}/{len(data)}'}
        self.send(part, 206, {**headers, **ranged, 'Content-Length': str(len(part))})

    def no_token(self: Handler) -> None:
        if self.headers.get('Authorization'):
            raise _Refused(400, message='a token was sent to the storage')

    Handler.content, Handler.no_token = content, no_token  # type: ignore[attr-defined]
    return Handler


def _xet_hash(data: bytes) -> str:
    """Xet's name for a content."""
    import hf_xet

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return hf_xet.hash_files([file.name])[0].hash


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    """What the API tells of a repo."""
    siblings = []
    for path, blob in commit.files.items():
        lfs = {'sha256': blob.sha256, 'size': len(blob.data), 'pointerSize': 134}
        more = {'size': len(blob.data), 'blobId': blob.oid, **({'lfs': lfs} if blob.lfs else {})}
        siblings.append({'rfilename': path, **(more if blobs else {})})
    card = repo.card()
    tags = [*(card.get('tags') or []), *([f'license:{card["license"]}'] if card.get('license') else [])]
    return {
        '_id': hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        'id': repo.id,
        'modelId': repo.id,
        'author': repo.id.partition('/')[0],
        'sha': commit.oid,
        'private': repo.private,
        'gated': 'manual' if repo.gated else False,
        'disabled': False,
        'downloads': 0,
        'likes': 0,
        'tags': tags,
        'cardData': card,
        'siblings': siblings,
    }


def _problems(card: str) -> list[str]:
    """What the Hub would say against a card's front matter."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f'not YAML: {error}']
    problems = []
    for key in ('tags', 'datasets', 'metrics'):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f'"{key}" must be a list of texts')
    for key in ('license', 'library_name', 'pipeline_tag'):
        if not isinstance(data.get(key, ''), str):
            problems.append(f'"{key}" must be a text')
    for model in data.get('model-index', []):
        for result in model.get('results', [{}]):
            if not {'type'} <= set(result.get('task', {})) or not {'type', 'name'} <= set(result.get('dataset', {})):
                problems.append('"model-index" lacks a task or a dataset')
            if not all({'type', 'value'} <= set(metric) for metric in result.get('metrics', [])):
                problems.append('"model-index" lacks a metric')
    return problems
