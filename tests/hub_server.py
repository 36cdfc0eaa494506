"""A small hub on loopback that speaks the real client's protocol: repositories at commits, tokens, and faults.

Of the Hugging Face hub it has what huggingface_hub and datasets ask for: the commit of a revision, listings of files,
and files, each with HEAD and GET. Files above `LARGE` bytes and weights are answered as the hub does: by a redirect to
another host, which gets no token and sends any part that is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

LARGE = 100_000  # bytes
LONG = 20  # seconds of a stall
ADDRESS = re.compile(r"/api/(models|datasets)/([^/]+(?:/[^/]+?)?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.*)")


@dataclass
class Repository:
    """Files by commit; the last commit is `main`. `token`: who does not send it is refused, as `refusal` says."""

    commits: dict[str, dict[str, bytes]]
    token: str | None = None
    refusal: str = "GatedRepo"  # or RepoNotFound, which the hub says of a private one


@dataclass
class Fault:
    """What goes wrong with the next `times` answers to requests whose path holds `path`."""

    path: str
    kind: str  # silence, stall, truncate, corrupt, or an HTTP status
    times: int = 10**9
    method: str = "GET"


@dataclass
class Hub:
    """A hub that answers at `endpoint`; `asked` holds method, path and authorization of every request."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # parts of files that were asked for
    tokens: set[str] | None = None  # those that are known: who sends another is refused everything; None: any is
    endpoint: str = ""
    closed: threading.Event = field(default_factory=threading.Event)

    def add(self, kind: str, name: str, files: dict[str, bytes] | Path, token: str | None = None) -> str:
        """Add a commit to a repository (kind: models or datasets) and return its 40 digits, which name its content."""
        if isinstance(files, Path):
            paths = (file for file in sorted(files.rglob("*")) if file.is_file())
            files = {str(file.relative_to(files)): file.read_bytes() for file in paths}
        digest = hashlib.sha1(name.encode())
        for path, content in files.items():
            digest.update(path.encode() + content)
        self.repositories.setdefault((kind, name), Repository({}, token)).commits[digest.hexdigest()] = files
        return digest.hexdigest()

    def downloads(self) -> list[str]:
        """Return the paths of the files that were sent, the redirected ones by their checksum."""
        return [path for method, path, _ in self.asked if method == "GET" and ("/resolve/" in path or "/cdn/" in path)]


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Yield a hub that is served until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads, server.block_on_close = True, False
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

    def answer(self, form: dict[str, list[str]] | None = None) -> None:
        path, _, query = self.path.partition("?")
        path = unquote(path)
        self.hub.asked.append((self.command, path, self.headers.get("Authorization")))
        self.fault = self.take_fault(path)
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.fault == "silence":
            self.hub.closed.wait(LONG)
            self.close_connection = True
        elif sent and self.hub.tokens is not None and sent not in self.hub.tokens:
            self.reply(b"", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self.fault.isdigit():
            self.reply(b"", int(self.fault), {"Retry-After": "0"})
        elif path.startswith("/cdn/"):
            self.send_large(path)
        elif (found := FILE.fullmatch(path)) is not None:
            self.send_file("datasets" if found[1] else "models", *found.groups()[1:])
        elif (found := ADDRESS.fullmatch(path)) is not None:
            self.describe(found, parse_qs(query), form)
        else:
            self.refuse(404, "RepoNotFound")

    def take_fault(self, path: str) -> str:
        for fault in self.hub.faults:
            if self.command == fault.method and fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault.kind
        return ""

    def repository(self, kind: str, name: str, revision: str, files: bool) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit of a revision and its files; None, once refused, for what there is not.

        Anyone may list a gated repository; its `files` are refused.
        """
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        known = repository.token is None or self.headers.get("Authorization") == f"Bearer {repository.token}"
        if not known and (files or repository.refusal != "GatedRepo"):
            return self.refuse(401, repository.refusal)
        commit = list(repository.commits)[-1] if revision == "main" else revision
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def describe(self, found: re.Match, query: dict, form: dict | None) -> None:
        kind, name, what, revision, folder = found.groups()
        repository = self.repository(kind, name, revision or "main", files=False)
        if repository is None:
            return
        commit, files = repository
        if what == "tree":
            self.send_json(listing(files, folder or "", "recursive" in query and query["recursive"] != ["false"]))
        elif what == "paths-info":
            wanted = (form or {}).get("paths", [])
            self.send_json([entry(path, files[path]) for path in wanted if path in files])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def send_file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name, revision, files=True)
        if repository is None:
            return
        commit, files = repository
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self.refuse(404, "EntryNotFound", headers)
        elif large(path, files[path]):
            digest = hashlib.sha256(files[path]).hexdigest()
            port = self.hub.endpoint.rpartition(":")[2]
            headers |= {"X-Linked-Size": str(len(files[path])), "X-Linked-ETag": f'"{digest}"'}
            self.reply(b"", 302, headers | {"Location": f"http://localhost:{port}/cdn/{digest}/{path}"})
        else:
            self.reply(files[path], 200, headers | {"ETag": f'"{git_oid(files[path])}"'})

    def send_large(self, path: str) -> None:
        digest = path.split("/")[2]
        stored = (f for one in self.hub.repositories.values() for files in one.commits.values() for f in files.values())
        content = next((one for one in stored if hashlib.sha256(one).hexdigest() == digest), b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            self.hub.ranges.append(asked[0])
            span = f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"
            self.reply(content[int(asked[1]) :], 206, {"Content-Range": span})
        else:
            self.reply(content, 200, {})

    def send_json(self, value: object) -> None:
        self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.reply(b"", status, {**(headers or {}), "X-Error-Code": code})

    def reply(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not content:
            return
        if self.fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        with contextlib.suppress(OSError):  # the client may have gone
            self.wfile.write(content[: len(content) // 2] if self.fault in ("stall", "truncate") else content)
            self.wfile.flush()
            if self.fault == "stall":
                self.hub.closed.wait(LONG)
        self.close_connection = self.close_connection or self.fault in ("stall", "truncate")

    def log_message(self, *_) -> None:
        pass


def large(path: str, content: bytes) -> bool:
    return len(content) > LARGE or path.endswith((".safetensors", ".parquet"))


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if large(path, content):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


def listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """Return what lies below a folder of a repository: files, and folders, all or only the nearest."""
    inside = {path: content for path, content in files.items() if not folder or path.startswith(f"{folder}/")}
    depth = folder.count("/") + 1 if folder else 0
    folders = {"/".join(path.split("/")[:i]) for path in inside for i in range(depth + 1, path.count("/") + 1)}
    near = [entry(path, content) for path, content in inside.items() if recursive or path.count("/") == depth]
    far = [one for one in sorted(folders) if recursive or one.count("/") == depth]
    return [{"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in far] + near
