"""Base models arrive whole and stay what they were: built-in, adopted, copied, or from a Hub server."""

import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forked
from conftest import ENVIRONMENT, Sandbox
from edgetune.architectures import EXPORTABLE, NEEDS_REMOTE_CODE, UNEXPORTABLE
from edgetune.project import BUILTIN_MODELS
from hub_server import COMMIT, SIGNATURE, Fault, HubServer

TINY = BUILTIN_MODELS["edgetune/tiny-phi3"]
TINY_FILES = {path.name: path.read_bytes() for path in TINY.iterdir()}
Fetch = Callable[..., subprocess.CompletedProcess[str]]
UNUSED = {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "notes.md": b"hello"}
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Serve the built-in model as ``acme/phi`` until the test ends."""
    with HubServer(TINY_FILES | UNUSED) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def hub_project(fresh: Sandbox) -> Sandbox:
    """Return a project whose base model is ``acme/phi``."""
    fresh.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/phi"))
    return fresh


@pytest.fixture
def fetch(hub: HubServer, hub_project: Sandbox) -> Fetch:
    """Return what runs ``edgetune download`` in the project against the server."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {"HF_ENDPOINT": hub.url} | environment
        if "HF_HUB_OFFLINE" in environment:  # read when the client is imported
            return hub_project.run("download", *arguments, env=environment)
        return forked.run(hub_project.root, "download", *arguments, environment=ENVIRONMENT | environment)

    return run


def config(**values: Any) -> bytes:
    """Return the built-in model's config.json with other values."""
    return json.dumps(json.loads(TINY_FILES["config.json"]) | values).encode()


def weights(project: Sandbox) -> Path:
    """Return where the weights of ``acme/phi`` belong."""
    return project.root / "model-cache/acme/phi/model.safetensors"


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


def test_hub_model_is_fetched_by_commit_without_pickle(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """A Hub id is resolved to a commit, which the lock keeps; only files that are used are fetched."""
    result = fetch()

    assert result.returncode == 0, result.stderr
    entry = lock_of(hub_project)["acme/phi"]
    assert (entry["source"], entry["revision"]) == ("hub", COMMIT)
    folder = hub_project.root / "model-cache/acme/phi"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TINY_FILES
    assert entry["files"].keys() == TINY_FILES.keys()
    assert hub.seen() == sorted([*TINY_FILES, "api"])


def test_complete_model_needs_no_request(fetch: Fetch, hub: HubServer) -> None:
    """With everything there, the second download asks nobody, and needs no permission to."""
    assert fetch().returncode == 0
    hub.requests.clear()

    result = fetch(HF_HUB_OFFLINE="1")

    assert result.returncode == 0
    assert "up to date" in result.stderr
    assert hub.requests == []


def test_lock_gives_the_same_bytes_on_another_machine(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """What the repository's owner changes later does not reach a locked project until it asks for it."""
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(revision="main"))
    assert fetch().returncode == 0
    shutil.rmtree(hub_project.root / "model-cache/acme")
    hub.revisions["main"] = "f" * 40
    hub.commits["f" * 40] = hub.files | {"config.json": config(max_position_embeddings=4096)}
    hub.requests.clear()

    assert fetch().returncode == 0
    assert "api" not in hub.seen(), "a locked commit needs no look-up"
    assert (weights(hub_project).with_name("config.json")).read_bytes() == TINY_FILES["config.json"]

    assert fetch("--update-lock").returncode == 0
    assert hub.seen() == ["api", "config.json"], "files that did not change are not fetched again"
    assert lock_of(hub_project)["acme/phi"]["revision"] == "f" * 40
    assert (weights(hub_project).with_name("config.json")).read_bytes() != TINY_FILES["config.json"]
    assert weights(hub_project).read_bytes() == TINY_FILES["model.safetensors"]


def test_lock_that_moved_on_before_the_files_did(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """Killed between writing the lock and renaming the folder, the next run renames it."""
    assert fetch().returncode == 0
    folder = weights(hub_project).parent
    shutil.copytree(folder, old := hub_project.root / "old")
    hub.files["config.json"] = config(max_position_embeddings=4096)
    assert fetch("--update-lock").returncode == 0
    folder.rename(folder.with_name("phi.partial"))
    old.rename(folder)
    hub.requests.clear()

    result = fetch()

    assert result.returncode == 0, result.stderr
    assert (folder / "config.json").read_bytes() == hub.files["config.json"]
    assert hub.requests == []


def test_only_missing_files_are_fetched(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """A file that got lost is fetched alone; offline, that is an error that says so."""
    assert fetch().returncode == 0
    (weights(hub_project).with_name("tokenizer.json")).unlink()
    hub.requests.clear()

    offline = fetch(HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "acme/phi is not complete in model-cache/acme/phi, and HF_HUB_OFFLINE is set" in offline.stderr
    assert "--from" in offline.stderr
    assert hub.requests == []

    assert fetch().returncode == 0
    assert hub.seen() == ["tokenizer.json"]


def test_locked_model_with_other_bytes_is_refused(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """When the server gives other bytes for the locked commit, that is an error, not the base model."""
    assert fetch().returncode == 0
    shutil.rmtree(hub_project.root / "model-cache/acme")
    hub.files["config.json"] += b" "

    result = fetch()

    assert result.returncode == 1
    assert "differs from setup/model.lock.json" in result.stderr
    assert "--update-lock" in result.stderr
    assert not (hub_project.root / "model-cache/acme/phi").exists()
    assert fetch("--update-lock").returncode == 0


def test_all_that_stands_against_a_model_is_said_before_its_weights(
    hub_project: Sandbox, fetch: Fetch, hub: HubServer
) -> None:
    """Missing parts, pickle weights, an architecture that cannot be exported, a full disk: all at once."""
    for name in ("model.safetensors", "tokenizer.json"):
        del hub.files[name]
    hub.files["config.json"] = config(architectures=["FalconForCausalLM"], model_type="falcon")
    hub.claimed_sizes["tokenizer_config.json"] = 10**16

    result = fetch()

    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: fine-tuning/olive-config.json:")]
    for message in (
        "acme/phi has no tokenizer.json",
        "acme/phi has no weights as *.safetensors, only as pickle (pytorch_model.bin)",
        "acme/phi needs 10.0 PB of disk space",
        "acme/phi is a FalconForCausalLM, which onnxruntime-genai 0.14.1 cannot export",
    ):
        assert any(message in error for error in errors), message
    assert len(errors) == 4
    assert hub.seen() == ["api", "config.json"]
    assert not (hub_project.root / "setup/model.lock.json").exists()


def test_missing_shard_is_noticed_before_the_others_are_fetched(fetch: Fetch, hub: HubServer) -> None:
    """An index that speaks of a file the repository lacks is an error before gigabytes."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()

    result = fetch()

    assert result.returncode == 1
    assert "acme/phi has no model-00002.safetensors" in result.stderr
    assert "model.safetensors" not in hub.seen()


def gated(hub: HubServer) -> None:
    """Let somebody else read."""
    hub.readers = {"hf_of-somebody-else"}


def refuses_token(hub: HubServer) -> None:
    """Answer as to an expired token."""
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.faults["GET", "api"] = Fault(401, message)


def forbids(hub: HubServer) -> None:
    """Answer as to a token without the needed scope."""
    hub.faults["GET", "api"] = Fault(403, {"X-Error-Message": "no such scope"})


def is_busy(hub: HubServer) -> None:
    """Answer as to too many requests."""
    hub.faults["GET", "api"] = Fault(429)


def loses_weights(hub: HubServer) -> None:
    """Fail where large files are kept."""
    hub.faults["GET", "model.safetensors"] = Fault(500)


def forgets_weights(hub: HubServer) -> None:
    """Lack what the redirect leads to."""
    hub.faults["GET", "model.safetensors"] = Fault(404)


@pytest.mark.parametrize(
    ("happen", "said"),
    [
        (gated, ("acme/phi is gated: its owner asks for consent first (Access is restricted)", "HF_TOKEN=… into .env")),
        (refuses_token, ("refuses access without a valid token (Invalid", "https://huggingface.co/settings/tokens")),
        (forbids, ("the token may not read acme/phi (no such scope)", "hf auth login")),
        (is_busy, ("takes no more requests for now (status 429)", "run again in some minutes")),
        (forgets_weights, ("/model.safetensors'", "set HF_ENDPOINT to a mirror")),
        (loses_weights, ("has a problem of its own (status 500)", "finished files are kept")),
    ],
)
def test_refusal_of_the_server_becomes_a_sentence(
    happen: Callable[[HubServer], None], said: tuple[str, str], hub_project: Sandbox, fetch: Fetch, hub: HubServer
) -> None:
    """Whatever the server says no with: one line what, one line what to do; no secret, no half a model."""
    happen(hub)

    result = fetch(HF_TOKEN=TOKEN)

    assert result.returncode == 1
    what, remedy = result.stderr.splitlines()[-2:]
    assert re.match(r"error: fine-tuning/olive-config.json:\d+: ", what)
    assert said[0] in what
    assert said[1] in remedy
    assert not (hub_project.root / "model-cache/acme/phi").exists()
    assert [name for name, text in texts(hub_project) if TOKEN in text or SIGNATURE in text] == []
    assert TOKEN not in result.stderr
    assert SIGNATURE not in result.stderr


def texts(project: Sandbox) -> list[tuple[str, str]]:
    """Return name and content of all of a project's files."""
    paths = [path for path in project.root.rglob("*") if path.is_file()]
    return [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in paths]


def test_gated_model_names_the_page_to_accept(fetch: Fetch, hub: HubServer) -> None:
    """Nobody logged in and a gated repository: the hint names the page and the login."""
    hub.readers = set()

    result = fetch()

    assert result.returncode == 1
    assert "https://huggingface.co/acme/phi" in result.stderr
    assert "hf auth login" in result.stderr


def test_unknown_model_is_told(hub_project: Sandbox, fetch: Fetch) -> None:
    """A repository that is not there is an error that points at the workflow file."""
    hub_project.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/other"))

    result = fetch()

    assert result.returncode == 1
    assert re.search(r"error: fine-tuning/olive-config.json:\d+: acme/other was not found on the Hub", result.stderr)


def test_unknown_revision_is_told(hub_project: Sandbox, fetch: Fetch) -> None:
    """A revision that is not there is an error with the line of the revision."""
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(revision="v7"))
    line = 1 + hub_project.config.read_text().splitlines().index('      "revision": "v7"')

    result = fetch()

    assert result.returncode == 1
    assert f"error: fine-tuning/olive-config.json:{line}: acme/phi has no such revision" in result.stderr


def test_no_hub_at_all_is_told(fetch: Fetch, hub: HubServer) -> None:
    """No network, and something else than a Hub at the endpoint, are sentences too."""
    unreachable = fetch(**NOWHERE)
    assert unreachable.returncode == 1
    assert "the Hub could not be reached for acme/phi (http://127.0.0.1:9)" in unreachable.stderr

    hub.faults["GET", "api"] = Fault(content=b"<html>Log in to the guest network</html>")
    web_page = fetch()
    assert web_page.returncode == 1
    assert "does not answer as a Hub does" in web_page.stderr


def test_passing_errors_are_sat_out(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """One bad answer to the look-up, one to a file's header, and a silence in a file's middle do no harm."""
    hub.faults["GET", "api"] = Fault(503, times=1)
    hub.faults["HEAD", "tokenizer.json"] = Fault(502, times=1)
    hub.faults["GET", "tokenizer.json"] = Fault(after=1000, then="stall", times=1)

    result = fetch()

    assert result.returncode == 0, result.stderr
    assert "answers with status 503, asking again" in result.stderr
    assert (weights(hub_project).with_name("tokenizer.json")).read_bytes() == TINY_FILES["tokenizer.json"]


def test_cut_connection_is_continued(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """When the connection breaks in the middle of the weights, the rest is asked for, not the whole."""
    size = 12_000_000
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    hub.files["model.safetensors"] = len(header).to_bytes(8, "little") + header + bytes(range(250)) * (size // 250)
    hub.faults["GET", "model.safetensors"] = Fault(after=11_000_000, times=1)

    result = fetch()

    assert result.returncode == 0, result.stderr
    assert weights(hub_project).read_bytes() == hub.files["model.safetensors"]
    ranges = [r.range for r in hub.requests if (r.method, r.name) == ("GET", "model.safetensors")]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=[1-9]\d+-", ranges[1] or "")
    assert len(ranges) == 2
    log = (hub_project.root / "gen-model/logs/download.log").read_text()
    assert "Error while downloading from" in log
    assert SIGNATURE not in log


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_content_is_checked_on_the_first_download(
    name: str, hub_project: Sandbox, fetch: Fetch, hub: HubServer
) -> None:
    """Other bytes than the server announces are refused and deleted, large file or small; the next run mends it."""
    hub.replaced[name] = hub.files[name][:-8] + b"12345678"

    result = fetch()

    assert result.returncode == 1
    assert f"acme/phi/{name} did not arrive as" in result.stderr
    assert not (hub_project.root / "model-cache/acme/phi").exists()
    assert not (hub_project.root / "setup/model.lock.json").exists()
    hub.replaced.clear()
    hub.requests.clear()
    assert fetch().returncode == 0
    assert name in hub.seen()


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_download_goes_on_where_it_was(
    end: signal.Signals, code: int, hub_project: Sandbox, fetch: Fetch, hub: HubServer
) -> None:
    """Killed or interrupted in the middle of the weights, the next run fetches only these."""
    hub.faults["GET", "model.safetensors"] = Fault(after=1_000_000, then="stall")
    process = subprocess.Popen(
        (sys.executable, "-m", "edgetune", "download"),
        cwd=hub_project.root,
        env=ENVIRONMENT | {"HF_ENDPOINT": hub.url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.stalled.wait(60)
    process.send_signal(end)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert not (hub_project.root / "model-cache/acme/phi").exists()
    hub.faults.clear()
    hub.requests.clear()

    result = fetch()

    assert result.returncode == 0, result.stderr
    assert hub.seen() == ["api", "model.safetensors"]
    assert "the rest is here already" in result.stderr
    assert {path.name for path in weights(hub_project).parent.iterdir()} == TINY_FILES.keys()


def test_token_goes_to_the_hub_and_nowhere_else(hub_project: Sandbox, hub: HubServer) -> None:
    """Token and mirror are taken from ``.env``; the token is in the Authorization header and in no file."""
    hub.readers = {TOKEN}
    lines = ("# mine", f"export HF_TOKEN='{TOKEN}'", f"HF_ENDPOINT={hub.url}/  # a mirror", "HF_HUB_ETAG_TIMEOUT=")
    (hub_project.root / ".env").write_text("\n".join(lines))
    home = {"HF_HOME": str(hub_project.root / "hf-home")}

    result = hub_project.run("download", env=home)

    assert result.returncode == 0, result.stderr
    for request in hub.requests:
        own = request.host.startswith("127.0.0.1")  # large files come from another host
        assert request.authorization == (f"Bearer {TOKEN}" if own else None)
    assert any(request.host.startswith("localhost") for request in hub.requests)
    assert [name for name, text in texts(hub_project) if TOKEN in text] == [".env"]
    assert TOKEN not in result.stdout + result.stderr


def test_token_that_is_none_is_not_shown(fetch: Fetch, hub: HubServer) -> None:
    """A token with a line break or typographic quotes would end up in the network library's error message."""
    result = fetch(HF_TOKEN=f"{TOKEN}\n{TOKEN}")

    assert result.returncode == 1
    assert "HF_TOKEN holds characters that no token has" in result.stderr
    assert TOKEN not in result.stderr
    assert hub.requests == []


def test_code_of_a_known_architecture_is_passed_over(fetch: Fetch, hub: HubServer) -> None:
    """Many repositories carry code that transformers does not need: it is not fetched, and that is said."""
    hub.files["config.json"] = config(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    hub.files["modeling_phi3.py"] = b"raise SystemExit"

    result = fetch()

    assert result.returncode == 0, result.stderr
    assert "the Python code of its repository is not used" in result.stderr
    assert "modeling_phi3.py" not in hub.seen()


def test_architecture_that_needs_code_asks_for_trust(fetch: Fetch, hub: HubServer) -> None:
    """Without ``trust_remote_code`` a model that runs only with its repository's code is refused."""
    hub.files["config.json"] = config(architectures=["Phi3SmallForCausalLM"], model_type="phi3small")

    result = fetch()

    assert result.returncode == 1
    assert "acme/phi (Phi3SmallForCausalLM) runs only with Python code of its own repository" in result.stderr
    assert "trust_remote_code" in result.stderr
    assert "model.safetensors" not in hub.seen()


def test_trusted_code_is_fetched_and_locked(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """With ``trust_remote_code`` and a commit the code belongs to the base model; code from elsewhere does not."""
    trust = {"trust_remote_code": True, "revision": COMMIT}
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(trust))
    code = {"AutoConfig": "configuration_small.C", "AutoTokenizer": ["other/repository--tokens.T", None]}
    small = {"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small"}
    hub.files["config.json"] = config(**small, auto_map=code)

    result = fetch()
    assert result.returncode == 1
    assert "acme/phi takes Python code from another repository (other/repository--tokens.T)" in result.stderr
    assert "acme/phi has no configuration_small.py" in result.stderr

    code["AutoTokenizer"] = ["configuration_small.T", None]
    hub.files["config.json"] = config(**small, auto_map=code)
    hub.files["configuration_small.py"] = b"class C: pass"
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert "configuration_small.py" in lock_of(hub_project)["acme/phi"]["files"]
    assert (weights(hub_project).with_name("configuration_small.py")).read_bytes() == b"class C: pass"


def test_trust_given_later_fetches_the_code(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """A model that was locked without its code is not taken for one with it."""
    hub.files["config.json"] = config(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    hub.files["modeling_phi3.py"] = b"pass"
    assert fetch().returncode == 0
    trust = {"trust_remote_code": True, "revision": COMMIT}
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(trust))

    result = fetch()
    assert result.returncode == 1
    assert "acme/phi was locked without its Python code" in result.stderr
    hub.requests.clear()

    assert fetch("--update-lock").returncode == 0
    assert hub.seen() == ["api", "modeling_phi3.py"]


def test_progress_is_in_bytes_and_plain_without_a_terminal(hub_project: Sandbox, fetch: Fetch) -> None:
    """A log gets lines with amount and rate, nothing that moves a cursor; events.jsonl gets numbers."""
    result = fetch()

    assert re.search(r"^download  6\.4/6\.4 MB  \d+ [kMG]B/s$", result.stderr, re.MULTILINE)
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr
    total = sum(map(len, TINY_FILES.values()))
    events = [json.loads(line) for line in (hub_project.root / "gen-model/events.jsonl").read_text().splitlines()]
    (progress,) = [event for event in events if event["event"] == "progress"]
    assert (progress["done"], progress["total"], progress["unit"]) == (total, total, "B")
    assert isinstance(progress["rate"], int)


def test_progress_on_a_terminal_is_a_bar(fresh: Sandbox) -> None:
    """On a terminal amount, rate and time left are drawn."""
    terminal, stderr = pty.openpty()
    command = (sys.executable, "-m", "edgetune", "download")
    with subprocess.Popen(command, cwd=fresh.root, env=ENVIRONMENT | {"COLUMNS": "120"}, stderr=stderr) as process:
        os.close(stderr)
        drawn = read_terminal(terminal)
    assert process.returncode == 0, drawn
    assert re.search(r"6\.4/6\.4 MB", drawn)
    assert re.search(r"[kMG]B/s", drawn)


def read_terminal(terminal: int) -> str:
    """Read until the other side closes."""
    drawn = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        try:
            while chunk := file.read(4096):
                drawn += chunk
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that the other side has closed
                raise
    return drawn.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("method", "fault"), [("HEAD", Fault(then="stall")), ("GET", Fault(after=9, then="stall")), ("GET", Fault(after=9))]
)
def test_server_that_stays_silent_is_given_up(method: str, fault: Fault, fetch: Fetch, hub: HubServer) -> None:
    """Silence between two files or within one, and lines cut again and again, are retried, but not for ever."""
    hub.faults[method, "tokenizer.json"] = fault

    result = fetch()

    assert result.returncode == 1
    assert "the Hub could not be reached for acme/phi" in result.stderr


def test_file_that_the_server_lost_is_named(fetch: Fetch, hub: HubServer) -> None:
    """A repository that lists a file and does not have it is an error with the file's address."""
    hub.missing.add("generation_config.json")

    result = fetch()

    assert result.returncode == 1
    assert "lacks a file of acme/phi: http" in result.stderr
    assert "generation_config.json" in result.stderr


def test_client_is_imported_only_to_fetch(fresh: Sandbox) -> None:
    """Neither a state nor the built-in model costs the import of the Hub's client."""
    for command in ("download", "status"):
        script = (
            f"import sys; from edgetune import cli; cli.main(['{command}']); print('huggingface_hub' in sys.modules)"
        )
        result = fresh.command(sys.executable, "-c", script)
        assert result.stdout.endswith("False\n"), result.stderr


def test_architectures_are_those_of_the_exporter() -> None:
    """The tables hold what onnxruntime-genai's builder and transformers say, read from their own source."""
    packages = Path(pytest.__file__).parent.parent
    builder = (packages / "onnxruntime_genai/models/builder.py").read_text(encoding="utf-8")
    transformers = (packages / "transformers/models/auto/modeling_auto.py").read_text(encoding="utf-8")
    causal = transformers.split("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")[1].split("\n)\n")[0]
    exported = set(re.findall(r'architectures\[0\] == "(\w+)"', builder))
    native = set(re.findall(r'"(\w+)"\)', causal))

    text = {name for name in exported if name.endswith("ForCausalLM")}
    refused = {"GptOssForCausalLM", "OlmoForCausalLM"}
    assert UNEXPORTABLE.keys() == {"gpt_oss", "olmo"}
    assert text & native - refused == EXPORTABLE
    assert exported - native > NEEDS_REMOTE_CODE


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
    model = '{"edgetune/tiny-phi3": {"source": "local", "revision": null,\n"files": {"a": 3}}}'
    for text, line in (("{", ""), ("[]", ":1"), ('{\n"edgetune/tiny-phi3": 3}', ":2"), (model, ":2")):
        (fresh.root / "setup/model.lock.json").write_text(text)
        result = fresh.run("download")
        assert result.returncode == 1
        assert f"error: setup/model.lock.json{line}: the lock file is damaged" in result.stderr


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a/../../x", "..\\x", "C:x"])
def test_lock_that_leads_out_of_the_models_folder(fresh: Sandbox, name: str) -> None:
    """Files in the lock are names without a folder; any other is told with its line, and nothing is touched."""
    assert fresh.run("download").returncode == 0
    lock = lock_of(fresh)
    files = lock["edgetune/tiny-phi3"]["files"]
    files[name] = files["config.json"]
    path = fresh.root / "setup/model.lock.json"
    path.write_text(json.dumps(lock, indent=2))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), start=1) if json.dumps(name) in text)
    before = sorted(fresh.root.parent.rglob("*"))

    result = fresh.run("download", "--update-lock")

    assert result.returncode == 1
    assert f"error: setup/model.lock.json:{line}: the lock file is damaged\nhint: take it" in result.stderr
    assert sorted(fresh.root.parent.rglob("*")) == before


def test_repository_with_names_that_lead_elsewhere(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """Of what a repository lists, only files without a folder or drive are fetched, by the names they have."""
    odd = ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:x.safetensors")
    hub.files.update(dict.fromkeys(odd, b"elsewhere"))

    assert fetch().returncode == 0

    assert not [name for name in hub.seen() if name.endswith("x.safetensors")]
    assert lock_of(hub_project)["acme/phi"]["files"].keys() <= TINY_FILES.keys()
    assert not list(hub_project.root.parent.rglob("*x.safetensors"))


def test_index_that_leads_out_of_the_models_folder(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """Weights are read from the model's own folder alone, whatever its index says."""
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    hub.files.update({"model.safetensors.index.json": json.dumps(index).encode(), "../x.safetensors": b"elsewhere"})

    result = fetch()

    assert result.returncode == 1
    assert "acme/phi has no ../x.safetensors" in result.stderr
    assert not (hub_project.root / "model-cache/acme/phi").exists()


def test_weights_that_are_links_are_read_and_never_written(hub_project: Sandbox, tmp_path: Path) -> None:
    """A folder of links, as the Hub's cache has it, can be adopted; what replaces it leaves their targets alone."""
    elsewhere, folder = tmp_path / "blobs", hub_project.root / "model-cache/acme/phi"
    shutil.copytree(TINY, elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    folder.mkdir(parents=True)
    for path in elsewhere.iterdir():
        (folder / path.name).symlink_to(path)
    assert hub_project.run("download", env=NOWHERE).returncode == 0
    assert lock_of(hub_project)["acme/phi"]["source"] == "local"

    replaced = hub_project.run("download", "--update-lock", "--from", str(TINY))

    assert replaced.returncode == 0, replaced.stderr
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert not any(path.is_symlink() for path in folder.iterdir())


def other_base(folder: Path) -> Path:
    """Make another base model of the same shape."""
    shutil.copytree(TINY, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2:] = b"\x80\x3f"
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "notes.md").write_text("not part of a run")
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
    assert "notes.md" not in entry["files"]


def test_terms_of_a_model_come_along_and_change_no_result(fresh: Sandbox, tmp_path: Path) -> None:
    """The model card and licence files are locked with the weights; another card makes nothing out of date."""
    source = other_base(tmp_path / "other")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "NOTICE").write_text("by somebody")
    assert fresh.run("download", "--from", str(source)).returncode == 0
    assert lock_of(fresh)["edgetune/tiny-phi3"]["files"].keys() >= {"README.md", "NOTICE"}
    assert fresh.run("data").returncode == 0
    (fresh.root / "model-cache/edgetune/tiny-phi3/README.md").write_text("---\nlicense: apache-2.0\n---\n")

    assert fresh.run("download", "--update-lock").returncode == 0

    assert fresh.steps()["data"] == "up to date"


def test_leftovers_of_an_earlier_try_are_not_mixed_in(
    rendered: Sandbox, hub_project: Sandbox, hub: HubServer, tmp_path: Path
) -> None:
    """Files that an interrupted download of something else left behind do not become part of the base."""
    fresh = Sandbox(shutil.copytree(rendered.root, tmp_path / "another"))
    for project, model in ((fresh, "edgetune/tiny-phi3"), (hub_project, "acme/phi")):
        partial = project.root / f"model-cache/{model}.partial"
        partial.mkdir(parents=True)
        (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
        assert project.run("download", env={"HF_ENDPOINT": hub.url}).returncode == 0
        assert not (project.root / f"model-cache/{model}/model-00001-of-00002.safetensors").exists()


def test_weights_of_the_wrong_kind_put_there_by_hand_are_kept(
    hub_project: Sandbox, fetch: Fetch, hub: HubServer
) -> None:
    """Files put there that cannot be adopted are named, all of them; nothing is fetched over them."""
    folder = hub_project.root / "model-cache/acme/phi"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(TINY_FILES["config.json"])
    (folder / "pytorch_model.bin").write_bytes(b"pickle")

    result = fetch()

    assert result.returncode == 1
    assert "acme/phi has no weights as *.safetensors, only as pickle (pytorch_model.bin)" in result.stderr
    assert "acme/phi has no tokenizer.json" in result.stderr
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickle"
    assert hub.requests == []


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1", TINY_FILES["model.safetensors"][:-9]]
)
def test_weights_that_are_not_whole_are_not_adopted(content: bytes, hub_project: Sandbox) -> None:
    """A git-lfs pointer in the place of weights, and a copy that broke off, are noticed before the training."""
    folder = other_base(hub_project.root / "model-cache/acme/phi")
    (folder / "model.safetensors").write_bytes(content)

    result = hub_project.run("download")

    assert result.returncode == 1
    assert "model.safetensors of acme/phi is not a whole safetensors file" in result.stderr
    assert "git lfs pull" in result.stderr


def test_files_added_to_local_weights_can_be_locked(hub_project: Sandbox) -> None:
    """``--update-lock`` takes what is in the folder now when the weights came from a folder."""
    assert hub_project.run("download", "--from", str(TINY)).returncode == 0
    (weights(hub_project).parent / "LICENSE").write_text("free")

    result = hub_project.run("download", "--update-lock", env=NOWHERE)

    assert result.returncode == 0, result.stderr
    assert "LICENSE" in lock_of(hub_project)["acme/phi"]["files"]


def test_files_added_to_a_locked_model_are_refused(fresh: Sandbox) -> None:
    """What libraries would read beside the locked files is named before anything is trained; documents are not."""
    assert fresh.run("download").returncode == 0
    folder = fresh.root / "model-cache/edgetune/tiny-phi3"
    added = [folder / name for name in ("adapter_config.json", "model.safetensors.index.json", "added_tokens.json")]
    for path in (*added, folder / "LICENSE", folder / "notes.txt"):
        path.write_text("{}")

    result = fresh.run("train")

    assert result.returncode == 1
    for path in added:
        assert f"error: {path.relative_to(fresh.root).as_posix()}: " in result.stderr
    assert result.stderr.count("hint: move it away") == len(added) == result.stderr.count("error: ")
    for path in added:
        path.unlink()
    assert fresh.run("download").returncode == 0


def test_adapter_beside_weights_put_there_by_hand(hub_project: Sandbox) -> None:
    """A base model with an adapter's configuration in its folder is none: transformers would load both."""
    folder = hub_project.root / "model-cache/acme/phi"
    shutil.copytree(TINY, folder)
    (folder / "adapter_config.json").write_text("{}")

    result = hub_project.run("data", env=NOWHERE)

    assert result.returncode == 1
    assert "error: model-cache/acme/phi/adapter_config.json: transformers would load the adapter" in result.stderr


def test_local_weights_that_are_gone_are_not_looked_up(hub_project: Sandbox, fetch: Fetch, hub: HubServer) -> None:
    """A project locked to weights from a folder asks for that folder again, not for namesakes on the Hub."""
    assert hub_project.run("download", "--from", str(TINY)).returncode == 0
    shutil.rmtree(hub_project.root / "model-cache/acme")

    result = fetch()

    assert result.returncode == 1
    assert "acme/phi is locked to weights from a local folder" in result.stderr
    assert "edgetune download --from FOLDER" in result.stderr
    assert hub.requests == []
    assert hub_project.run("download", "--from", str(TINY)).returncode == 0


def test_missing_shard_is_told(hub_project: Sandbox) -> None:
    """A folder copied by hand only in part is not adopted."""
    folder = other_base(hub_project.root / "model-cache/acme/phi")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    result = hub_project.run("download")

    assert result.returncode == 1
    assert "acme/phi has no model-00002.safetensors" in result.stderr


def test_another_revision_than_the_locked_one_is_refused(hub_project: Sandbox, fetch: Fetch) -> None:
    """Changing the revision in the workflow file is not silently ignored."""
    assert fetch().returncode == 0
    hub_project.edit(lambda c: c["input_model"]["load_kwargs"].update(revision="f" * 40))

    result = fetch()

    assert result.returncode == 1
    assert "is not the locked one" in result.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3_text", "sliding_window_pattern": 4}, "other layers"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "YaRN"),
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


def test_download_from_its_own_workshop(fresh: Sandbox) -> None:
    """``--from`` the folder that downloads are built in is refused, and what lies there stays."""
    partial = fresh.root / "model-cache/edgetune/tiny-phi3.partial"
    shutil.copytree(TINY, partial)

    result = fresh.run("download", "--from", str(partial))

    assert result.returncode == 1
    assert "is where downloads are prepared" in result.stderr
    assert (partial / "config.json").is_file()


def test_damaged_small_files_are_told(fresh: Sandbox, tmp_path: Path) -> None:
    """A tokenizer or generation config that cannot be read is an error before anything is locked."""
    model = shutil.copytree(TINY, tmp_path / "model")
    for name in ("generation_config.json", "tokenizer.json"):
        (model / name).write_text("{")

    result = fresh.run("download", "--from", str(model))

    assert result.returncode == 1
    assert "has a damaged generation_config.json" in result.stderr
    assert "has a damaged tokenizer.json" in result.stderr
    assert not (fresh.root / "setup/model.lock.json").exists()
