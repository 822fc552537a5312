"""Olive's Gptq pass: in the workflow file, as the last rung of the ladder, and the model that it makes."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from conftest import Sandbox
from edgetune import config
from edgetune.errors import EdgetuneError
from edgetune.ladder import rungs, with_settings
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.schema import Workflow
from edgetune.stages import Job

GPTQ = {"type": "Gptq", "group_size": 128, "data_config": "train_data"}
_BUILDER = '    "builder": {'
_STEP = """    "gptq": {
      "type": "Gptq",
      "group_size": 128,
      "data_config": "calibration_data"
    },
"""


def add(content: Any, other: dict[str, Any] | None = None, **settings: Any) -> None:
    """Put a Gptq pass before the builder's, or before another one in its place."""
    builder = content["passes"].pop("builder")
    content["passes"] |= {"gptq": GPTQ | settings, "builder": other or builder}


def last_rung(project: Sandbox) -> Workflow:
    """Write the settings of the ladder's last rung into the workflow file."""
    place = Project(project.root)
    job = Job.start(place, config.load(place), Progress(place.events))
    *_, rung = rungs(job)
    return with_settings(place, rung, project.config, project.config)


def crlf(text: str) -> bytes:
    """Write it as an editor on Windows does."""
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("encode", [str.encode, crlf])
def test_the_last_rung_in_the_workflow_file(fresh: Sandbox, encode: Callable[[str], bytes]) -> None:
    """It adds the pass before the builder's, and a part of the training data behind the others; all else stays."""
    text = fresh.config.read_text(encoding="utf-8")
    fresh.config.write_bytes(encode(text))

    workflow = last_rung(fresh)

    written = fresh.config.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    assert encode(written) == fresh.config.read_bytes()
    assert _STEP + _BUILDER in written
    before, _, added = written.replace(_STEP, "").partition(',\n    {\n      "name": "calibration_data"')
    end = added.index("\n    }") + len("\n    }")
    assert before + added[end:] == text
    [data] = workflow.calibration_data
    assert data.pre_process_data_config.max_samples == 128
    assert data.load_dataset_config == workflow.train_data.load_dataset_config
    assert data.contract == workflow.contract


def test_the_training_data_may_have_fewer_rows(fresh: Sandbox) -> None:
    """No more rows are looked at than trained on."""
    fresh.edit(lambda c: c["data_configs"][0]["pre_process_data_config"].update(max_samples=40))

    [data] = last_rung(fresh).calibration_data

    assert data.pre_process_data_config.max_samples == 40


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (lambda c: add(c, data_config="no"), '"data_config": "no"', "names 'no', which is not defined"),
        (lambda c: add(c, desc_act=True), '"desc_act"', "does not know the key 'desc_act'"),
        (lambda c: add(c, group_size=48), '"group_size"', "group_size: input should be 16, 32"),
        (lambda c: add(c, bits=8), '"bits"', "bits: input should be 4"),
        (
            lambda c: add(c, {"type": "ModelBuilder", "precision": "fp32"}),
            '"precision"',
            "what Gptq makes is int4, not fp32",
        ),
        (lambda c: c["passes"].update(gptq=GPTQ), '"passes"', "does not run these passes"),
    ],
)
def test_settings_that_are_refused(fresh: Sandbox, change: Callable[[Any], object], key: str, message: str) -> None:
    """Each is an error at its line."""
    fresh.edit(change)

    with pytest.raises(EdgetuneError) as caught:
        config.load(Project(fresh.root))

    [problem] = caught.value.problems
    assert message in problem.message
    number = int(problem.where.removeprefix("fine-tuning/olive-config.json:"))
    assert key in fresh.config.read_text(encoding="utf-8").splitlines()[number - 1]


def test_without_fine_tuning(fresh: Sandbox) -> None:
    """The base model is quantised; data that only Gptq looks at are not what it is evaluated on."""

    def change(content: Any) -> None:
        content["data_configs"][1]["name"] = "calibration_data"
        content["passes"] = {
            "gptq": GPTQ | {"data_config": "calibration_data"},
            "builder": content["passes"]["builder"],
        }

    fresh.edit(change)

    workflow = config.load(Project(fresh.root))

    assert workflow.calibration_data == [workflow.data_configs[1]]
    assert workflow.eval_data is None


def test_the_ladder_ends_with_it(project: Sandbox) -> None:
    """With the pass in the file, there is nowhere to climb to."""
    project.edit(add)
    before = project.config.read_bytes()

    result = project.run("export", "--auto")

    assert result.returncode == 1
    assert "has a Gptq pass, which is the last rung" in result.stderr
    assert project.config.read_bytes() == before


def test_splitting_the_data_again(fresh: Sandbox) -> None:
    """Calibration stays with the training rows; those for evaluation are kept away from it."""
    own = fresh.root / "datasets/own.jsonl"
    (fresh.root / "datasets/train.jsonl").rename(own)
    fresh.edit(lambda c: c["data_configs"][0]["load_dataset_config"].update(data_files="../datasets/own.jsonl"))
    last_rung(fresh)

    result = fresh.run("data", "--write-split", "0.2")

    assert result.returncode == 0, result.stderr
    data = json.loads(fresh.config.read_text(encoding="utf-8"))["data_configs"]
    assert [entry["load_dataset_config"]["data_files"] for entry in data] == [
        "../datasets/train.jsonl",
        "../datasets/eval.jsonl",
        "../datasets/train.jsonl",
    ]


@pytest.mark.slow
def test_from_the_last_rung_to_a_verified_model(project: Sandbox) -> None:
    """Only the export is made again, and is small and good; other calibration data make it stale."""
    last_rung(project)
    calibrate = project.edit
    calibrate(lambda c: c["data_configs"][2]["pre_process_data_config"].update(max_samples=8))

    result = project.run("finetune")

    assert result.returncode == 0, result.stderr
    [megabytes] = re.findall(r"export    int4 by Gptq for cpu, ([\d.]+) MB", result.stderr)
    assert float(megabytes) < 5
    assert "train     up to date" in result.stderr
    assert "quantisation is harmless" in result.stderr
    assert set(project.steps().values()) == {"up to date"}
    assert not list((project.root / "gen-model").rglob("work"))

    published = project.results()
    calibrate(lambda c: c["data_configs"][2]["load_dataset_config"].update(split="train[5000:]"))
    assert project.steps()["export"] == "stale"
    result = project.run("export")

    assert result.returncode == 1
    assert "error: gen-model/logs/passes/gptq.log: stock Olive produced no model" in result.stderr
    assert project.results() == published

    (project.root / "datasets/calibration.jsonl").unlink(missing_ok=True)
    calibrate(lambda c: c["data_configs"][2]["load_dataset_config"].update(data_files="../datasets/calibration.jsonl"))
    result = project.run("export")

    assert result.returncode == 1
    assert "datasets/calibration.jsonl does not exist" in result.stderr
