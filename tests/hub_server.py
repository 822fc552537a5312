"""The part of the Hub's protocol that a download needs, with everything that can go wrong with it."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=0e7a11"
"""What makes the address of a large file a secret."""


@dataclass(frozen=True)
class Request:
    """A request as the server saw it. ``name`` is the file's, or ``api`` for the look-up."""

    method: str
    name: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class Fault:
    """What goes wrong, ``times`` times: another answer, an end after some bytes of it, or silence."""

    status: int = HTTPStatus.OK
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    after: int | None = None
    then: Literal["cut", "stall"] = "cut"
    times: int = 1_000


class HubServer(ThreadingHTTPServer):
    """Serves ``acme/phi``. Like the real one it redirects: large files to another host, small ones to itself."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits = {COMMIT: files}
        self.revisions = {"main": COMMIT}
        self.claimed_sizes: dict[str, int] = {}
        self.replaced: dict[str, bytes] = {}
        """Content that is sent instead of what the metadata describe."""
        self.missing: set[str] = set()
        """Files that are listed and not there."""
        self.readers: set[str] | None = None
        """The tokens that may read files; None: everybody may."""
        self.faults: dict[tuple[str, str], Fault] = {}
        """By method and name."""
        self.requests: list[Request] = []
        self.stalled, self.released = threading.Event(), threading.Event()

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the first commit."""
        return self.commits[COMMIT]

    @property
    def url(self) -> str:
        """The endpoint for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_port}"

    def seen(self, method: str = "GET") -> list[str]:
        """Return the names asked for with a method, redirects counted once, and forget all requests."""
        names = [request.name for request in self.requests if request.method == method]
        self.requests.clear()
        return sorted(set(names))

    def fault(self, method: str, name: str) -> Fault | None:
        """Return what is to go wrong now."""
        found = self.faults.get((method, name))
        if found is None or found.times == 0:
            return None
        found.times -= 1
        return found


def is_lfs(name: str) -> bool:
    """Tell which files the server keeps outside of git."""
    return name.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    """Return git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if look_up := re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)(?:/revision/(.+))?", path):
            self._note("api")
            self._look_up(look_up[1], look_up[2] or "main")
        elif resolve := re.fullmatch(r"(?:/api/resolve-cache/models)?/acme/phi(?:/resolve)?/(\w+)/(.+)", path):
            self._note(resolve[2])
            self._resolve(resolve[1], resolve[2], redirected=path.startswith("/api"))
        elif large := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            self._note(large[2])
            assert SIGNATURE in self.path
            self._send_file(large[1], large[2], {})

    def _note(self, name: str) -> None:
        headers = self.headers
        request = Request(self.command, name, headers["Host"], headers["Authorization"], headers["Range"])
        self.server.requests.append(request)
        self.current = name

    def _look_up(self, model: str, revision: str) -> None:
        commit = self.server.revisions.get(revision, revision)
        if model != "acme/phi":
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif commit not in self.server.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev {revision}"})
        else:
            siblings = [self._sibling(name, content) for name, content in self.server.commits[commit].items()]
            answer = {"id": model, "modelId": model, "sha": commit, "private": False, "siblings": siblings}
            self._send(200, json.dumps(answer).encode(), {})

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        size, digest = self.server.claimed_sizes.get(name, len(content)), hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"sha256": digest, "size": size, "pointerSize": 134}} if is_lfs(name) else {}
        return {"rfilename": name, "size": size, "blobId": blob_id(b"pointer" if lfs else content), **lfs}

    def _resolve(self, commit: str, name: str, *, redirected: bool) -> None:
        readers = self.server.readers
        if readers is not None and (self.headers["Authorization"] or "").removeprefix("Bearer ") not in readers:
            status = 403 if self.headers["Authorization"] else 401
            self._send(status, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name in self.server.missing or name not in self.server.commits.get(commit, {}):
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif is_lfs(name):
            content = self.server.commits[commit][name]
            headers = {
                "Location": f"http://localhost:{self.server.server_port}/cdn/{commit}/{name}?{SIGNATURE}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            self._send(302, b"", headers)
        elif not redirected:
            location = f"/api/resolve-cache/models/acme/phi/{commit}/{name}"
            self._send(307, b"", {"Location": location, "X-Repo-Commit": commit})
        else:
            self._send_file(commit, name, {"X-Repo-Commit": commit})

    def _send_file(self, commit: str, name: str, headers: dict[str, str]) -> None:
        content = self.server.commits[commit][name]
        headers |= {"ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        content = self.server.replaced.get(name, content)
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        fault = self.server.fault(self.command, self.current) if status < HTTPStatus.MULTIPLE_CHOICES else None
        if fault is not None and fault.status != HTTPStatus.OK:
            status, content, headers = fault.status, b"", {}
        if fault is not None and fault.content is not None:
            content = fault.content
        silent = fault is not None and fault.then == "stall"
        if silent and self.command == "HEAD":
            self._stall()
        self.send_response(status)
        length = {"Content-Length": str(len(content))}
        for name, value in (length | headers | (fault.headers if fault else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: fault.after if fault else None])
            if silent:
                self._stall()

    def _stall(self) -> None:
        self.wfile.flush()
        self.server.stalled.set()
        self.server.released.wait(60)
