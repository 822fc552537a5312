"""Evaluation: every model on the evaluation data, with numbers that can be counted again from the answers."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Sandbox
from edgetune import config
from edgetune.dataset import EVAL
from edgetune.errors import EdgetuneError, failure
from edgetune.evaluate import speed
from edgetune.examples import Example, examples
from edgetune.metrics import summarise
from edgetune.onnx_backend import OnnxBackend
from edgetune.processes import in_process
from edgetune.project import Project
from edgetune.scores import compare_hits, compare_losses
from edgetune.stages import Job

BACKENDS = ["base", "adapter", "merged", "onnx"]


def metrics(project: Sandbox) -> dict[str, Any]:
    """Return what the evaluation wrote down."""
    content: dict[str, Any] = json.loads((project.root / "gen-model/report/metrics.json").read_text(encoding="utf-8"))
    return content


def answers(project: Sandbox, backend: str) -> list[dict[str, Any]]:
    """Return what a backend answered, in the order of the rows."""
    lines = (project.root / f"gen-model/evaluation/{backend}.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines[1:-1]), key=lambda line: line["number"])


def expected(project: Sandbox) -> list[str]:
    """Return the labels of the evaluation data."""
    lines = (project.root / "datasets/eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["tone"] for line in lines]


def test_all_models_are_measured(evaluated: Sandbox) -> None:
    """Quality, speed, memory and size of the four models, and tests that call a difference what it is."""
    found = metrics(evaluated)

    assert list(found["backends"]) == BACKENDS
    assert (found["data"], found["metric"]) == ({"name": "eval_data", "rows": 240, "asked": 240}, "accuracy")
    assert found["labels"] == ["fear", "joy", "sadness", "surprise"]
    for backend in found["backends"].values():
        assert all(backend["speed"][f"{kind}_tokens_per_second"] > 0 for kind in ("prefill", "decode"))
        assert backend["peak_rss_mb"] > backend["bytes"] / 1e6
    base, merged, onnx = (found["backends"][name]["metrics"] for name in ("base", "merged", "onnx"))
    assert (base["accuracy"] < 0.5, merged["accuracy"] > 0.9) == (True, True)
    assert merged["perplexity"] < base["perplexity"]
    assert onnx["ended"] >= 0.99
    verdicts = {(entry["from"], entry["to"]): entry["verdict"] for entry in found["comparisons"]}
    assert verdicts == {("base", "merged"): "better", ("merged", "onnx"): "noise", ("base", "onnx"): "better"}


def test_numbers_follow_from_the_answers(evaluated: Sandbox) -> None:
    """Accuracy, confusion matrix and flipped rows are those of the answers, counted here again."""
    found, labels = metrics(evaluated), expected(evaluated)
    said = {name: [line["text"] for line in answers(evaluated, name)] for name in BACKENDS}

    for name, texts in said.items():
        hits = [text == label for text, label in zip(texts, labels, strict=True)]
        confusion = found["backends"][name]["confusion"]
        assert found["backends"][name]["metrics"]["accuracy"] == sum(hits) / len(hits)
        assert [sum(row) for row in confusion["counts"]] == [labels.count(label) for label in found["labels"]]
        assert sum(row[-1] for row in confusion["counts"]) == sum(text not in found["labels"] for text in texts)
    flipped = {
        f"datasets/eval.jsonl:{number}"
        for number, (one, other, label) in enumerate(zip(said["merged"], said["onnx"], labels, strict=True), start=1)
        if (one == label) != (other == label)
    }
    assert {row["where"] for row in found["flipped"]} == flipped


def test_an_adapter_that_is_not_merged_is_compared_with_the_export(project: Sandbox) -> None:
    """Beside an adapter, what the export costs is told against the adapter, as it is against a merged model."""
    project.edit(
        lambda content: [
            content["passes"].pop(n) for n, p in [*content["passes"].items()] if p["type"].startswith("Merge")
        ]
    )
    place = Project(project.root)
    job = Job.start(place, config.load(place))
    asked = examples(job, EVAL, 4)
    lines: list[dict[str, Any]] = [
        {"number": number, "text": example.expected, "stop_reason": "stop", "loss": 1.0, "learned": example.learned}
        for number, example in enumerate(asked)
    ]
    answered = {name: [*lines, {"speed": {}}] for name in ("base", "adapter", "onnx")}

    found = summarise(job, asked, answered, dict.fromkeys(answered, project.root))

    pairs = [(entry["from"], entry["to"]) for entry in found["comparisons"]]
    assert pairs == [("base", "adapter"), ("base", "onnx"), ("adapter", "onnx")]


def test_no_speed_where_there_is_no_room_for_an_answer(evaluated: Sandbox) -> None:
    """A model that takes fewer tokens than the measured answer has gets no speed, rather than one beyond its limit."""
    backend = OnnxBackend(evaluated.root / "gen-model/onnx")
    example = Example("datasets/eval.jsonl:1", "a question", ids=[*range(10, 20)], start=5, expected="joy")

    assert speed(backend, [example])["prompt_tokens"] == 223  # of 256 tokens, 32 are for the answer
    for length in (33, 20):
        backend.max_length = length
        assert speed(backend, [example]) == {}


def test_interrupted_evaluation_goes_on(evaluated: Sandbox, tmp_path: Path) -> None:
    """What was answered stays answered, a line that was cut off is asked again, and the numbers are the same."""
    project = Sandbox(shutil.copytree(evaluated.root, tmp_path / "my-slm"))
    before, path = metrics(project), project.root / "gen-model/evaluation/onnx.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:201]) + lines[201][:20], encoding="utf-8")
    (project.root / "gen-model/report/metrics.json").unlink()

    result = project.run("evaluate", "--json")

    assert result.returncode == 0, result.stderr
    assert "asking onnx" in result.stderr
    assert "asking merged" not in result.stderr
    kept = [json.loads(line) for line in lines[1:201]]
    assert all(line in answers(project, "onnx") for line in kept)  # with the seconds they took then
    again = json.loads(result.stdout)
    assert again["flipped"] == before["flipped"]
    assert again["backends"]["onnx"]["metrics"] == pytest.approx(before["backends"]["onnx"]["metrics"])


def test_second_evaluation_does_nothing(evaluated: Sandbox) -> None:
    """With nothing changed, the numbers are there at once, and nothing is written."""
    path = evaluated.root / "gen-model/report/metrics.json"
    before = path.stat().st_mtime_ns

    result = evaluated.run("evaluate", "--json")

    assert result.returncode == 0
    assert "evaluate  up to date" in result.stderr
    assert json.loads(result.stdout) == metrics(evaluated)
    assert path.stat().st_mtime_ns == before


def test_without_evaluation_data(fresh: Sandbox) -> None:
    """Nothing is trained or measured; the error says how to set rows aside."""
    fresh.edit(lambda c: c["passes"]["lora"].pop("eval_data_config"))

    result = fresh.run("evaluate")

    assert result.returncode == 1
    assert "there are no evaluation data" in result.stderr
    assert "edgetune data --write-split 0.1" in result.stderr
    assert not (fresh.root / "model-cache/edgetune").exists()


def test_measuring_does_not_train_again(project: Sandbox) -> None:
    """After a changed setting the model is older than the project: an error, and everything stays as it is."""
    before = project.keys()
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(learning_rate=1e-3))

    for command in ("evaluate", "report"):
        result = project.run(command)
        assert result.returncode == 1
        assert "the adapter is older than the project (changed: pass)" in result.stderr
    assert project.keys() == before


@pytest.mark.slow
def test_free_text(render: Any) -> None:
    """Where completions are no labels, they are compared as texts, and by their perplexity; ``--limit`` takes few."""
    project = render(dataset="qa")
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=20, eval_strategy="no"))

    result = project.run("evaluate", "--limit", "8", "--json")

    assert result.returncode in (0, 3), result.stderr  # twenty steps may be too few to learn when to stop
    found = json.loads(result.stdout)
    assert (found["data"]["asked"], found["limit"], found["labels"]) == (8, 8, [])
    for backend in found["backends"].values():
        assert set(backend["metrics"]) == {"exact_match", "rouge_l", "perplexity", "ended"}
        assert backend["confusion"] is None
    assert {entry["metric"] for entry in found["comparisons"]} == {"exact_match", "perplexity"}


# ---------------------------------------------------------------- tests of differences, and processes


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_paired_test_of_hits(pairs: list[tuple[bool, bool]]) -> None:
    """The test does not depend on the order of the models; what both get right or wrong changes nothing."""
    before, after = zip(*pairs, strict=True)

    test, mirrored = compare_hits(before, after), compare_hits(after, before)

    assert (test.better, test.worse, test.p) == (mirrored.worse, mirrored.better, mirrored.p)
    assert compare_hits([*before, True], [*after, True]) == test
    assert 0 < test.p <= 1


def test_noise_is_called_noise() -> None:
    """Five of five may be chance (p = 1/16); six of six is hardly (p = 1/32). Losses are tested likewise."""
    assert compare_hits([False] * 5, [True] * 5).verdict == "noise"
    assert compare_hits([False] * 6, [True] * 6).verdict == "better"
    assert compare_hits([True] * 6, [False] * 6).verdict == "worse"
    assert compare_hits([True] * 6, [False] * 6).p == pytest.approx(1 / 32)
    assert compare_losses([1.0, 2, 3, 4], [1.0, 2, 3, 4]).verdict == "noise"
    assert compare_losses(range(20), [value + 0.1 for value in range(20)]).verdict == "worse"


def _refuse() -> None:
    raise failure("no", where="file:3", hint="yes")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors_of_another_process() -> None:
    """An error arrives with all that it says; a process that is killed is an error as well."""
    assert in_process(max, 1, 2) == 2
    with pytest.raises(EdgetuneError) as refused:
        in_process(_refuse)
    assert [vars(problem) for problem in refused.value.problems] == [
        {"message": "no", "where": "file:3", "hint": "yes"}
    ]
    with pytest.raises(EdgetuneError, match="died with code -9"):
        in_process(_die)
