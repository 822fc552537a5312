"""Run the project's workflow file through stock Olive, and notice when it failed: Olive itself exits 0."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from edgetune import workflow
from edgetune.errors import EdgetuneError, Problem, failure, missing_extra
from edgetune.hub import load_dotenv
from edgetune.stages import Job, run_lock


def run(job: Job) -> Path:
    """Run stock Olive in a process of its own; return the folder with its ONNX model.

    Raises EdgetuneError with Olive's last error lines when no model came out.
    """
    if find_spec("olive") is None:
        raise missing_extra("olive", ImportError(name="olive-ai"))
    project = job.project
    _check_folders(job)
    if job.base_id:  # otherwise Olive resolves the path by itself
        workflow.run(job, "download")
    output, earlier = project.olive_output, project.olive_output.with_suffix(".old")
    with run_lock(project), job.progress.running("olive", project.log("olive")):
        # Olive's cache key leaves out the bytes of the data files: an edited dataset would give the old adapter.
        shutil.rmtree(project.olive_cache, ignore_errors=True)
        if not earlier.exists() and output.exists():
            output.rename(earlier)
        shutil.rmtree(output, ignore_errors=True)
        try:
            _run_olive(job)
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)
            if earlier.exists():
                earlier.rename(output)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    return output


def _check_folders(job: Job) -> None:
    """Raise EdgetuneError unless Olive is told to use the project's own folders: they are cleared here."""
    project, problems = job.project, []
    for key, folder in (("cache_dir", project.olive_cache), ("output_dir", project.olive_output)):
        given = getattr(job.workflow, key)
        if Path(os.path.normpath(project.config_folder / given)) != folder:
            wanted = os.path.relpath(folder, project.config_folder)
            message = f"{key} is {given!r}; the olive engine works in {project.name(folder)}"
            problems.append(Problem(message, job.workflow.where(key), f'write "{key}": "{wanted}"'))
    if problems:
        raise EdgetuneError(problems)


def _hub_access(job: Job) -> dict[str, str]:
    """Let Olive ask the Hub only where data come from it: the base model is here."""
    if any(data.load_dataset_config.is_hub for data in job.workflow.data_configs):
        load_dotenv(job.project.dotenv)
        return {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return {"HF_HUB_OFFLINE": "1"}


def _run_olive(job: Job) -> None:
    """Run the process. Raises EdgetuneError when it leaves no ONNX model, whatever its exit code."""
    project = job.project
    command = [sys.executable, "-m", "olive", "run", "--config", project.config.name]
    lines: list[str] = []
    with (
        project.log("olive").open("w", encoding="utf-8") as log,
        subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
            command,
            cwd=project.config_folder,
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
                log.write(line)
                lines.append(line.rstrip())
                if "Running pass" in line:
                    job.progress.say(line[line.index("Running pass") :].strip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0 or not any(project.olive_output.rglob("*.onnx")):
        raise _failed(job, lines, process.returncode)


def _failed(job: Job, lines: list[str], code: int) -> Exception:
    errors = [line for line in lines if "ERROR" in line or "Error:" in line] or lines or ["nothing"]
    return failure(
        f"stock Olive produced no model (its exit code was {code}); it said: {errors[-1].strip()}",
        where=job.project.name(job.project.log("olive")),
        hint="the log has all it printed",
    )
