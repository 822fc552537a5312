"""Run the project's workflow file through stock Olive."""

import os
import shutil
from pathlib import Path

from edgetune import workflow
from edgetune.errors import EdgetuneError, Problem
from edgetune.olive_process import check_installed, run_olive
from edgetune.stages import Job, run_lock


def run(job: Job) -> Path:
    """Run stock Olive in a process of its own; return the folder with its ONNX model.

    Raises EdgetuneError with Olive's last error lines when no model came out.
    """
    check_installed()
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
            run_olive(job, project.config, output, project.log("olive"), "*.onnx")
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
