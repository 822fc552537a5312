"""Real renders, the real built-in model, the real commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import forked

settings.register_profile("untimed", deadline=None)  # how long a case takes on a busy machine says nothing
settings.load_profile("untimed")

signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell has it ignored, children would inherit that

worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and sys.platform == "linux":
    # Where two trainings share cores, their threads wait for one another: each worker has cores of its own.
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "PYTHONWARNINGS": "default"}


@dataclass(frozen=True)
class Sandbox:
    """A rendered project and the commands a user would run in it."""

    root: Path

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run ``edgetune`` in the project, with both outputs captured (so neither is a terminal)."""
        if env or stdin:
            return self.command(sys.executable, "-m", "edgetune", *arguments, env=env, stdin=stdin)
        return forked.run(self.root, *arguments, environment=ENVIRONMENT)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``make`` in the project with the environment of the tests."""
        return self.command("make", f"VENV={sys.prefix}", *arguments)

    def command(
        self, *command: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run any command in the project."""
        return subprocess.run(
            command,
            cwd=self.root,
            env={**ENVIRONMENT, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )

    @property
    def config(self) -> Path:
        """The workflow file."""
        return self.root / "fine-tuning" / "olive-config.json"

    def edit(self, change: Callable[[Any], object]) -> None:
        """Change the workflow file as parsed JSON."""
        content = json.loads(self.config.read_text(encoding="utf-8"))
        change(content)
        self.config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def steps(self) -> dict[str, str]:
        """Return the state of each step as ``edgetune status`` tells it."""
        result = self.run("status", "--json")
        assert result.returncode == 0, result.stderr
        return {entry["step"]: entry["state"] for entry in json.loads(result.stdout)}

    def results(self) -> dict[str, bytes]:
        """Return all published results (not logs or caches) by name."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for name in ("data", "adapter", "merged", "onnx")
            for path in sorted((self.root / "gen-model" / name).rglob("*"))
            if path.is_file()
        }

    def keys(self) -> dict[str, str]:
        """Return the published stages' keys and build times: equal means nothing was built again."""
        return {name: content.decode() for name, content in self.results().items() if name.endswith("manifest.json")}


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sandbox]:
    """Render the template of this checkout into a path with a space."""
    from copier import run_copy

    def rendered(**answers: Any) -> Sandbox:
        target = tmp_path_factory.mktemp("a space") / "my-slm"
        run_copy(str(REPOSITORY), target, data=answers, defaults=True, quiet=True, vcs_ref="HEAD")
        return Sandbox(target)

    return rendered


@pytest.fixture(scope="session")
def tuned(rendered: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Fine-tune the default project once with its own make target. Not to be changed by tests."""
    sandbox = Sandbox(shutil.copytree(rendered.root, tmp_path_factory.mktemp("a space") / "my-slm"))
    result = sandbox.make("finetune")
    assert result.returncode == 0, result.stderr
    return sandbox


@pytest.fixture(scope="session")
def evaluated(tuned: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Evaluate a copy of the fine-tuned project with its make target. Not to be changed by tests."""
    sandbox = Sandbox(shutil.copytree(tuned.root, tmp_path_factory.mktemp("evaluated") / "my-slm"))
    result = sandbox.make("evaluate")
    assert result.returncode == 0, result.stderr
    return sandbox


@pytest.fixture
def project(tuned: Sandbox, tmp_path: Path) -> Sandbox:
    """Copy the fine-tuned project, to be changed at will."""
    return Sandbox(shutil.copytree(tuned.root, tmp_path / "my slm"))


@pytest.fixture(scope="session")
def rendered(render: Callable[..., Sandbox]) -> Sandbox:
    """Render the default project. Not to be changed by tests."""
    return render()


@pytest.fixture
def fresh(rendered: Sandbox, tmp_path: Path) -> Sandbox:
    """Copy the default project, to be changed at will; nothing has been run in it."""
    return Sandbox(shutil.copytree(rendered.root, tmp_path / "a space" / "my-slm"))
