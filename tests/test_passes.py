"""Passes of Olive that edgetune does not have itself: in the workflow file, in their place in the order."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from conftest import Sandbox
from edgetune import config
from edgetune.errors import EdgetuneError
from edgetune.project import Project

KQUANT = {"type": "KQuant", "group_size": 32}
CHECK = {"type": "OnnxDiscrepancyCheck", "reference_model_path": "../reference"}


def put(content: Any, *, first: Any = None, before: Any = None, after: Any = None) -> None:
    """Add passes at the beginning, before the builder and behind it."""
    passes = content["passes"]
    builder = passes.pop("builder")
    content["passes"] = {**(first or {}), **passes, **(before or {}), "builder": builder, **(after or {})}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda c: put(c, first={"q": KQUANT}), "does not run these passes", "--engine olive"),
        (lambda c: put(c, before={"q": {"type": "KQant"}}), "a pass of type 'KQant'", "did you mean 'KQuant'"),
        (lambda c: put(c, before={"q": KQUANT | {"data_config": "no"}}), "data_config names 'no'", "train_data"),
        (lambda c: put(c, after={"q": KQUANT}), "does not run these passes", "those for ONNX behind it"),
        (lambda c: put(c, before={"check": CHECK}), "does not run these passes", "--engine olive"),
        (lambda c: put(c, after={"../q": CHECK}), "the pass is called '../q'", "use letters"),
    ],
)
def test_passes_that_are_refused(fresh: Sandbox, change: Callable[[Any], object], message: str, hint: str) -> None:
    """Orders, types and names that cannot work are errors with a line, before anything is run."""
    fresh.edit(change)

    with pytest.raises(EdgetuneError) as caught:
        config.load(Project(fresh.root))

    [problem] = caught.value.problems
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.startswith("fine-tuning/olive-config.json:")


def test_each_pass_is_a_step(fresh: Sandbox) -> None:
    """Status lists them in the order of the file; the last one makes the exported model."""
    fresh.edit(lambda c: put(c, before={"q": KQUANT}, after={"check": CHECK}))

    assert list(fresh.steps()) == [
        *("download", "data", "train", "merge"),
        *("passes/q", "passes/builder", "export", "verify"),
    ]


def add_reference(project: Sandbox) -> None:
    """Put the merged model beside the project's folders, to be loaded in float32: Olive's check fails for bfloat16."""
    reference = shutil.copytree(project.root / "gen-model/merged", project.root / "reference")
    content = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    (reference / "config.json").write_text(json.dumps(content | {"dtype": "float32"}), encoding="utf-8")


@pytest.mark.slow
def test_passes_before_and_behind_the_builder(project: Sandbox) -> None:
    """They run through Olive, one after the other; a change repeats a pass and what follows, a failure nothing."""
    add_reference(project)
    mixed = {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"}
    project.edit(lambda c: put(c, before={"mixed": mixed, "q": KQUANT}, after={"check": CHECK | {"max_mae": 10.0}}))

    result = project.run("finetune")

    assert result.returncode == 0, result.stderr
    assert "train     up to date" in result.stderr
    assert "quantisation is harmless" in result.stderr
    assert set(project.steps().values()) == {"up to date"}
    config = json.loads((project.root / "gen-model/passes/q/config.json").read_text(encoding="utf-8"))
    assert {entry["bits"] for entry in config["quantization_config"]["overrides"].values()} == {8}
    assert not list((project.root / "gen-model").rglob("work"))
    assert project.run("infer", "have a nice day").returncode == 0

    published = project.results()
    project.edit(lambda c: c["passes"]["check"].update(max_mae=1e-9))
    result = project.run("finetune")

    assert result.returncode == 1
    assert "passes/builder up to date" in result.stderr
    assert "ONNX model discrepancy check failed: - Max absolute error" in result.stderr
    assert "gen-model/logs/export.log: stock Olive produced no model" in result.stderr
    assert project.results() == published

    project.edit(lambda c: c["passes"]["q"].update(grup_size=16))
    result = project.run("finetune")

    assert result.returncode == 1
    assert "Olive ignores {'grup_size'}" in result.stderr
    assert project.results() == published
