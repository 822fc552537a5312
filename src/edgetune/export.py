"""Export: ``gen-model/merged/`` → ``gen-model/onnx.candidate/``, with a stage for each pass of the workflow file.

Without a MergeAdapterWeights pass it is the base model that is exported, and the adapter stays beside it. The
ModelBuilder pass is onnxruntime-genai's builder, stock Olive runs others; what the last makes is what is exported.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from edgetune import adapters, architectures, builder, dataset, passes
from edgetune.download import digests
from edgetune.errors import EdgetuneError, failure, first_line
from edgetune.onnx_backend import GENAI_CONFIG, load_exported
from edgetune.schema import ModelBuilder
from edgetune.stages import Job, Stage, published, write_json

_BUILDERS_NAMES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
"""What the builder calls execution providers."""

NAME = "export"
"""The stage of the last pass."""


def stages(job: Job) -> list[Stage]:
    """Return a stage for each pass from the merged model to the exported one."""
    names = list(job.workflow.exporting)
    made = [*(f"passes/{name}" for name in names[:-1]), NAME]
    return [
        Stage(stage, 3, partial(_inputs, name=name), partial(_build, name=name))
        for stage, name in zip(made, names, strict=False)  # a file that stock Olive judges is read without its passes
    ]


def _stage_before(job: Job, name: str) -> str | None:
    """Return the stage that makes what a pass is run on; None for the first pass."""
    order = list(job.workflow.exporting)
    return f"passes/{order[order.index(name) - 1]}" if name != order[0] else None


def _inputs(job: Job, *, name: str) -> dict[str, Any]:
    """Return what the result of a pass depends on."""
    before, step = _stage_before(job, name), job.workflow.passes[name]
    content: dict[str, Any] = {"pass": step.model_dump(exclude_none=True), "provider": job.workflow.provider}
    if before:
        content |= {before: [job.keys[before], published(job.project.stage_folder(before))]}
    elif job.workflow.merges:
        content |= {"merged": [job.keys["merge"], published(job.project.stage_folder("merge"))]}
    else:
        content |= {"base": digests(job, weights=True)} | adapters.inputs(job)
    if data := job.workflow.data_of(step):
        content |= {"data": dataset.content(job, {config.name: config for config in data})}
    if files := passes.named_files(job, content["pass"]):
        content |= {"files": files}
    return content


def _build(job: Job, folder: Path, *, name: str) -> dict[str, Any]:
    before = _stage_before(job, name)
    return run_pass(job, name, job.project.stage_folder(before) if before else source_folder(job), folder)


def run_passes(job: Job, folder: Path) -> dict[str, Any]:
    """Run all passes, one after the other, and leave the exported model in ``folder``. Raises EdgetuneError."""
    *others, last = job.workflow.exporting
    source, work = source_folder(job), folder / "passes"
    for name in others:
        (work / name).mkdir(parents=True)
        run_pass(job, name, source, work / name)
        source = work / name
    made = run_pass(job, last, source, folder)
    shutil.rmtree(work, ignore_errors=True)
    return made


def run_pass(job: Job, name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Run a pass on the model in ``source``; return its metrics.

    Raises EdgetuneError when that cannot be done, or what was made is not usable.
    """
    step = job.workflow.passes[name]
    if isinstance(step, ModelBuilder):
        return _export(job, name, source, folder)
    passes.run(job, name, source, folder)
    if not (folder / adapters.GRAPH).is_file():
        return {}
    _check_it_loads(job, name, folder)
    size = _size(folder)
    job.progress.say(f"{step.type}: {size / 1e6:.1f} MB")
    return {"bytes": size}


def _export(job: Job, name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Write the ONNX model with the builder: edgetune's way, or after a pass of Olive's, Olive's."""
    step, device, original = job.workflow.builder, _BUILDERS_NAMES[job.workflow.provider], source_folder(job)
    if source == original:
        run_builder(job, source, folder, step.precision, step.builder_options() | {"execution_provider": device})
    else:
        passes.run(job, name, architectures.builder_input(source, folder / "source"), folder)
        shutil.rmtree(folder / "source", ignore_errors=True)
        architectures.repair(job, original, folder)
    if adapters.is_beside(job):
        adapters.export(job, folder)
    config_path = folder / GENAI_CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["search"] |= _search_options(job, config["model"]["context_length"])
    write_json(config_path, config)
    # The runtime's own tokenizer reads this file; the builder does not copy it for every model class.
    shutil.copyfile(original / "tokenizer.json", folder / "tokenizer.json")
    _check_it_loads(job, name, folder)
    size, others = _size(folder), ", ".join(other.type for other in job.workflow.before_export)
    made = f"{step.precision}{f' by {others}' if others else ''} for {device}, {size / 1e6:.1f} MB"
    if adapters.is_beside(job):
        made += f", and {adapters.own(folder).stat().st_size / 1e6:.1f} MB of adapter beside it"
    job.progress.say(f"{made}, max_length {config['search']['max_length']}")
    return {"bytes": size, "max_length": config["search"]["max_length"]}


def source_folder(job: Job) -> Path:
    """Return the folder of the model that is exported: the merged one, or the base model where nothing is merged."""
    return job.project.stage_folder("merge") if job.workflow.merges else job.base_folder


def run_builder(job: Job, source: Path, folder: Path, precision: str, options: dict[str, Any]) -> None:
    """Make an ONNX model of the one in ``source``, for a CPU unless the options name another execution provider.

    Raises EdgetuneError when the builder cannot.
    """
    work = folder / "work"
    work.mkdir(exist_ok=True)
    given = architectures.builder_input(source, work / "source")
    try:
        builder.create(
            given,
            folder,
            work,
            precision,
            hf_token="false",  # noqa: S106 - everything is local; the builder's default asks the Hub client for a token
            hf_remote=job.workflow.trusts_code,
            **{"execution_provider": "cpu"} | adapters.builder_options(job) | options,
        )
    except EdgetuneError:
        raise
    except Exception as error:
        raise failure(
            f"onnxruntime-genai's builder failed: {type(error).__name__}: {first_line(error)}",
            where=job.project.name(job.project.log(job.progress.stage)),
            hint="the log has what it printed; --debug shows the traceback",
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    if not (folder / "model.onnx").is_file():
        where = job.project.name(job.project.log(job.progress.stage))
        raise failure("the builder ended without an ONNX model", where=where)
    architectures.repair(job, source, folder)


def _search_options(job: Job, context_length: int) -> dict[str, Any]:
    """Return the pass's search options; without ``max_length`` the KV cache is made for the whole context."""
    options = job.workflow.builder.search
    length = options.get("max_length", context_length)
    if length > context_length:
        raise failure(
            f"search.max_length {length} is longer than the model's context of {context_length} tokens",
            where=job.workflow.where_in_pass("ModelBuilder", "search", "max_length"),
            hint=f"use at most {context_length}",
        )
    return options


def _check_it_loads(job: Job, name: str, folder: Path) -> None:
    is_builder = isinstance(job.workflow.passes[name], ModelBuilder)
    hint = "check `search` and the int4 options of this pass" if is_builder else "check the keys of this pass"
    load_exported(folder, where=job.workflow.where("passes", name), hint=hint)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))
