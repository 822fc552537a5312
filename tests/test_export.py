"""Export: which precisions there are for which device, what is refused, and what a machine without the device says."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from conftest import Sandbox
from edgetune import config
from edgetune.checks.conversion import compare_conversion
from edgetune.errors import EdgetuneError, Problem
from edgetune.onnx_backend import GENAI_CONFIG
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.schema import PRECISIONS
from edgetune.stages import Job

PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
PLAIN = {"type": "ModelBuilder", "search": {"max_length": 256}}


def ask_for(project: Sandbox, provider: str, **settings: Any) -> None:
    """Write another execution provider and another builder pass into the workflow file."""
    accelerator = {"device": "cpu" if provider == "CPUExecutionProvider" else "gpu", "execution_providers": [provider]}

    def change(content: Any) -> None:
        content["systems"]["local_system"]["accelerators"] = [accelerator]
        content["passes"]["builder"] = PLAIN | settings

    project.edit(change)


def problems(project: Sandbox) -> tuple[Problem, ...]:
    """Return what is wrong with the workflow file."""
    try:
        config.load(Project(project.root))
    except EdgetuneError as error:
        return error.problems
    return ()


def line(project: Sandbox, problem: Problem) -> str:
    """Return the line of the workflow file that a problem points to."""
    number = int(problem.where.removeprefix("fine-tuning/olive-config.json:"))
    return project.config.read_text(encoding="utf-8").splitlines()[number - 1].strip()


@pytest.mark.parametrize(("provider", "precision"), [*product(PROVIDERS, ("int4", "int8", "fp16", "bf16", "fp32"))])
def test_only_what_the_builder_makes_for_a_device_is_accepted(fresh: Sandbox, provider: str, precision: str) -> None:
    """Another precision is an error at its line that names the device's; int8 is for none of them."""
    ask_for(fresh, provider, precision=precision)

    found = problems(fresh)

    if precision in PRECISIONS[provider]:
        assert not found
        return
    [problem] = found
    assert line(fresh, problem).startswith('"precision"')
    assert precision == "int8" or problem.hint == f"for {provider} there is {', '.join(PRECISIONS[provider])}"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"precision": "fp32", "int4_block_size": 32}, "int4_block_size"),
        ({"precision": "fp32", "use_qdq": True}, "use_qdq"),
        ({"precision": "int4", "int4_algo_config": "rtn", "use_qdq": False}, "use_qdq"),
        ({"precision": "int4", "int4_algo_config": "k_quant_mixed", "int4_is_symmetric": True}, "int4_is_symmetric"),
        ({"precision": "int4", "use_cuda_bf16": True}, "use_cuda_bf16"),
        ({"precision": "int4", "int4_block_size": 48}, "int4_block_size"),
        ({"precision": "int4", "int4_algo_config": "last_matmul"}, "int4_algo_config"),
        ({"precision": "int4", "exclude_lm_head": True}, "exclude_lm_head"),
        ({"precision": "int4", "enable_cuda_graph": True}, "enable_cuda_graph"),
        ({"precision": "int4", "extra_options": {}}, "extra_options"),
    ],
)
def test_keys_that_would_be_ignored_or_break_the_model(fresh: Sandbox, settings: dict[str, Any], key: str) -> None:
    """They are errors at their line."""
    ask_for(fresh, "CPUExecutionProvider", **settings)

    [problem] = problems(fresh)

    assert line(fresh, problem).startswith(f'"{key}"')


def test_a_quantisation_that_is_not_symmetric_has_to_say_so(fresh: Sandbox) -> None:
    """The builder would read shared embeddings as if it were; the error stands at the pass."""
    ask_for(fresh, "CPUExecutionProvider", precision="int4", int4_algo_config="k_quant_last")
    [problem] = problems(fresh)
    assert "int4_is_symmetric: must be false beside k_quant_last" in problem.message
    assert line(fresh, problem).startswith('"builder"')

    ask_for(fresh, "CPUExecutionProvider", precision="int4", int4_algo_config="k_quant_last", int4_is_symmetric=False)
    assert not problems(fresh)


def test_a_device_that_is_not_the_providers(fresh: Sandbox) -> None:
    """CUDA on a ``cpu`` is refused at the accelerator's line."""
    ask_for(fresh, "CUDAExecutionProvider", precision="int4")
    fresh.edit(lambda c: c["systems"]["local_system"]["accelerators"][0].update(device="cpu"))

    [problem] = problems(fresh)

    assert "belongs to the device 'gpu'" in problem.message
    assert line(fresh, problem) == '"device": "cpu",'


@pytest.mark.slow
def test_fp32_for_the_cpu(project: Sandbox) -> None:
    """A float export answers, and is as large as its weights."""
    ask_for(project, "CPUExecutionProvider", precision="fp32")

    result = project.run("export")

    assert result.returncode == 0, result.stderr
    assert "fp32 for cpu, 12.9 MB" in result.stderr


@pytest.mark.parametrize(
    ("provider", "settings"),
    [
        ("CUDAExecutionProvider", {"precision": "fp16"}),
        ("DmlExecutionProvider", {"precision": "fp16"}),
        *[
            pytest.param(provider, settings, marks=pytest.mark.slow)
            for provider, settings in (
                ("CUDAExecutionProvider", {"precision": "int4", "int4_block_size": 128}),
                ("CUDAExecutionProvider", {"precision": "int4", "use_cuda_bf16": True}),
                ("CUDAExecutionProvider", {"precision": "bf16"}),
                ("CUDAExecutionProvider", {"precision": "fp32"}),
                ("DmlExecutionProvider", {"precision": "int4", "int4_is_symmetric": False}),
            )
        ],
    ],
)
def test_a_device_that_is_not_here(project: Sandbox, provider: str, settings: dict[str, Any]) -> None:
    """The builder makes the model for it, which cannot be loaded: exit 1 and what it asks for, no traceback."""
    ask_for(project, provider, **settings)
    before = project.results()

    result = project.run("export")

    assert result.returncode == 1
    assert "which cannot be used here" in result.stderr
    assert "hint: run this on a machine that has one" in result.stderr
    assert "Traceback" not in result.stderr
    assert project.results() == before
    made = json.loads((project.root / "gen-model/onnx.candidate.partial" / GENAI_CONFIG).read_text(encoding="utf-8"))
    [options] = made["model"]["decoder"]["session_options"]["provider_options"]
    assert [*options] == [PROVIDERS[provider]]


def test_asking_a_model_for_another_device(project: Sandbox) -> None:
    """``infer`` with a model that was exported elsewhere says what it is made for."""
    path = project.root / "gen-model/onnx" / GENAI_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    path.write_text(json.dumps(content), encoding="utf-8")

    result = project.run("infer", "hello")

    assert result.returncode == 1
    assert "is made for an NVIDIA GPU (CUDA), which cannot be used here" in result.stderr


def test_the_conversion_is_checked_on_the_cpu(project: Sandbox, tmp_path: Path) -> None:
    """Whatever device the model is for, its first layers in fp32 are compared here."""
    ask_for(project, "CUDAExecutionProvider", precision="fp16")
    place = Project(project.root)
    job = Job.start(place, config.load(place), Progress(place.events))

    found = compare_conversion(job, place.stage_folder("merge"), tmp_path / "work")

    assert found.difference < 1e-3


def test_training_for_a_device_that_is_not_here(fresh: Sandbox) -> None:
    """It is said before hours of training, not after them."""
    ask_for(fresh, "CUDAExecutionProvider", precision="fp16")

    result = fresh.run("finetune")

    assert result.returncode == 1
    assert "onnxruntime-genai for it is not installed" in result.stderr
    assert "olive-config.json:" in result.stderr
    assert "train     " not in result.stderr
