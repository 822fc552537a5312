"""The models of a project that can be asked: which there are, where they lie, and how each is opened.

transformers runs base, adapter and merged, ONNX Runtime onnx; a backend takes token ids, so that every model is asked
just what it was trained on.
"""

from pathlib import Path

from edgetune import adapters, preflight
from edgetune.errors import EdgetuneError, failure
from edgetune.generation import Backend
from edgetune.onnx_backend import OnnxBackend
from edgetune.stages import Job, read_manifest, recover_at_rest
from edgetune.torch_backend import open_model, open_with_adapter

BACKENDS = ("base", "adapter", "merged", "onnx")
MADE_BY = {"adapter": "train", "merged": "merge", "onnx": "verify"}
"""The stage that publishes each model but the base model."""


def backends_of(job: Job) -> list[str]:
    """Return the backends that a project has: there may be no adapter, or it is not merged."""
    left_out = ("adapter",) * (job.workflow.tuning is None) + ("merged",) * (not job.workflow.merges)
    return [name for name in BACKENDS if name not in left_out]


def exported_from(job: Job) -> str:
    """Return which of the models is the one that is exported; with its adapter, where that stays beside it."""
    return "merged" if job.workflow.merges else "adapter" if job.workflow.tuning else "base"


def folder_of(job: Job, name: str) -> Path:
    """Return the folder of a backend's model. Raises EdgetuneError when there is none, or files of it are gone."""
    if name not in (there := backends_of(job)):
        lacking = "fine-tuning" if job.workflow.tuning is None else "MergeAdapterWeights"
        where, hint = job.workflow.where("passes"), f"use --backend {', '.join(there[:-1])} or {there[-1]}"
        raise failure(f"there is no {name} model: the workflow has no {lacking} pass", where=where, hint=hint)
    if name == "base":
        folder = job.base_folder
        if not (folder / "config.json").is_file():
            where = job.project.name(folder)
            raise failure("the base model is not there yet", where=where, hint="run `edgetune download`")
        return folder
    folder = job.project.stage_folder(MADE_BY[name])
    recover_at_rest(job.project, folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise _missing(job, name, folder)
    if lost := [file for file in manifest["outputs"] if not (folder / file).is_file()]:
        where, hint = job.project.name(folder), f"run `{_command(job)}`: it makes it again"
        raise failure(f"the {name} model has lost {', '.join(lost)}", where=where, hint=hint)
    return folder


def _command(job: Job) -> str:
    return "edgetune finetune" + (" --engine olive" if job.project.olive else "")


def _missing(job: Job, name: str, folder: Path) -> EdgetuneError:
    project = job.project
    candidate = project.stage_folder("export")
    if name == "onnx" and read_manifest(candidate) is not None:
        where = project.name(candidate)
        return failure("the model was exported, but not verified yet", where=where, hint="run `edgetune verify`")
    if name == "onnx" and project.refused_model.is_dir():
        before = exported_from(job)
        hint = f"{project.name(project.verdict)} says why; `--backend {before}` asks the model before its conversion"
        return failure("verification refused the exported model", where=project.name(project.refused_model), hint=hint)
    hint = f"run `make {'olive' if project.olive else 'finetune'}` (or `{_command(job)}`) first"
    return failure(f"there is no {name} model yet", where=project.name(folder), hint=hint)


def open_backend(job: Job, name: str, adapter: str | None = None) -> Backend:
    """Load one of ``BACKENDS``, the exported one with an adapter by its name. Raises EdgetuneError when it is missing.

    All of them answer within the context length of the exported model, so that their answers can be compared.
    """
    folder = folder_of(job, name)
    if name == "onnx":
        return OnnxBackend(folder, adapters.chosen(job, folder, adapter) if adapter else None)
    if name == "adapter":
        return open_with_adapter(job, folder)
    return open_model(job, folder, preflight.trained_dtype(job))
