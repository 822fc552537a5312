"""Export through Olive's Gptq pass: the model is quantised with a look at data, then translated as it is.

Stock Olive runs both passes, each in a workflow file of its own: what it writes between them is not all that the
builder has to read (see :mod:`edgetune.architectures`).
"""

import shutil
from pathlib import Path
from typing import Any

from edgetune import architectures, dataset
from edgetune.olive_process import run_olive
from edgetune.schema import Gptq, ModelBuilder
from edgetune.stages import Job, read_json, write_json


def inputs(job: Job) -> dict[str, Any]:
    """Return what the quantised weights depend on besides the model. Raises EdgetuneError when a file is missing."""
    workflow = job.workflow
    if workflow.gptq is None or workflow.calibration_data is None:
        return {}
    return {
        "gptq": workflow.gptq.model_dump(exclude={"data_config"}),
        "calibration": dataset.content(job, {"calibration": workflow.calibration_data}),
    }


def build(job: Job, step: Gptq, source: Path, folder: Path) -> None:
    """Make an ONNX model of the one in ``source``. Raises EdgetuneError when Olive cannot."""
    workflow, work = job.workflow, folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    quantised = _run(job, work / "gptq", source, step, "config.json").parent
    _restore_config(source, quantised)
    given = architectures.builder_input(quantised, work / "source")
    exported = _run(job, work / "builder", given, workflow.builder, "model.onnx").parent
    for path in exported.iterdir():
        if path.is_file() and path.name not in _OF_OLIVE:
            path.rename(folder / path.name)
    shutil.rmtree(work)
    architectures.repair(job, source, folder)


_OF_OLIVE = {
    "config.json",
    "footprint.json",
    "generation_config.json",
    "model_config.json",
    "output_footprint.json",
    "run_history.txt",
}
"""What Olive writes beside the files of the builder."""


def _run(job: Job, work: Path, model: Path, step: Gptq | ModelBuilder, pattern: str) -> Path:
    """Let Olive run one pass on the model in a folder; return the file with a name like ``pattern`` that it made."""
    workflow, data = job.workflow, job.workflow.calibration_data
    trust = {"trust_remote_code": workflow.input_model.load_kwargs.trust_remote_code}
    work.mkdir(parents=True)
    write_json(
        work / "workflow.json",
        {
            "input_model": {"type": "HfModel", "model_path": str(model.absolute()), "load_kwargs": trust},
            "systems": {workflow.target: workflow.systems[workflow.target].model_dump()},
            "data_configs": [data.model_dump(exclude_unset=True)] if data else [],
            "passes": {step.type: step.model_dump(exclude_unset=True)},
            "host": workflow.target,
            "target": workflow.target,
            "cache_dir": str(work.absolute() / "cache"),
            "output_dir": str(work.absolute() / "out"),
            "log_severity_level": 1,
        },
    )
    log = job.project.log(step.type.lower())
    return run_olive(job, work / "workflow.json", work / "out", log, pattern)


def _restore_config(source: Path, quantised: Path) -> None:
    """Give the quantised model the config.json of the other: transformers has written it anew, with other names."""
    path = quantised / "config.json"
    added = (read_json(path) or {})["quantization_config"]
    write_json(path, (read_json(source / "config.json") or {}) | {"quantization_config": added})
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", quantised / "generation_config.json")
