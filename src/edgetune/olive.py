"""Run the project's workflow file through stock Olive: → ``gen-model/olive/``.

What Olive makes gets the folders and manifests that the native engine would give it, so that it can be asked, verified
and evaluated in the same way: ``adapter/`` and ``merged/`` out of Olive's cache, and ``onnx/``.
"""

import os
import re
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from edgetune import config, verify, workflow
from edgetune.errors import Problem, failure, refuse
from edgetune.installed import installed_version
from edgetune.olive_process import OF_OLIVE, check_installed, run_olive
from edgetune.passes import named_files
from edgetune.project import Project
from edgetune.stages import Build, Job, building, key_of, read_json, read_manifest, run_lock, versions, write_json

_HINT = "run `edgetune finetune --engine olive` first"


def run(job: Job) -> Path:
    """Run stock Olive in a process of its own; return the folder with its results.

    Raises EdgetuneError with Olive's error lines when no model came out; then earlier results stay.
    """
    check_installed()
    project = job.project
    _check_folders(job)
    if job.base_id:  # otherwise Olive resolves the path by itself
        workflow.run(job, "download")
    output, earlier = project.olive_output, project.olive_output.with_suffix(".old")
    with run_lock(project), job.progress.running("olive", project.log("olive")):
        _clear_stale_cache(job)
        if verify.exported(replace(job, project=replace(project, olive=True))):
            shutil.rmtree(earlier, ignore_errors=True)  # of a run that was killed when it had finished
        if not earlier.exists() and output.exists():
            output.rename(earlier)
        shutil.rmtree(output, ignore_errors=True)
        try:
            _arrange(job, run_olive(job, project.config, output))
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)
            if earlier.exists():
                earlier.rename(output)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    return output


def _clear_stale_cache(job: Job) -> None:
    """Empty Olive's cache when files that the workflow file names, or versions, are others than before.

    Olive goes by the text of the workflow file alone: an edited data set would give the old adapter.
    """
    source = config.read(job.project.config, job.project.name(job.project.config))
    content = {
        "files": named_files(job, source.data),
        "versions": [versions(), installed_version("olive-ai")],
    }
    job.hashes.save()
    key, cache = key_of("olive cache", 1, content), job.project.olive_cache
    if (read_json(job.project.olive_cache_key) or {}).get("key") == key:
        return
    if cache.exists():
        job.progress.say(f"{job.project.name(cache)} is cleared: data, base model or versions changed")
        shutil.rmtree(cache)
    write_json(job.project.olive_cache_key, {"key": key})


def _arrange(job: Job, made: dict[str, Any]) -> None:
    """Give Olive's results the folders and manifests of the steps that would have made them."""
    output, project = job.project.olive_output, replace(job.project, olive=True)
    is_onnx = made["type"].lower() == "onnxmodel"
    files = [path for path in output.iterdir() if path.name not in OF_OLIVE] if is_onnx else []
    results = _intermediate(read_json(output / "footprint.json") or {})
    for stage, folder in results.items():
        with _publishing(project, stage) as build:
            shutil.copytree(folder, build.folder, dirs_exist_ok=True)
    if files:
        with _publishing(project, "verify") as build:
            for path in files:
                path.rename(build.folder / path.name)


def _publishing(project: Project, stage: str) -> AbstractContextManager[Build]:
    return building(project.stage_folder(stage), stage, uuid4().hex, {})


def _intermediate(models: dict[str, Any]) -> dict[str, Path]:
    """Return the folders of the adapter and of the merged model, where Olive keeps them, by their stages."""
    results: dict[str, Path] = {}
    for entry in models.values():
        given = entry["model_config_data"] or {}
        model = given.get("config", {})
        if adapter := model.get("adapter_path"):
            results["train"] = Path(adapter)
        elif "train" in results and "merge" not in results and given["type"].lower() == "hfmodel":
            results["merge"] = Path(model["model_path"])
    return results


def open_job(job: Job) -> Path:
    """Return the folder of Olive's exported model, and make the data it is examined with.

    Raises EdgetuneError when there is none.
    """
    model = verify.exported(job)
    if model is None:
        raise failure("stock Olive has exported no model yet", where=job.project.name(job.project.results), hint=_HINT)
    job.max_bad = sys.maxsize  # Olive has trained on what it could read
    workflow.run(job, "data")
    job.keys["export"] = str((read_manifest(model) or {})["key"])
    return model


def check(job: Job, limits: verify.Limits) -> None:
    """Verify the model that Olive made. Raises GateError when it does not pass."""
    model = open_job(job)
    folders = [job.project.stage_folder(stage) for stage in ("train", "merge")] if job.workflow.tuning else []
    if missing := [job.project.name(folder) for folder in folders if read_manifest(folder) is None]:
        message = f"stock Olive made no {' and no '.join(missing)}, which the exported model is compared with"
        hint = "LoRA, QLoRA or DoRA, MergeAdapterWeights and ModelBuilder in this order can be verified"
        raise failure(message, where=job.workflow.where("passes"), hint=hint)
    with run_lock(job.project):
        verify.verify(job, model, limits, repeat=True)


def _check_folders(job: Job) -> None:
    """Raise EdgetuneError unless Olive is told to use the project's own folders alone: they are cleared here."""
    project, problems = job.project, []
    for key, folder in (("cache_dir", project.olive_cache), ("output_dir", project.olive_output)):
        given = getattr(job.workflow, key)
        if Path(os.path.normpath(project.config_folder / given)) != folder:
            wanted = os.path.relpath(folder, project.config_folder)
            message = f"{key} is {given!r}; the olive engine works in {project.name(folder)}"
            problems.append(Problem(message, job.workflow.where(key), f'write "{key}": "{wanted}"'))
    if re.search(r"[/\\:\0]|^\.\.$", name := job.workflow.workflow_id):
        message = f"workflow_id is {name!r}, which Olive makes the name of a folder in its cache"
        problems.append(Problem(message, job.workflow.where("workflow_id"), "use letters, digits, - and _"))
    refuse(problems)
