"""Training in several processes: the same curve, the same checkpoints, and an end when one of them dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ENVIRONMENT, Sandbox
from edgetune.batches import shares
from edgetune.cli import main
from test_finetune import wait_until


def shorten(project: Sandbox, **arguments: Any) -> None:
    """Train a few steps without dropout, and log every loss."""
    project.edit(lambda config: config["passes"]["lora"].update(lora_dropout=0.0))
    little = {"max_steps": 6, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2}
    project.edit(lambda config: config["passes"]["lora"]["training_args"].update(little | arguments))


def curve(project: Sandbox) -> list[tuple[int, str, float]]:
    """Return the losses of every step and evaluation, and how long the gradients were."""
    log = json.loads((project.root / "gen-model/adapter/loss.json").read_text(encoding="utf-8"))
    names = ("loss", "eval_loss", "grad_norm")
    return [(entry["step"], name, entry[name]) for entry in log for name in names if name in entry]


def trained_alone(project: Sandbox, tmp_path: Path) -> Sandbox:
    """Train a copy of the project in one process."""
    alone = Sandbox(shutil.copytree(project.root, tmp_path / "alone" / "my-slm"))
    result = alone.run("train")
    assert result.returncode == 0, result.stderr
    return alone


def is_same_curve(one: Sandbox, other: Sandbox) -> bool:
    """Compare two trainings: all losses but for rounding."""
    assert [entry[:2] for entry in curve(one)] == [entry[:2] for entry in curve(other)]
    return [entry[2] for entry in curve(one)] == pytest.approx([entry[2] for entry in curve(other)], rel=2e-4)


@given(st.lists(st.integers(0, 200), max_size=40), st.integers(1, 9))
def test_every_row_is_dealt_out_once(lengths: list[int], count: int) -> None:
    """Rows of which something is learned are in one share each; no share is larger than it has to be by a row."""
    dealt = shares(lengths, count)

    assert len(dealt) == count
    assert sorted(row for rows in dealt for row in rows) == [row for row, length in enumerate(lengths) if length]
    largest = max(sum(lengths[row] for row in rows) for rows in dealt)
    assert largest <= sum(lengths) / count + max(lengths, default=0)


def test_dividing_the_base_model_is_refused(fresh: Sandbox) -> None:
    """FSDP in the workflow file is an error that says what there is instead."""
    fresh.edit(lambda config: config["passes"]["lora"]["training_args"].update(fsdp="full_shard"))

    result = fresh.run("train", "--nproc", "2")

    assert result.returncode == 1
    assert "the base model is not divided among processes" in result.stderr


def test_preflight_counts_every_process(fresh: Sandbox) -> None:
    """Ten thousand copies of the base model are refused before any of them is loaded."""
    result = fresh.run("train", "--nproc", "10000")

    assert result.returncode == 1
    assert "training edgetune/tiny-phi3 needs about" in result.stderr
    assert "it fits with --nproc" in result.stderr


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--nproc=2", "--nnodes=2"), "how many processes train here: leave out --nproc, --nnodes"),
        (("finetune", "--engine=olive"), "--engine olive is one process: leave out the launcher"),
        (("finetune", "--smoke"), "--smoke is for one machine"),
    ],
)
def test_what_would_not_count_is_refused(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that say what the launcher has said, or what cannot be done by several, are usage errors."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit) as caught:
        main([*arguments])

    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_launcher_of_one_process_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Azure ML starts a single process with the variables of several: it may do all, and they do not reach others."""
    for name, value in (LAUNCHED | {"WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)

    assert main(["finetune", "--smoke", "--project", str(tmp_path)]) == 1  # no project is there

    assert "RANK" not in os.environ


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(fresh: Sandbox, tmp_path: Path) -> None:
    """Losses, evaluations and gradients of every step are the same, and so is the key: nothing is trained again.

    With ``dataloader_drop_last`` a step is made of several batches.
    """
    shorten(fresh, load_best_model_at_end=True, save_steps=3, dataloader_drop_last=True, gradient_accumulation_steps=2)
    alone = trained_alone(fresh, tmp_path)

    result = fresh.run("train", "--nproc", "2")

    assert result.returncode == 0, result.stderr
    assert is_same_curve(fresh, alone)
    assert fresh.steps()["train"] == "up to date"
    assert not (fresh.root / "gen-model/adapter/checkpoints").exists()
    manifest = json.loads((fresh.root / "gen-model/adapter/manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["processes"] == 2
    events = [json.loads(line) for line in (fresh.root / "gen-model/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["stage"] == "train"].count("start") == 1
    assert sum("eval loss" in event.get("text", "") for event in events) == 2 + 1  # and the best one's


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_dies_ends_the_run_and_one_goes_on(fresh: Sandbox, tmp_path: Path) -> None:
    """Exit code 1 with the code of the dead one; one process continues from the checkpoint, to the same curve."""
    shorten(fresh, max_steps=40, eval_strategy="no")
    checkpoints = fresh.root / "gen-model/adapter.partial/checkpoints"
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "train", "--nproc", "2"],
        cwd=fresh.root,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(process, lambda: any(checkpoints.glob("*/manifest.json")))
        os.kill(workers_of(fresh)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "a process of the training died with code -9" in errors
    assert "Traceback" not in errors
    assert workers_of(fresh) == []
    assert fresh.steps()["train"] == "interrupted"
    result = fresh.run("train")
    assert result.returncode == 0, result.stderr
    assert "continuing from step" in result.stderr
    assert is_same_curve(fresh, trained_alone(fresh, tmp_path))


def workers_of(project: Sandbox) -> list[int]:
    """Return the training processes of a project, the first one first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        rank = next((entry[5:] for entry in environment if entry.startswith("RANK=")), None)
        if rank is not None and any(str(project.root) in word for word in command):
            found.append((int(rank), int(folder.name)))
    return [number for _, number in sorted(found)]


@pytest.mark.slow
def test_two_machines_with_a_project_each(fresh: Sandbox, tmp_path: Path) -> None:
    """Started by a launcher, the first process runs the stages; another machine gets its own data ready."""
    shorten(fresh)
    alone = trained_alone(fresh, tmp_path)
    other = Sandbox(shutil.copytree(fresh.root, tmp_path / "other" / "my-slm"))

    first, second = run_together(fresh, other)

    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert first.stdout == "gen-model/adapter\n"
    assert second.stdout == ""
    assert is_same_curve(fresh, alone)
    assert (other.root / "gen-model/data/manifest.json").exists()
    assert not (other.root / "gen-model/adapter").exists()


@pytest.mark.slow
def test_what_is_wrong_on_another_machine_ends_the_first(fresh: Sandbox, tmp_path: Path) -> None:
    """Another workflow file there, or a broken one, is told here at once; nothing waits for hours."""
    shorten(fresh)
    other = Sandbox(shutil.copytree(fresh.root, tmp_path / "other" / "my-slm"))
    for name, message in (
        ("r", "process 1 would train something else than the first one"),
        ("ranc", "does not know the key 'ranc'"),
    ):
        other.edit(lambda config: config["passes"]["lora"].update({name: 2}))  # noqa: B023 - called at once

        first, second = run_together(fresh, other)

        assert (first.returncode, second.returncode) == (1, 1), (first, second)
        assert message in second.stderr
        assert f"error: process 1 on {socket.gethostname()}: " in first.stderr
        assert message in first.stderr


def run_together(*projects: Sandbox) -> list["subprocess.CompletedProcess[str]"]:
    """Train with a process in each project, as a launcher would start them on machines of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": len(projects), "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "edgetune", "train"],
            cwd=project.root,
            env=ENVIRONMENT | {name: str(value) for name, value in (place | {"RANK": rank}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, project in enumerate(projects)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]
