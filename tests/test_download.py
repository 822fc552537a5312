"""Base models arrive whole and stay what they were: built-in, adopted, copied, or from a Hub server."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import Sandbox
from edgetune.project import BUILTIN_MODELS

TINY = BUILTIN_MODELS["edgetune/tiny-phi3"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """The part of the Hub's protocol a download needs, serving the built-in model as ``acme/phi``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.gated = False
        self.files = {path.name: path.read_bytes() for path in TINY.iterdir()}
        self.files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "README.md": b"hello"}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """The endpoint for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        if self.server.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept first"})
        elif path.startswith("/api/models/acme/phi"):
            siblings = [{"rfilename": name} for name in self.server.files]
            content = {
                "id": "acme/phi",
                "modelId": "acme/phi",
                "sha": COMMIT,
                "private": False,
                "siblings": siblings,
            }
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.server.files.items()]
            self._send(200, json.dumps(tree if "/tree/" in path else content).encode(), {}, body=body)
        elif path.startswith(f"/acme/phi/resolve/{COMMIT}/"):
            content_bytes = self.server.files[path.rpartition("/")[2]]
            etag = f'"{hashlib.sha256(content_bytes).hexdigest()}"'
            self._send(200, content_bytes, {"ETag": etag, "X-Repo-Commit": COMMIT}, body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Serve until the test ends."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub_project(fresh: Sandbox) -> Sandbox:
    """Return a project whose base model is ``acme/phi``."""
    fresh.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/phi"))
    return fresh


def lock_of(project: Sandbox) -> dict[str, dict[str, Any]]:
    """Return the lock file's content."""
    content: dict[str, dict[str, Any]] = json.loads((project.root / "setup/model.lock.json").read_text())
    return content


def test_built_in_model_is_copied_and_locked(fresh: Sandbox) -> None:
    """The default base model needs no network, and its bytes are pinned."""
    result = fresh.run("download", env={"HF_ENDPOINT": "http://127.0.0.1:9"})

    assert result.returncode == 0, result.stderr
    assert result.stdout == "model-cache/edgetune/tiny-phi3\n"
    entry = lock_of(fresh)["edgetune/tiny-phi3"]
    assert entry["source"] == "built-in"
    weights = fresh.root / "model-cache/edgetune/tiny-phi3/model.safetensors"
    assert weights.read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_hub_model_is_fetched_by_commit_without_pickle(hub_project: Sandbox, hub: HubServer) -> None:
    """A Hub id is resolved to a commit, which the lock keeps; only files that are used are fetched."""
    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 0, result.stderr
    entry = lock_of(hub_project)["acme/phi"]
    assert (entry["source"], entry["revision"]) == ("hub", COMMIT)
    folder = hub_project.root / "model-cache/acme/phi"
    assert {path.name for path in folder.iterdir()} == {path.name for path in TINY.iterdir()}
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    assert entry["files"].keys() == {path.name for path in TINY.iterdir()}


def test_complete_model_needs_no_request(hub_project: Sandbox, hub: HubServer) -> None:
    """With everything there, the second download asks nobody."""
    assert hub_project.run("download", env={"HF_ENDPOINT": hub.url}).returncode == 0
    hub.requests.clear()

    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 0
    assert "up to date" in result.stderr
    assert hub.requests == []


def test_locked_model_with_other_bytes_is_refused(hub_project: Sandbox, hub: HubServer) -> None:
    """When the server gives other bytes for the locked commit, that is an error, not the base model."""
    assert hub_project.run("download", env={"HF_ENDPOINT": hub.url}).returncode == 0
    shutil.rmtree(hub_project.root / "model-cache/acme")
    hub.files["config.json"] += b" "

    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 1
    assert "differs from setup/model.lock.json" in result.stderr
    assert "--update-lock" in result.stderr
    assert not (hub_project.root / "model-cache/acme/phi").exists()
    assert hub_project.run("download", "--update-lock", env={"HF_ENDPOINT": hub.url}).returncode == 0


def test_gated_model_says_where_to_ask(hub_project: Sandbox, hub: HubServer) -> None:
    """A gated repository is an error that names the page and where the token goes."""
    hub.gated = True

    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 1
    assert "is gated" in result.stderr
    assert "HF_TOKEN" in result.stderr


def test_unknown_model_is_told(hub_project: Sandbox, hub: HubServer) -> None:
    """A repository that is not there is an error that points at the workflow file."""
    hub_project.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/other"))

    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 1
    assert re.search(r"error: fine-tuning/olive-config.json:\d+: acme/other was not found on the Hub", result.stderr)


def test_weights_put_there_by_hand_are_adopted(hub_project: Sandbox) -> None:
    """Weights in the right folder are hashed into the lock on first use and never fetched."""
    folder = hub_project.root / "model-cache/acme/phi"
    shutil.copytree(TINY, folder)

    assert hub_project.run("data", env={"HF_ENDPOINT": "http://127.0.0.1:9"}).returncode == 0

    assert lock_of(hub_project)["acme/phi"]["source"] == "local"


def test_model_is_copied_from_a_folder(hub_project: Sandbox, tmp_path: Path) -> None:
    """``--from`` takes a base model from any folder; an unusable folder is refused and leaves nothing."""
    result = hub_project.run("download", "--from", str(tmp_path))
    assert result.returncode == 1
    assert "acme/phi has no config.json" in result.stderr
    assert not (hub_project.root / "model-cache/acme/phi").exists()

    assert hub_project.run("download", "--from", str(TINY)).returncode == 0
    assert (hub_project.root / "model-cache/acme/phi/config.json").is_file()


def test_damaged_lock_is_told(fresh: Sandbox) -> None:
    """A lock file that is no lock file is an error with a remedy."""
    for text in ("{", "[]", '{"edgetune/tiny-phi3": 3}', '{"edgetune/tiny-phi3": {"files": {"a": 3}}}'):
        (fresh.root / "setup/model.lock.json").write_text(text)
        result = fresh.run("download")
        assert result.returncode == 1
        assert "error: setup/model.lock.json: the lock file is damaged" in result.stderr


def other_base(folder: Path) -> Path:
    """Make another base model of the same shape."""
    shutil.copytree(TINY, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2:] = b"\x80\x3f"
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of a run")
    return folder


def test_locked_base_survives_a_copy_from_another_folder(fresh: Sandbox, tmp_path: Path) -> None:
    """``--from`` another model is refused under a lock, and the locked files stay as they were."""
    assert fresh.run("download").returncode == 0

    result = fresh.run("download", "--from", str(other_base(tmp_path / "other")))

    assert result.returncode == 1
    assert "differs from setup/model.lock.json" in result.stderr
    assert "up to date" in fresh.run("download").stderr


def test_update_lock_accepts_the_weights_that_are_there(fresh: Sandbox) -> None:
    """Weights put over the locked ones are refused, and become the base with ``--update-lock``."""
    assert fresh.run("download").returncode == 0
    folder = fresh.root / "model-cache/edgetune/tiny-phi3"
    shutil.rmtree(folder)
    other = (other_base(folder) / "model.safetensors").read_bytes()
    assert fresh.run("download").returncode == 1

    assert fresh.run("download", "--update-lock").returncode == 0

    assert (folder / "model.safetensors").read_bytes() == other
    entry = lock_of(fresh)["edgetune/tiny-phi3"]
    assert entry["source"] == "local"
    assert "README.md" not in entry["files"]


def test_leftovers_of_an_earlier_try_are_not_mixed_in(
    render: Callable[..., Sandbox], hub_project: Sandbox, hub: HubServer
) -> None:
    """Files that an interrupted download of something else left behind do not become part of the base."""
    for project, model in ((render(), "edgetune/tiny-phi3"), (hub_project, "acme/phi")):
        partial = project.root / f"model-cache/{model}.partial"
        partial.mkdir(parents=True)
        (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
        assert project.run("download", env={"HF_ENDPOINT": hub.url}).returncode == 0
        assert not (project.root / f"model-cache/{model}/model-00001-of-00002.safetensors").exists()


def test_missing_shard_is_told(hub_project: Sandbox) -> None:
    """A folder copied by hand only in part is not adopted."""
    folder = other_base(hub_project.root / "model-cache/acme/phi")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    result = hub_project.run("download")

    assert result.returncode == 1
    assert "acme/phi has no model-00002.safetensors" in result.stderr


def test_another_revision_than_the_locked_one_is_refused(hub_project: Sandbox, hub: HubServer) -> None:
    """Changing the revision in the workflow file is not silently ignored."""
    assert hub_project.run("download", env={"HF_ENDPOINT": hub.url}).returncode == 0
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(revision="f" * 40))

    result = hub_project.run("download", env={"HF_ENDPOINT": hub.url})

    assert result.returncode == 1
    assert "is not the locked one" in result.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3_text"}, "cannot be exported"),
        ({"model_type": "olmo"}, "other answers"),
        ({}, "names no"),
    ],
)
def test_model_that_cannot_be_exported_is_refused_before_training(
    hub_project: Sandbox, config: dict[str, str], message: str
) -> None:
    """What the exporter is known to get wrong is said at once, not after hours."""
    folder = other_base(hub_project.root / "model-cache/acme/phi")
    (folder / "config.json").write_text(json.dumps(config))

    result = hub_project.run("download")

    assert result.returncode == 1
    assert re.search(rf"error: fine-tuning/olive-config.json:\d+: .*{message}", result.stderr)
