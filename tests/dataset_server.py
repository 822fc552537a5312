"""The part of the Hub's protocol that ``datasets`` needs for a data set of one CSV file, ``acme/tones``."""

import hashlib
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class DatasetServer(ThreadingHTTPServer):
    """Serves ``train.csv`` to those who have the token, if one is set."""

    daemon_threads = True

    def __init__(self, rows: bytes, token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows, self.token = rows, token
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """The endpoint for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: DatasetServer

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._route()

    def _route(self) -> None:
        path, rows = self.path.partition("?")[0], self.server.rows
        self.server.requests.append(path)
        file = {"type": "file", "path": "train.csv", "size": len(rows), "oid": "1" * 40}
        api, resolve = "/api/datasets/acme/tones", f"/datasets/acme/tones/resolve/{COMMIT}"
        info = {"id": "acme/tones", "sha": COMMIT, "private": False, "siblings": [{"rfilename": "train.csv"}]}
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._send(HTTPStatus.UNAUTHORIZED, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path == f"{resolve}/train.csv":
            self._send(HTTPStatus.OK, rows, {"ETag": f'"{hashlib.sha256(rows).hexdigest()}"'})
        elif path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            self._send(HTTPStatus.OK, json.dumps(info).encode(), {})
        elif path == f"{api}/tree/{COMMIT}" or path.startswith(f"{api}/paths-info/"):
            self._send(HTTPStatus.OK, json.dumps([file]).encode(), {})
        elif path.startswith(f"{api}/tree/"):
            self._send(HTTPStatus.OK, b"[]", {})
        else:
            self._send(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
