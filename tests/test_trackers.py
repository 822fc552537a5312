"""Experiment trackers: what is said when one is missing or unknown, and where they are sent."""

import os
import sys
from pathlib import Path

import pytest

from conftest import Sandbox


@pytest.mark.parametrize("trackers", ["mlflow", ["tensorboard", "wandb", "mlflow", "trackio"]])
def test_missing_tracker_is_told_before_the_base_model_is_loaded(project: Sandbox, trackers: str | list[str]) -> None:
    """``report_to`` with packages that are not there: their line and the pip command, without an import of torch."""
    names = ["tensorboard", "mlflow", "wandb", "trackio"] if isinstance(trackers, list) else [trackers]
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(report_to=trackers, learning_rate=1e-4))
    absent = (*names, "torch", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from edgetune.cli import main; sys.exit(main())"

    result = project.command(sys.executable, "-c", code, "train")

    assert result.returncode == 1
    for name in names:
        assert f": report_to: the package {name} is not installed\nhint: run `pip install {name}`" in result.stderr
    assert "error: fine-tuning/olive-config.json:" in result.stderr


TRACKIO = """
import types
config, context_vars = {}, types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
def begin(**_):
    DOWN
def log(_):
    DOWN
init, finish = begin, begin
"""
"""A tracker whose server does not answer."""
DOWN = 'raise ConnectionError("connection refused\\nby nobody")'


@pytest.mark.parametrize("lost", ["at first", "later"])
def test_tracker_whose_server_is_down(fresh: Sandbox, tmp_path: Path, lost: str) -> None:
    """It is an error before the first step. Lost in the middle, it is told once, and the training goes on."""
    module = TRACKIO.replace("def begin(**_):\n    DOWN", "def begin(**_):\n    pass") if lost == "later" else TRACKIO
    (tmp_path / "trackio.py").write_text(module.replace("DOWN", DOWN))
    few = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "no", "report_to": "trackio"}
    fresh.edit(lambda c: c["passes"]["lora"]["training_args"].update(few))

    result = fresh.run("train", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})

    line = next(n for n, text in enumerate(fresh.config.read_text().splitlines(), start=1) if "report_to" in text)
    refusal = (
        f"error: fine-tuning/olive-config.json:{line}: report_to: trackio cannot be reported to: connection refused\n"
    )
    if lost == "at first":
        assert result.returncode == 1
        assert refusal + "hint: see that it can be reached" in result.stderr
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("trackio gets no more of this training, which goes on: connection refused") == 1
        assert fresh.steps()["train"] == "up to date"


def test_unknown_tracker_is_told_with_the_known_ones(fresh: Sandbox) -> None:
    """A name that nothing answers to is an error of the configuration."""
    fresh.edit(lambda c: c["passes"]["lora"]["training_args"].update(report_to="tensorbord"))

    result = fresh.run("status")

    assert result.returncode == 1
    assert "'tensorbord' is no tracker; there are tensorboard, mlflow, wandb, trackio, or none" in result.stderr


def test_choice_of_trackers_trains_nothing_again(project: Sandbox) -> None:
    """What is reported, and under which name, changes no weight."""
    names = {"report_to": ["tensorboard", "mlflow"], "run_name": "first", "project": "mine"}
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(names))

    assert project.steps()["train"] == "up to date"


def test_wandb_is_offline_until_there_is_a_key(tmp_path: Path) -> None:
    """A key in the environment or in netrc is used; without one, nobody is asked in the middle of a run."""
    from edgetune.trackers import _has_wandb_key

    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password secret\n")

    assert _has_wandb_key({"NETRC": str(file)})
    assert _has_wandb_key({"WANDB_API_KEY": "k"})
    assert not _has_wandb_key({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not _has_wandb_key({"NETRC": str(tmp_path / "none")})
