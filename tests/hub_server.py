"""A Hugging Face Hub on this machine, as far as huggingface_hub's own client needs one to push and to download a model.

Over HTTP on 127.0.0.1 it speaks what the client asks of a repository of models: create it and its branches, validate the
card, decide which files are large (preupload), take those by the LFS batch protocol with their sha256, take a commit, list a
commit's tree and serve its files. Large files lie at another address (another port), which must not get the token. Writing
needs the token; so does reading a private repository. As on the Hub, a commit that names a large file which has not arrived
is refused. The Xet protocol is not spoken: the client must run with HF_HUB_DISABLE_XET=1 (`HubServer.environment` says so),
and then takes the plain LFS way. Nothing of the client is replaced.

    with hub_server() as hub: ...                    # `hub.environment()` is what the client finds it by
    hub.faults["PUT"] = Fault(times=1, cut=True)     # the next upload of a large file breaks off in its middle
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_LoopbackTokenAsLongAsARealOne0001"
SIGNATURE = "c2lnbmVkLXVybC1pcy1hLXNlY3JldC10b28"  # of an upload's address, which whoever has it may write to
LARGE = (".safetensors", ".parquet")


@dataclass
class Fault:
    """How requests of one kind fail: by a status with a message, or by a connection cut after half of the body."""

    times: int = 1
    status: int = 503
    message: str = "out of order"
    cut: bool = False


@dataclass
class File:
    """One file of a commit; `sha256` where it came as a large one."""

    content: bytes
    sha256: str | None

    @property
    def oid(self) -> str:
        """Git's name for the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Commits by their hash, and the branches that name them."""

    private: bool
    commits: dict[str, dict[str, File]]
    branches: dict[str, str]

    def find(self, revision: str) -> str | None:
        """Commit of a revision, or None."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class HubServer:
    """A running server and everything it holds; `requests` has a line ``METHOD PATH`` for each it got."""

    endpoint: str = ""
    storage_endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    told_storage: list[str] = field(default_factory=list)
    """Requests to the storage that brought credentials along."""
    faults: dict[str, Fault] = field(default_factory=dict)
    """By what the line of a request begins with or contains."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Variables with which a new process finds the server, with an empty cache in `home`."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Names and contents of a revision's files, as they lie on the server."""
        repository = self.repositories.get(repo_id)
        commit = repository.find(revision) if repository else None
        return (
            {name: file.content for name, file in repository.commits[commit].items()} if repository and commit else {}
        )


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server without repositories; it ends with the block."""
    hub = HubServer()
    handler = type("_BoundHandler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.endpoint, hub.storage_endpoint = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True  # a client may keep its connection open
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class _Refusal(Exception):
    """An answer that is an error, with the header by which the client tells what kind."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        line = f"{self.command} {unquote(parts.path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            if "/storage/" in line and "Authorization" in self.headers:
                self.hub.told_storage.append(line)
            fault = next((f for key, f in self.hub.faults.items() if key in line and f.times > 0), None)
            if fault is not None:
                fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        try:
            if fault is not None:
                raise _Refusal(fault.status, fault.message)
            with self.hub.lock:
                for pattern, method in _ROUTES:
                    found = re.fullmatch(pattern, line)
                    if found:
                        method(self, *found.groups(), body=body, query=parse_qs(parts.query))
                        return
            raise _Refusal(404, "no such page")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, {"error": str(refusal)}, headers)

    def _send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ----- who may

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, "Invalid username or password.")

    def _repository(self, repo_id: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self._require_token()
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ----- pages

    def create(self, body: bytes, query: dict[str, Any]) -> None:
        self._require_token()
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'someone'}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            self._send(409, answer | {"error": "You already created this model repo"})
            return
        start = hashlib.sha1(repo_id.encode(), usedforsecurity=False).hexdigest()
        private = asked.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private, {start: {}}, {"main": start})
        self._send(200, answer)

    def branch(self, repo_id: str, name: str, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id, write=True)
        if name in repository.branches:
            raise _Refusal(409, "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self._send(200, {})

    def validate_yaml(self, body: bytes, query: dict[str, Any]) -> None:
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as error:
            data, errors = None, [{"message": str(error)}]
        if isinstance(data, dict):
            errors += [
                {"message": f'"{key}" must be a string'}
                for key in ("license", "library_name", "pipeline_tag")
                if not isinstance(data.get(key, ""), str)
            ]
            if not all(isinstance(tag, str) for tag in data.get("tags", [])):
                errors.append({"message": '"tags" must be strings'})
        warnings = (
            [] if isinstance(data, dict) or errors else [{"message": "empty or missing yaml metadata in repo card"}]
        )
        self._send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def preupload(self, repo_id: str, revision: str, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id, write=True)
        files = repository.commits[self._commit_of(repository, revision)]
        answer = []
        for asked in json.loads(body)["files"]:
            name = asked["path"]
            held = files.get(name)
            oid = None if held is None else held.sha256 or held.oid
            mode = "lfs" if name.endswith(LARGE) else "regular"
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def lfs_batch(self, repo_id: str, body: bytes, query: dict[str, Any]) -> None:
        self._repository(repo_id, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                href = f"{self.hub.storage_endpoint}/storage/{asked['oid']}?X-Amz-Signature={SIGNATURE}"
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": {"href": href}, "verify": verify}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, query: dict[str, Any]) -> None:
        if query.get("X-Amz-Signature") != [SIGNATURE]:
            raise _Refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "XAmzContentSHA256Mismatch")
        self.hub.large[oid] = body
        self._send(200, b"")

    def lfs_verify(self, repo_id: str, body: bytes, query: dict[str, Any]) -> None:
        self._repository(repo_id, write=True)
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "the object has not arrived")
        self._send(200, {})

    def commit(self, repo_id: str, revision: str, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id, write=True)
        if revision not in repository.branches:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[revision]])
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), None)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(self.hub.large[value["oid"]], value["oid"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        oid = hashlib.sha1(f"{repo_id}{len(self.hub.requests)}".encode(), usedforsecurity=False).hexdigest()
        repository.commits[oid] = files
        repository.branches[revision] = oid
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def info(self, repo_id: str, revision: str | None, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id)
        commit = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        self._send(200, {"_id": "0", "id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id)
        entries = []
        for name, file in repository.commits[self._commit_of(repository, revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
            entries.append(entry)
        self._send(200, entries)

    def resolve(self, repo_id: str, revision: str, name: str, body: bytes, query: dict[str, Any]) -> None:
        repository = self._repository(repo_id)
        commit = self._commit_of(repository, revision)
        file = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        if file.sha256 is None:
            self._send(200, file.content, headers | {"ETag": f'"{file.oid}"', "Content-Type": "text/plain"})
            return
        # A large file lies elsewhere; what it is stands in the headers of the redirection
        headers |= {
            "X-Linked-ETag": f'"{file.sha256}"',
            "X-Linked-Size": str(len(file.content)),
            "Location": f"{self.hub.storage_endpoint}/storage/{file.sha256}",
        }
        self._send(302, b"", headers)

    def storage(self, oid: str, body: bytes, query: dict[str, Any]) -> None:
        self._send(200, self.hub.large[oid], {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"POST /{_REPO}\.git/info/lfs/objects/verify", _Handler.lfs_verify),
    (r"PUT /storage/([0-9a-f]{64})", _Handler.lfs_put),
    (r"(?:GET|HEAD) /storage/([0-9a-f]{64})", _Handler.storage),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(.+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
