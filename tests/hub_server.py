"""A small Hugging Face Hub on the loopback address, for the real huggingface_hub client, with faults to switch on.

It answers what the client asks to download files (`/{repo}/resolve/{revision}/{file}`) and to publish them (create,
preupload, LFS, commit), and keeps everything in memory. Point HF_ENDPOINT at `HubServer.endpoint`, or use `connected`.
"""
import base64
import contextlib
import hashlib
import importlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml

GARBAGE = b'<html>This is not the file that you asked for.</html>'


@dataclass
class Repository:
    """Commits of a repository, and the branches, tags and pull requests that point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], revision: str = 'main', base: str | None = None) -> str:
        """Add a commit on top of a revision, and move the revision to it.

        Returns:
            The commit's hash.
        """
        tree = dict(self.commits.get(self.refs.get(base or revision, ''), {}))
        tree.update(files)
        sha = hashlib.sha1(repr((len(self.commits), sorted(tree.items()))).encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[revision] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit's hash of a branch, tag or hash."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """Something that goes wrong with the requests that a pattern matches.

    Actions: a status code to answer; `refuse` closes the connection without an answer; `cut` sends half of the body and
    closes it; `die` does so and takes the whole server down; `short` sends half of the body as if it were all of it;
    `garbage` sends another body of the same length under the same ETag.
    """

    pattern: str
    action: int | str
    times: int = 10 ** 6

    def matches(self, line: str) -> bool:
        """Whether the fault strikes the request `METHOD path`; counts its strikes."""
        if self.times < 1 or not re.search(self.pattern, line):
            return False
        self.times -= 1
        return True


class HubServer:
    """The server: `repositories`, `faults` and `tokens` may be changed at any time, `requests` is what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()
        self.start()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f'http://127.0.0.1:{self._port}'

    def start(self) -> None:
        """Listen, on the same port as before."""
        hub = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def process_request_thread(self, request, client_address) -> None:
                hub._connections.add(request)
                super().process_request_thread(request, client_address)
                hub._connections.discard(request)

            def handle_error(self, request, client_address) -> None:
                pass  # the client went away, or the server was stopped: both are meant

        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = Server(('127.0.0.1', self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close every connection and refuse new ones."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = 'main', **access: bool) -> str:
        """Make a commit, and the repository if there is none.

        Returns:
            The commit's hash.
        """
        repository = self.repositories.setdefault(repo_id, Repository(**access))
        return repository.commit(files, revision, base='main')

    def fail(self, pattern: str, action: int | str, times: int = 10 ** 6) -> None:
        """Switch a fault on, see :class:`Fault`."""
        self.faults.append(Fault(pattern, action, times))

    def downloads(self) -> list[str]:
        """The requests for a file's body."""
        return [line for line in self.requests if line.startswith('GET ') and '/resolve/' in line]


@contextlib.contextmanager
def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that this process's huggingface_hub asks, an empty cache, no token and no waiting between attempts."""
    server = HubServer()
    settings = {
        'ENDPOINT': server.endpoint,
        'HUGGINGFACE_CO_URL_TEMPLATE': server.endpoint + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(tmp_path / 'hub'),
        'HF_TOKEN_PATH': str(tmp_path / 'token'),
        'HF_HUB_DISABLE_XET': True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)
        # versions before 1.0 hold copies
        for module in ('file_download', 'hf_api', 'lfs', '_commit_api'):
            if hasattr(importlib.import_module(f'huggingface_hub.{module}'), name):
                monkeypatch.setattr(f'huggingface_hub.{module}.{name}', value)
    for variable in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(variable, raising=False)
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.)
    monkeypatch.setattr('huggingface_hub.file_download.time', impatient)
    monkeypatch.setattr('huggingface_hub.utils._http.time', impatient)
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield server
    finally:
        huggingface_hub.utils.enable_progress_bars()
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    timeout = 20

    def log_message(self, format: str, *args) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        line = f'{self.command} {path}'
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            self.body = self._read_chunks()
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = next((fault for fault in self.hub.faults if fault.matches(line)), None)
        self.action = fault.action if fault else None
        if isinstance(self.action, int):
            self._error(self.action, f'Fault {self.action}')
            return
        if self.action == 'refuse':
            self._hang_up()
            return
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                with self.hub.lock:
                    response = answer(self, **match.groupdict())
                response()
                return
        self._error(404, f'No such address: {line}')

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    # answers: each returns what sends it, so that the lock is not held while sending

    def _resolve(self, repo: str, revision: str, file: str):
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self._user() is None):
            # the Hub does not tell strangers whether a repository exists
            return self._refusal(401 if self._user() is None else 404, 'RepoNotFound', 'Repository not found')
        if repository.gated and self._user() is None:
            return self._refusal(401, 'GatedRepo', f'Access to model {repo} is restricted.')
        sha = repository.find(revision)
        if sha is None:
            return self._refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        commit = {'X-Repo-Commit': sha}
        content = repository.commits[sha].get(file)
        if content is None:
            return self._refusal(404, 'EntryNotFound', 'Entry not found', commit)
        return lambda: self._send_file(content, commit)

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        etag = hashlib.sha256(content).hexdigest()
        if self.action == 'garbage':
            content = (GARBAGE * (len(content) // len(GARBAGE) + 1))[:len(content)]
        status = 200
        span = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if span:
            status, start, size = 206, int(span[1]), len(content)
            headers = {**headers, 'Content-Range': f'bytes {start}-{size - 1}/{size}'}
            content = content[start:]
        if self.action == 'short' and self.command == 'GET':
            content = content[:len(content) // 2]
        headers = {**headers, 'ETag': f'"{etag}"', 'Content-Type': 'application/octet-stream'}
        self._send(status, content, headers)

    def _create(self):
        user = self._user()
        if user is None:
            return self._refusal(401, None, 'Invalid username or password.')
        request = json.loads(self.body)
        owner = request.get('organization') or user
        if owner != user:
            return self._refusal(403, None, f'You have no write access to {owner}')
        repo = f"{owner}/{request['name']}"
        answer = {'url': f'{self.hub.endpoint}/{repo}', 'name': repo, 'id': repo}
        if repo in self.hub.repositories:
            return lambda: self._json(answer | {'error': 'You already created this model repo'}, 409)
        private = request.get('private') or request.get('visibility') == 'private'
        self.hub.repositories[repo] = Repository(private=bool(private))
        self.hub.repositories[repo].commit({'.gitattributes': b'*.safetensors filter=lfs\n'})
        return lambda: self._json(answer)

    def _whoami(self):
        user = self._user()
        if user is None:
            return self._refusal(401, None, 'Invalid credentials in Authorization header')
        return lambda: self._json({'name': user, 'type': 'user', 'orgs': []})

    def _validate_yaml(self):
        content = json.loads(self.body)['content']
        front = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
        try:
            metadata = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            message = str(error)
            return lambda: self._json({'errors': [{'message': message}], 'warnings': []}, 400)
        warnings = [] if isinstance(metadata, dict) else [{'message': 'empty or missing yaml metadata'}]
        return lambda: self._json({'errors': [], 'warnings': warnings})

    def _info(self, repo: str, revision: str = 'main'):
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self._user() is None):
            return self._refusal(401 if self._user() is None else 404, 'RepoNotFound', 'Repository not found')
        sha = repository.find(revision)
        if sha is None:
            return self._refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        files = [{'rfilename': name} for name in sorted(repository.commits[sha])]
        return lambda: self._json({
            '_id': sha, 'id': repo, 'modelId': repo, 'sha': sha, 'private': repository.private, 'siblings': files,
            'downloads': 0, 'likes': 0, 'tags': [], 'disabled': False, 'gated': False,
        })

    def _branch(self, repo: str, branch: str):
        refusal, repository = self._writable(repo)
        if refusal:
            return refusal
        if branch in repository.refs:
            return self._refusal(409, None, f'Reference already exists: {branch}')
        repository.refs[branch] = repository.refs['main']
        return lambda: self._json({})

    def _preupload(self, repo: str, revision: str):
        refusal, repository = self._writable(repo, revision)
        if refusal:
            return refusal
        tree = repository.commits[repository.find(revision) or '']
        answer = []
        for file in json.loads(self.body)['files']:
            large = file['path'].endswith(('.safetensors', '.bin')) or file['size'] > 10 ** 7
            content = tree.get(file['path'])
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else _git_oid(content)
            answer.append({
                'path': file['path'], 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False, 'oid': oid,
            })
        return lambda: self._json({'files': answer})

    def _lfs_batch(self, repo: str):
        refusal, _ = self._writable(repo)
        if refusal:
            return refusal
        answer = []
        for item in json.loads(self.body)['objects']:
            upload = {'upload': {'href': f"{self.hub.endpoint}/lfs/{item['oid']}", 'header': {}}}
            known = item['oid'] in self.hub.objects
            answer.append({'oid': item['oid'], 'size': item['size']} | ({} if known else {'actions': upload}))
        return lambda: self._json({'transfer': 'basic', 'objects': answer}, content_type='application/vnd.git-lfs+json')

    def _lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refusal(400, None, 'The content does not match its hash')
        self.hub.objects[oid] = self.body
        return lambda: self._json({})

    def _commit(self, repo: str, revision: str):
        refusal, repository = self._writable(repo, revision)
        if refusal:
            return refusal
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'header':
                repository.messages.append(value['summary'])
            elif entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
            else:
                return self._refusal(400, None, f"No such operation: {entry['key']}")
        request = None
        if self.query.get('create_pr'):
            request = f'refs/pr/{sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1}'
        sha = repository.commit(files, request or revision, base=revision)
        url = f'{self.hub.endpoint}/{repo}'
        return lambda: self._json({
            'commitUrl': f'{url}/commit/{sha}', 'commitOid': sha, 'success': True,
            'pullRequestUrl': f"{url}/discussions/{request.split('/')[-1]}" if request else None,
        })

    def _writable(self, repo: str, revision: str = 'main'):
        repository = self.hub.repositories.get(repo)
        if self._user() is None:
            return self._refusal(401, None, 'Invalid credentials in Authorization header'), None
        if repository is None:
            return self._refusal(404, 'RepoNotFound', 'Repository not found'), None
        if repository.find(revision) is None:
            return self._refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}'), None
        # anybody may propose, only the owner may change
        proposes = self.query.get('create_pr') or '/info/lfs/' in self.path
        if not proposes and repo.split('/')[0] != self._user():
            return self._refusal(403, None, f'You have no write access to {repo}'), None
        return None, repository

    def _user(self) -> str | None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        return self.hub.tokens.get(token)

    # sending

    def _refusal(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None):
        headers = dict(headers or {}, **{'X-Error-Message': message})
        if code:
            headers['X-Error-Code'] = code
        return lambda: self._error(status, message, headers)

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._json({'error': message}, status, headers)

    def _json(
            self,
            answer: dict,
            status: int = 200,
            headers: dict[str, str] | None = None,
            content_type: str = 'application/json',
    ) -> None:
        self._send(status, json.dumps(answer).encode(), {'Content-Type': content_type, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.action in ('cut', 'die'):
            self.wfile.write(content[:len(content) // 2])
            self._hang_up()
        else:
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        if self.action == 'die':
            self.hub.stop()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_ROUTES = (
    ('GET HEAD', rf'/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)', _Handler._resolve),
    ('POST', r'/api/repos/create', _Handler._create),
    ('GET', r'/api/whoami-v2', _Handler._whoami),
    ('POST', r'/api/validate-yaml', _Handler._validate_yaml),
    ('GET', rf'/api/models/{_REPO}', _Handler._info),
    ('GET', rf'/api/models/{_REPO}/revision/(?P<revision>.+)', _Handler._info),
    ('POST', rf'/api/models/{_REPO}/branch/(?P<branch>.+)', _Handler._branch),
    ('POST', rf'/api/models/{_REPO}/preupload/(?P<revision>.+)', _Handler._preupload),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', _Handler._lfs_batch),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', _Handler._lfs_put),
    ('POST', rf'/api/models/{_REPO}/commit/(?P<revision>.+)', _Handler._commit),
)
