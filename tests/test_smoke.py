"""``edgetune finetune --smoke``: all steps in little, in a folder of their own."""

import json
import re
import sys
from typing import Any

import pytest

from conftest import Sandbox


def record(project: Sandbox) -> dict[str, Any]:
    """Return what the last smoke run found."""
    found: dict[str, Any] = json.loads((project.root / "gen-model/smoke/smoke.json").read_text(encoding="utf-8"))
    return found


def outcome(project: Sandbox) -> dict[str, bool | None]:
    """Return which checks passed."""
    return {check["name"]: check["passed"] for check in record(project)["checks"]}


def test_smoke_tries_the_native_engine_only(fresh: Sandbox) -> None:
    """Together with stock Olive it is a usage error, and nothing runs."""
    result = fresh.run("finetune", "--smoke", "--engine", "olive")

    assert result.returncode == 2
    assert "leave out --engine" in result.stderr
    assert not (fresh.root / "gen-model/data").exists()


def test_smoke_tells_bad_rows_of_the_whole_data_set(fresh: Sandbox) -> None:
    """What is wrong with any row is found, not only with those that would be taken."""
    with (fresh.root / "datasets/train.jsonl").open("a") as file:
        file.write('{"phrase": "x"}\n')

    result = fresh.run("finetune", "--smoke")

    assert result.returncode == 1
    assert "datasets/train.jsonl:1281" in result.stderr


@pytest.mark.slow
def test_smoke_goes_through_all_steps_and_leaves_results_alone(project: Sandbox) -> None:
    """It passes with an untrained model, tells what a full run takes, and keeps a record only."""
    before = project.results()
    verdict = (project.root / "gen-model/verify.json").read_bytes()

    result = project.make("smoke")

    assert result.returncode == 0, result.stderr
    assert project.results() == before
    assert (project.root / "gen-model/verify.json").read_bytes() == verdict
    kept = {path.name for path in (project.root / "gen-model/smoke").iterdir()}
    assert kept == {"smoke.json", "events.jsonl", "logs"}
    assert re.search(r"^train +2 steps of 16 rows", result.stderr, re.MULTILINE)
    assert "train: the 32 longest of 1,280 rows" in result.stderr
    assert {name for name, passed in outcome(project).items() if passed} >= {"merge", "conversion"}
    assert False not in outcome(project).values()
    found = record(project)
    assert found["full"]["steps"] == 240
    assert found["full"]["evaluations"] == 3
    assert min(found["seconds"].values()) >= 0
    assert found["peak_rss_mb"]["train"] > 300
    assert re.search(r"a full run: about .* \(240 training steps .*3 evaluations", result.stdout)
    assert set(project.steps().values()) == {"up to date"}


@pytest.mark.slow
def test_smoke_takes_the_longest_rows(fresh: Sandbox) -> None:
    """The peak of memory is that of the longest rows; a second run has nothing to do and imports nothing heavy."""
    assert fresh.run("data").returncode == 0
    longest = json.loads((fresh.root / "gen-model/data/manifest.json").read_text())["metrics"]["sets"]["train"][
        "longest"
    ]

    result = fresh.run("finetune", "--smoke")

    assert result.returncode == 0, result.stderr
    assert re.search(rf"^data +train: 32 rows, .*longest {longest}$", result.stderr, re.MULTILINE)
    assert not (fresh.root / "gen-model/adapter").exists()

    again = repeat_without_torch(fresh)
    assert again.returncode == 0, again.stderr
    assert re.search("^smoke +up to date$", again.stderr, re.MULTILINE)
    assert again.stdout == result.stdout


def repeat_without_torch(project: Sandbox) -> Any:
    """Run it again where nothing heavy can be imported."""
    heavy = ("torch", "transformers", "olive", "peft", "datasets", "onnxruntime", "onnxruntime_genai", "numpy")
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from edgetune.cli import main; sys.exit(main())"
    return project.command(sys.executable, "-c", code, "finetune", "--smoke")


@pytest.mark.slow
def test_smoke_runs_again_after_a_change_and_refuses_what_cannot_train(fresh: Sandbox) -> None:
    """A pass that leaves the adapter empty, or names no layer, is found; what was made stays to be looked into."""
    fresh.edit(lambda c: c["passes"]["lora"]["training_args"].update(learning_rate=1e-60))
    result = fresh.run("finetune", "--smoke")
    assert result.returncode == 3
    assert "error: gen-model/smoke/verify.json: failed: the adapter learned" in result.stderr
    assert "0 of 6 matrices hold values" in result.stderr
    assert (fresh.root / "gen-model/smoke/adapter").is_dir()
    assert not (fresh.root / "gen-model/smoke/smoke.json").exists()

    fresh.edit(lambda c: c["passes"]["lora"].update(target_modules=["no_such_layer"]))
    result = fresh.run("finetune", "--smoke")
    assert result.returncode == 1
    assert "'no_such_layer' matches no linear layer" in result.stderr

    fresh.edit(lambda c: c["passes"]["lora"].update(target_modules=["qkv_proj"]))
    fresh.edit(lambda c: c["passes"]["lora"]["training_args"].update(learning_rate=1e-3))
    assert fresh.run("finetune", "--smoke").returncode == 0
    assert not (fresh.root / "gen-model/smoke/adapter").exists()


@pytest.mark.slow
def test_smoke_honours_accumulation_and_chats(fresh: Sandbox) -> None:
    """Two optimiser steps are as many batches as accumulation makes of them; chats and evaluation switched off work."""

    def chats(name: str) -> None:
        path = fresh.root / "datasets" / name
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        turns = [
            [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}] for row in rows
        ]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns), encoding="utf-8")

    for name in ("train.jsonl", "eval.jsonl"):
        chats(name)
    template = {"text_template", "text_cols"}

    def use_chats(config: dict[str, Any]) -> None:
        for data in config["data_configs"]:
            kept = {key: value for key, value in data["pre_process_data_config"].items() if key not in template}
            data["pre_process_data_config"] = kept | {"chat_template": True}
        arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "eval_strategy": "no"}
        config["passes"]["lora"]["training_args"].update(arguments)

    fresh.edit(use_chats)

    result = fresh.run("finetune", "--smoke")

    assert result.returncode == 0, result.stderr
    assert "train: the 24 longest of 1,280 rows" in result.stderr
    assert re.search(r"^train +2 steps of 12 rows", result.stderr, re.MULTILINE)
    assert record(fresh)["full"]["steps"] == 3 * -(-320 // 3)
    assert record(fresh)["full"]["evaluations"] == 0
