"""Run one pass of the workflow file through stock Olive: a model's folder → another one.

Reads what the step before it made, in safetensors or ONNX. Olive works in a process of its own, on a workflow file that
has this one pass; what it knows of a model beside its files goes along in ``model_attributes.json``.
"""

import glob
import os
import shutil
from pathlib import Path
from typing import Any

from edgetune.adapters import GRAPH
from edgetune.errors import failure
from edgetune.olive_process import OF_OLIVE, run_olive
from edgetune.schema import ModelBuilder
from edgetune.stages import MANIFEST, Job, read_json, write_json

_ATTRIBUTES = "model_attributes.json"
_OF_TRANSFORMERS = {"config.json", "generation_config.json"}
"""What Olive copies to an exported model, which has no use for it."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".onnx", ".data")


def run(job: Job, name: str, source: Path, folder: Path) -> None:
    """Run the pass on the model in ``source``; its result fills ``folder``.

    Raises EdgetuneError when Olive cannot, ignores a key of the pass, or makes something that is no such model.
    """
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    try:
        _run(job, name, source, folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(job: Job, name: str, source: Path, folder: Path, work: Path) -> None:
    step, where = job.workflow.passes[name], job.workflow.where("passes", name)
    given = _model(job, source)
    write_json(work / "workflow.json", _workflow(job, name, given, work))
    made = run_olive(job, work / "workflow.json", work / "out", where)
    wanted = "ONNXModel" if isinstance(step, ModelBuilder) else given["type"]
    if made["type"].lower() != wanted.lower() or made["config"].get("adapter_path"):
        what = "an adapter" if made["config"].get("adapter_path") else f"{made['type']} from {given['type']}"
        message = f"{step.type} makes {what}, which the native engine cannot go on with"
        raise failure(message, where=where, hint="run with `--engine olive`")
    if wanted == "ONNXModel":
        _take_onnx(made["config"], source, folder)
    else:
        _take_weights(made["config"], source, folder)


def _workflow(job: Job, name: str, model: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return a workflow file with this pass alone; relative paths in it count from the folder of the project's own."""
    workflow, step = job.workflow, job.workflow.passes[name]
    return {
        "input_model": model,
        "systems": {workflow.target: workflow.systems[workflow.target].model_dump()},
        "data_configs": [data.model_dump(exclude_unset=True) for data in workflow.data_of(step)],
        "passes": {name: step.model_dump(exclude_unset=True)},
        "host": workflow.target,
        "target": workflow.target,
        "cache_dir": str(work.absolute() / "cache"),
        "output_dir": str(work.absolute() / "out"),
        "log_severity_level": 1,
    }


def _model(job: Job, source: Path) -> dict[str, Any]:
    """Return how a workflow file describes the model in a folder."""
    path = str(source.absolute())
    if (source / GRAPH).is_file():
        others = [file for file in _files(source) if not file.name.endswith(_WEIGHTS)]
        files = sorted(str(file.absolute()) for file in others)
        return {
            "type": "ONNXModel",
            "model_path": path,
            "onnx_file_name": GRAPH,
            "model_attributes": {"additional_files": files},
        }
    trust = {"trust_remote_code": job.workflow.trusts_code}
    attributes = read_json(source / _ATTRIBUTES) or {}
    return {"type": "HfModel", "model_path": path, "load_kwargs": trust, "model_attributes": attributes}


def _files(folder: Path) -> list[Path]:
    """Return the files of a model; not what a step wrote about it."""
    return [path for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST, _ATTRIBUTES)]


def _take_onnx(made: dict[str, Any], source: Path, folder: Path) -> None:
    unwanted = OF_OLIVE | {name for name in _OF_TRANSFORMERS if not (source / GRAPH).is_file()}
    path = Path(made["model_path"])
    for file in _files(path if path.is_dir() else path.parent):
        if file.name not in unwanted:
            file.replace(folder / file.name)


def _take_weights(made: dict[str, Any], source: Path, folder: Path) -> None:
    """Take over the files, and those of the model before that Olive leaves out; a quantised model keeps its config.

    transformers writes config.json anew, with other names than :mod:`edgetune.architectures` knows.
    """
    for file in _files(Path(made["model_path"])):
        file.replace(folder / file.name)
    for file in _files(source):
        if not file.name.endswith(_WEIGHTS) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    if quantised := (read_json(path) or {}).get("quantization_config"):
        write_json(path, (read_json(source / "config.json") or {}) | {"quantization_config": quantised})
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    if attributes := made.get("model_attributes"):
        write_json(folder / _ATTRIBUTES, attributes)


def named_files(job: Job, value: Any) -> dict[str, str]:
    """Return the sha256 of the files that texts anywhere in a part of the workflow file name.

    They name them by themselves, their folder or a pattern. What the steps make does not count.
    """
    project, found = job.project, dict[str, str]()
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            found |= named_files(job, entry)
        return found
    path = os.path.normpath(project.config_folder / value) if isinstance(value, str) else str(project.root)
    # A delimiter may be "/". os.path says no to texts that are no paths, where pathlib would raise.
    if project.config_folder.is_relative_to(path) or Path(path).is_relative_to(project.gen_model):
        return found
    for named in map(Path, [path] if os.path.exists(path) else glob.glob(path)):  # noqa: PTH110, PTH207
        files = named.rglob("*") if named.is_dir() and named != project.olive_cache else [named]
        found |= {project.name(file): job.hashes[file] for file in sorted(files) if file.is_file()}
    return found
