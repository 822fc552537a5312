"""Export with onnxruntime-genai's builder: ``gen-model/merged/`` → ``gen-model/onnx.candidate/``.

Without a fine-tuning pass, it is the base model that is exported.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from edgetune import architectures, builder, gptq
from edgetune.backends import GENAI_CONFIG, load_exported
from edgetune.download import digests
from edgetune.errors import EdgetuneError, failure
from edgetune.stages import Job, Stage, published, write_json

_BUILDERS_NAMES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
"""What the builder calls execution providers."""


def inputs(job: Job) -> dict[str, Any]:
    """Return what the exported model depends on."""
    return {
        **(_merged(job) if job.workflow.tuning else {"base": digests(job, weights=True)}),
        "pass": job.workflow.builder.model_dump(exclude_none=True),
        "provider": job.workflow.provider,
        **gptq.inputs(job),
    }


def _merged(job: Job) -> dict[str, Any]:
    return {"merged": [job.keys["merge"], published(job.project.stage_folder("merge"))]}


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Write the ONNX model. Raises EdgetuneError when the builder cannot, or what it made is not usable."""
    source = source_folder(job)
    builder = job.workflow.builder
    device = _BUILDERS_NAMES[job.workflow.provider]
    if step := job.workflow.gptq:
        gptq.build(job, step, source, folder)
    else:
        run_builder(job, source, folder, builder.precision, builder.builder_options() | {"execution_provider": device})
    config_path = folder / GENAI_CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["search"] |= _search_options(job, config["model"]["context_length"])
    write_json(config_path, config)
    # The runtime's own tokenizer reads this file; the builder does not copy it for every model class.
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    _check_it_loads(job, folder)
    size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    made = f"{builder.precision}{' by Gptq' if step else ''} for {device}, {size / 1e6:.1f} MB"
    job.progress.say(f"{made}, max_length {config['search']['max_length']}")
    return {"bytes": size, "max_length": config["search"]["max_length"]}


STAGE = Stage("export", 3, inputs, build)


def source_folder(job: Job) -> Path:
    """Return the folder of the model that is exported: the merged one, or the base model without a fine-tuning pass."""
    return job.project.stage_folder("merge") if job.workflow.tuning else job.base_folder


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
            hf_remote=job.workflow.input_model.load_kwargs.trust_remote_code,
            **{"execution_provider": "cpu"} | options,
        )
    except EdgetuneError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise failure(
            f"onnxruntime-genai's builder failed: {type(error).__name__}: {lines[0]}",
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


def _check_it_loads(job: Job, folder: Path) -> None:
    where = job.workflow.where_in_pass("ModelBuilder")
    load_exported(folder, where=where, hint="check `search` and the int4 options of this pass")
