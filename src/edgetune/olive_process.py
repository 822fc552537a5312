"""Stock Olive in a process of its own, and whether it failed: Olive itself exits 0."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from edgetune.errors import EdgetuneError, failure, missing_extra
from edgetune.hub import load_dotenv
from edgetune.stages import Job


def is_installed() -> bool:
    """Tell whether Olive is there; it is not imported."""
    return find_spec("olive") is not None


def check_installed() -> None:
    """Raise EdgetuneError without Olive."""
    if not is_installed():
        raise missing_extra("olive", ImportError(name="olive-ai"))


def run_olive(job: Job, config: Path, output: Path, log: Path, pattern: str) -> Path:
    """Run a workflow file; return the file below ``output``, where the file says Olive is to write, that matches.

    Relative paths in it count from the folder of the project's own. What Olive prints goes to ``log``. Raises
    EdgetuneError with Olive's last error line when there is no such file, whatever its exit code.
    """
    check_installed()
    command = [sys.executable, "-m", "olive", "run", "--config", str(config)]
    lines: list[str] = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
            command,
            cwd=job.project.config_folder,
            env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"} | _hub_access(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                lines.append(line.rstrip())
                if "Running pass" in line:
                    job.progress.say(line[line.index("Running pass") :].strip())
        except BaseException:
            process.terminate()
            raise
    made = next(output.rglob(pattern), None)
    if process.returncode != 0 or made is None:
        raise _failed(job, log, lines, process.returncode)
    return made


def _hub_access(job: Job) -> dict[str, str]:
    """Let Olive ask the Hub only where data come from it: the base model is here."""
    if any(data.load_dataset_config.is_hub for data in job.workflow.data_configs):
        load_dotenv(job.project.dotenv)
        return {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return {"HF_HUB_OFFLINE": "1"}


def _failed(job: Job, log: Path, lines: list[str], code: int) -> EdgetuneError:
    errors = [line for line in lines if "ERROR" in line or "Error:" in line] or lines or ["nothing"]
    return failure(
        f"stock Olive produced no model (its exit code was {code}); it said: {errors[-1].strip()}",
        where=job.project.name(log),
        hint="the log has all it printed",
    )
