"""``edgetune doctor``: what it finds of machine, packages, Hub and project, and what it says to do."""

import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import forked
from conftest import ENVIRONMENT, Sandbox
from edgetune import machine, surroundings
from hub_server import HubServer
from test_template import CATALOGUE

OFFLINE = {"HF_HUB_OFFLINE": "1"}
TOKEN = "hf_" + "s3cret" * 5
Examine = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def examine(fresh: Sandbox) -> Examine:
    """Return what runs ``edgetune doctor --json`` in the project, and gives its exit code and findings by name."""

    def run(**environment: str) -> tuple[int, dict[str, dict[str, str]]]:
        result = forked.run(fresh.root, "doctor", "--json", environment=ENVIRONMENT | environment)
        assert TOKEN not in result.stdout + result.stderr
        return result.returncode, {finding["name"]: finding for finding in json.loads(result.stdout)}

    return run


@pytest.fixture
def server() -> Iterator[HubServer]:
    """Serve an empty model as ``acme/phi`` until the test ends."""
    with HubServer({"config.json": b"{}"}) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def use_model(project: Sandbox, name: str) -> None:
    """Let the workflow file name another base model."""
    project.edit(lambda c: c["input_model"].update(model_path=f"../model-cache/{name}"))


def test_a_sound_project_passes_in_plain_lines(fresh: Sandbox) -> None:
    """Piped, every line is a state, a name and a sentence in ASCII; nothing fails, and nothing was written."""
    before = sorted(fresh.root.rglob("*"))

    result = fresh.run("doctor")

    assert result.returncode == 0, result.stdout
    assert result.stdout.isascii()
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert all(re.match(r"(ok  |warn) [a-z]+( model)? +\S", line) for line in lines)
    names = [line[5:17].strip() for line in lines]
    wanted = ("python", "packages", "onnxruntime", "processor", "gpu", "memory", "disk", "hub")
    assert names == [*wanted, "template", "conflicts", "workflow", "base model", "runs"]
    assert "hub         not needed" in result.stdout
    assert sorted(fresh.root.rglob("*")) == before


def test_outside_of_a_project_the_machine_is_examined(tmp_path: Path) -> None:
    """There is no project to find fault with, and that is no error."""
    result = Sandbox(tmp_path).run("doctor", env=OFFLINE)

    assert result.returncode == 0, result.stdout
    assert "processor" in result.stdout
    assert "workflow" not in result.stdout
    assert "no project here" in result.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"passes": [1], "systems": {"a": {"execution_providers": 3}}}', ""])
def test_a_broken_workflow_file_stops_no_other_check(fresh: Sandbox, examine: Examine, content: str) -> None:
    """Its problem is one finding of many, with its line and a remedy where there is one."""
    fresh.config.write_text(content)

    code, found = examine()

    assert code == 1
    assert found["workflow"]["state"] == "fail"
    assert "fine-tuning/olive-config.json" in found["workflow"]["summary"]
    assert {"python", "memory", "conflicts", "runs"} <= {
        name for name, entry in found.items() if entry["state"] == "ok"
    }


def test_problems_of_the_workflow_file_are_counted(fresh: Sandbox, examine: Examine) -> None:
    """The first three are named with their lines."""
    fresh.edit(lambda c: c["passes"]["lora"].update(ranc=3, alhpa=2, r=-1, lora_dropout=4, bias="none"))

    code, found = examine()

    assert code == 1
    assert len(re.findall(r"olive-config\.json:\d+:", found["workflow"]["summary"])) == 3
    assert re.search("; and [2-9] more$", found["workflow"]["summary"])


def test_conflicts_left_by_an_update(fresh: Sandbox, examine: Examine) -> None:
    """Conflict marks are told with file and line, and so are .rej files; a Markdown heading is no conflict."""
    marks = "a\n<<<<<<< before updating\nold\n=======\nnew\n>>>>>>> after updating\n"
    (fresh.root / "fine-tuning/README.md").write_text(marks)
    (fresh.root / "setup/requirements.txt.rej").touch()
    (fresh.root / "datasets/README.md").write_text("Title\n=======\n<<<<<<< no end\n")
    (fresh.root / "gen-model/notes.md").write_text(marks)

    code, found = examine()

    assert code == 1
    summary = found["conflicts"]["summary"]
    assert summary == "left open in fine-tuning/README.md:2, setup/requirements.txt.rej"


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        (".copier-answers.yml", "_commit: v9.9.9", "the template is v9.9.9"),
        ("setup/requirements.txt", "edgetune[train]==0.0.1", "setup/requirements.txt asks for 0.0.1"),
        (
            "setup/requirements.txt",
            "edgetune[train,export] @ git+https://example.org/e.git@v0.0.1",
            "setup/requirements.txt asks for v0.0.1",
        ),
    ],
)
def test_template_and_runtime_of_different_versions(
    fresh: Sandbox, examine: Examine, file: str, line: str, told: str
) -> None:
    """A skew is a warning that says which two versions there are."""
    (fresh.root / file).write_text(f"# written\n{line}\n")

    code, found = examine()

    assert code == 0
    assert found["template"]["state"] == "warn"
    assert found["template"]["summary"].startswith(f"{told}, installed is edgetune ")
    assert found["template"]["remedy"]


def test_a_gated_model_needs_a_token(fresh: Sandbox, examine: Examine, server: HubServer) -> None:
    """Without one it fails; with one in .env it says where it is, shows none of it and sends it nowhere."""
    use_model(fresh, "meta-llama/Llama-3.2-1B-Instruct")
    code, found = examine(HF_ENDPOINT=server.url)
    assert code == 1
    assert found["token"]["state"] == "fail"
    assert "accept the terms on https://huggingface.co/meta-llama/" in found["token"]["remedy"]

    (fresh.root / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    code, found = examine(HF_ENDPOINT=server.url)

    assert code == 0, found
    assert found["token"]["summary"] == "present, in .env"
    assert server.requests
    assert not any(request.authorization for request in server.requests)


def test_gated_models_of_the_catalogue_are_known() -> None:
    """The doctor's list and the template's notes speak of the same models."""
    gated = {name for name, entry in CATALOGUE.items() if "gated" in entry["note"]}

    assert gated == {name for name in CATALOGUE if name.startswith(surroundings.GATED)}


def test_the_hub_is_asked_only_when_it_is_needed(fresh: Sandbox, examine: Examine, server: HubServer) -> None:
    """For a model that is not here, the server must answer; with the built-in one, nobody is asked."""
    code, found = examine(HF_ENDPOINT=server.url)
    assert (code, server.requests) == (0, [])

    use_model(fresh, "acme/phi")
    code, found = examine(HF_ENDPOINT=server.url)
    assert code == 0
    assert found["hub"]["summary"] == f"{server.url} answers; to fetch: acme/phi"
    assert found["token"]["state"] == "ok"

    code, found = examine(HF_ENDPOINT="http://someone:secret@127.0.0.1:9")
    assert code == 1
    assert found["hub"]["summary"].startswith("cannot be reached: http://127.0.0.1:9: ")
    assert "HF_ENDPOINT" in found["hub"]["remedy"]

    code, found = examine(HF_ENDPOINT=server.url, **OFFLINE)
    assert code == 1
    assert found["hub"]["summary"] == "HF_HUB_OFFLINE is set, and acme/phi is not here"


def test_a_base_model_that_differs_from_its_lock(fresh: Sandbox, examine: Examine) -> None:
    """A file of another size, and a lock that cannot be read, are told without reading the weights."""
    assert fresh.run("download").returncode == 0
    assert examine()[1]["base model"]["summary"].endswith("as locked (by sizes)")

    weights = fresh.root / "model-cache/edgetune/tiny-phi3/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, found = examine()
    assert code == 1
    assert "differs from the lock in model.safetensors" in found["base model"]["summary"]

    (fresh.root / "setup/model.lock.json").write_text("{")
    assert examine()[1]["base model"]["summary"] == "setup/model.lock.json: the lock file is damaged"


def test_a_base_model_too_large_for_this_machine(fresh: Sandbox, examine: Examine) -> None:
    """Memory and disk are held against the locked size of the base model."""
    use_model(fresh, "acme/huge")
    files = {"model.safetensors": {"size": 10**16, "sha256": "0" * 64}}
    lock = {"acme/huge": {"source": "hub", "revision": "0" * 40, "files": files}}
    (fresh.root / "setup/model.lock.json").write_text(json.dumps(lock))

    code, found = examine(**OFFLINE)

    assert code == 1
    assert (found["memory"]["state"], found["disk"]["state"]) == ("fail", "fail")
    assert "10.0 PB" in found["memory"]["summary"]
    assert "30.0 PB" in found["disk"]["summary"]  # the model, its merged copy, and the exported one


def test_runs_that_were_interrupted_or_go_on(fresh: Sandbox, examine: Examine) -> None:
    """Half-built results are a warning, unless a run is at work on them now."""
    (fresh.root / "gen-model/adapter.partial").mkdir()
    code, found = examine()
    assert code == 0
    assert found["runs"]["state"] == "warn"
    assert found["runs"]["summary"] == "one was interrupted: gen-model/adapter.partial"

    with FileLock(fresh.root / "gen-model/.lock"):
        assert examine()[1]["runs"]["summary"] == "one is at work in this project now"


def installed_as(folder: Path, **versions: str) -> dict[str, str]:
    """Let packages seem to be installed: their metadata are all that is read."""
    for name, version in versions.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    paths = [str(folder), *filter(None, [ENVIRONMENT.get("PYTHONPATH")])]
    return OFFLINE | {"PYTHONPATH": ":".join(paths)}


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [
        ("0.1", "fail", r"peft 0\.1 \(needed: >=0\.21\)"),
        ("0.99", "warn", r"not the tested versions: .*peft 0\.99 \(tested: 0\.21\.2\)"),
    ],
)
def test_packages_of_other_versions(fresh: Sandbox, tmp_path: Path, version: str, state: str, said: str) -> None:
    """What cannot work fails, what was not tested is a warning; both say what is needed."""
    result = fresh.run("doctor", "--json", env=installed_as(tmp_path / "site", peft=version))

    found = next(entry for entry in json.loads(result.stdout) if entry["name"] == "packages")
    assert found["state"] == state
    assert re.search(said, found["summary"])
    assert "requirements.txt" in found["remedy"]


def test_two_flavours_of_a_package(fresh: Sandbox, tmp_path: Path) -> None:
    """They overwrite each other's files: the command that ends it is the remedy."""
    result = fresh.run("doctor", env=installed_as(tmp_path / "site", onnxruntime_gpu="1.31.1"))

    assert result.returncode == 1
    assert "fail onnxruntime onnxruntime and onnxruntime-gpu overwrite each other" in result.stdout
    assert "`pip uninstall -y onnxruntime onnxruntime-gpu`" in result.stdout
    assert "error: 1 of 13 checks failed: onnxruntime" in result.stderr


def test_flavours_that_do_not_fit_the_workflow_file(fresh: Sandbox, examine: Examine) -> None:
    """The packages for a CPU cannot run what is exported for a GPU."""
    wanted = {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}
    fresh.edit(lambda c: c["systems"]["local_system"].update(accelerators=[wanted]))

    found = examine()[1]["onnxruntime"]

    assert found["state"] == "fail"
    assert "these are for cpu, the workflow file exports for cuda" in found["summary"]


def test_bfloat16_without_instructions_for_it_is_told(fresh: Sandbox, examine: Examine) -> None:
    """Slow training is a warning with the setting that mends it; float32 is none."""
    assert examine()[1]["processor"]["state"] == "ok"
    fresh.edit(lambda c: c["passes"]["lora"].update(torch_dtype="bfloat16"))

    found = examine()[1]["processor"]

    assert found["state"] == ("warn" if machine.has_bf16() is False else "ok")
    assert ('"torch_dtype": "float32"' in found["remedy"]) == (found["state"] == "warn")


def test_colours_are_for_terminals(fresh: Sandbox) -> None:
    """On a terminal states are coloured; NO_COLOR is obeyed."""
    command = shlex.join([sys.executable, "-m", "edgetune", "doctor"])

    def on_a_terminal(**environment: str) -> str:
        environment |= OFFLINE | {"TERM": "xterm"}
        return fresh.command("script", "--quiet", "--command", command, "/dev/null", env=environment).stdout

    assert "\x1b[32mok" in on_a_terminal()
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")


def system(root: Path, **files: str) -> Path:
    """Write the system's own files, named with ``__`` for a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         100 kB\nMemAvailable:    8000000 kB\n"
V2 = {
    "proc__self__cgroup": "0::/box\n",
    "sys__fs__cgroup__box__memory_dot_max": "4000000000",
    "sys__fs__cgroup__box__memory_dot_current": "3000000000",
    "sys__fs__cgroup__box__memory_dot_stat": "anon 1\ninactive_file 500000000\n",
    "sys__fs__cgroup__box__cpu_dot_max": "150000 100000",
}
V1 = {
    "proc__self__cgroup": "4:memory:/elsewhere/box\n1:cpu,cpuacct:/\n0::/\n",
    "sys__fs__cgroup__memory__memory_dot_limit_in_bytes": "4000000000",
    "sys__fs__cgroup__memory__memory_dot_usage_in_bytes": "3000000000",
    "sys__fs__cgroup__memory__memory_dot_stat": "inactive_file 1\ntotal_inactive_file 500000000\n",
    "sys__fs__cgroup__cpu,cpuacct__cpu_dot_cfs_quota_us": "100000",
    "sys__fs__cgroup__cpu,cpuacct__cpu_dot_cfs_period_us": "100000",
}


@pytest.mark.parametrize("group", [V2, V1], ids=["version 2", "version 1"])
def test_a_containers_limits_count(tmp_path: Path, group: dict[str, str]) -> None:
    """Memory and cores are what the container has; old pages of files are free, and other groups do not count."""
    root = system(tmp_path, proc__meminfo=MEMINFO, **group)

    assert machine.memory_bytes(root) == machine.Memory(4_000_000_000, 1_500_000_000)
    assert machine.cores(root) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's description of the processors")
def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    """All processors are said to be threads of one core; where nothing is said, each counts."""
    assert machine.physical_cores(tmp_path) == machine.cores(tmp_path)
    for number in os.sched_getaffinity(0):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-99\n", encoding="ascii")

    assert machine.physical_cores(tmp_path) == 1


@pytest.mark.parametrize("limit", ["max", "99999999999999999"])
def test_without_a_limit_the_machines_memory_counts(tmp_path: Path, limit: str) -> None:
    """A group without a limit, or with one beyond the machine, changes nothing."""
    root = system(tmp_path, proc__meminfo=MEMINFO, **V2 | {"sys__fs__cgroup__box__memory_dot_max": limit})

    assert machine.memory_bytes(root) == machine.Memory(16_384_000_000, 8_192_000_000)


@pytest.mark.parametrize(
    ("text", "features", "has_bf16"),
    [
        (
            "model name\t: Xeon\nflags\t\t: sse2 avx512f amx_bf16\n\nprocessor : 1\n",
            {"sse2", "avx512f", "amx_bf16"},
            True,
        ),
        ("model name\t: Xeon\nflags\t\t: sse2 avx2\n", {"sse2", "avx2"}, False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", {"fp", "asimd", "bf16", "i8mm"}, True),
    ],
)
def test_instruction_sets(tmp_path: Path, text: str, features: set[str], *, has_bf16: bool) -> None:
    """Both of Linux's spellings are read: of x86 and of ARM processors."""
    root = system(tmp_path, proc__cpuinfo=text)

    assert machine.cpu_features(root) == frozenset(features)
    assert machine.has_bf16(root) is has_bf16
