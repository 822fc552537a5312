"""Fresh environments: what a user gets who has nothing but Python. Minutes each, so all of it is ``slow``."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, REPOSITORY, Sandbox

pytestmark = pytest.mark.slow


def test_base_install_tells_help_status_and_config_problems(tmp_path: Path, render: Callable[..., Sandbox]) -> None:
    """Without any extra, help, status, data and configuration checks work, and training names what is missing."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    constraints = str(REPOSITORY / "src/edgetune/constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, str(REPOSITORY)], check=True)
    project = render()

    def edgetune(*arguments: str) -> subprocess.CompletedProcess[str]:
        return project.command(python, "-m", "edgetune", *arguments)

    assert "finetune" in edgetune("--help").stdout
    assert edgetune("status").returncode == 0
    assert edgetune("data").returncode == 0
    missing = edgetune("finetune")
    assert missing.returncode == 1
    assert "error: the package 'torch' is not installed" in missing.stderr
    assert "hint: " in missing.stderr
    project.edit(lambda c: c["passes"]["lora"].update(ranc=3))
    assert "does not know the key 'ranc'" in edgetune("status").stderr


def test_fresh_project_works_with_make_alone(render: Callable[..., Sandbox]) -> None:
    """``make finetune && make infer`` in a new project makes its own environment, in a path with a space.

    What its lock names is all that edgetune, and everything edgetune needs, asks for.
    """
    project = render()
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "VIRTUAL_ENV"}

    for target in ("finetune", "infer"):
        result = subprocess.run(
            ["make", target], cwd=project.root, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr

    assert (project.root / ".venv/bin/edgetune").exists()
    checked = project.command(str(project.root / ".venv/bin/python"), "-m", "pip", "check")
    assert checked.returncode == 0, checked.stdout
    assert (project.root / "gen-model/onnx/model.onnx").exists()
    assert (project.root / "inferences/outputs-onnx.jsonl").exists()


def test_stock_olive_runs_the_same_file(fresh: Sandbox) -> None:
    """``olive run`` in the configuration's folder exits 0 and leaves an ONNX model."""
    assert fresh.run("download").returncode == 0
    shorten_for_olive(fresh)

    olive = Path(sys.executable).with_name("olive")
    result = subprocess.run(
        [str(olive), "run", "--config", "olive-config.json"],
        cwd=fresh.config.parent,
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-4000:]
    assert list((fresh.root / "gen-model/olive").rglob("*.onnx"))


def test_olive_engine_reports_success_and_failure(fresh: Sandbox) -> None:
    """``make olive`` leaves a model; when a pass fails, Olive's exit code 0 becomes 1 and the model stays."""
    shorten_for_olive(fresh)
    result = fresh.make("olive")
    assert result.returncode == 0, result.stderr
    models = sorted((fresh.root / "gen-model/olive").rglob("*.onnx"))
    assert models
    assert "Running pass lora:lora" in result.stderr
    for backend in ("onnx", "merged", "adapter"):
        result = fresh.run("infer", "--engine", "olive", "--backend", backend, "have a nice day")
        assert result.returncode == 0, result.stderr
    result = fresh.run("verify", "--engine", "olive", "--rows", "8", "--json")
    checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
    assert checks["conversion"]
    assert "quantisation" in checks
    result = fresh.run("evaluate", "--engine", "olive", "--limit", "8", "--json")
    assert json.loads(result.stdout)["backends"].keys() == {"base", "adapter", "merged", "onnx"}
    models = sorted((fresh.root / "gen-model/olive").rglob("*.onnx"))  # verify may have set it aside

    fresh.edit(lambda c: c["passes"]["lora"].update(target_modules=["no_such_layer"]))
    result = fresh.run("finetune", "--engine", "olive")

    assert result.returncode == 1
    assert "error: gen-model/logs/olive.log: stock Olive produced no model" in result.stderr
    assert sorted((fresh.root / "gen-model/olive").rglob("*.onnx")) == models

    fresh.edit(lambda c: c["passes"]["lora"].update(target_modules=["o_proj", "qkv_proj"]))
    fresh.edit(lambda c: c["passes"]["builder"].update(precision="fp16"))
    result = fresh.run("finetune", "--engine", "olive")

    assert result.returncode == 1
    assert "Olive said: FP16 is not supported on CPU." in result.stderr
    assert "it said: Flow ['lora', 'merge_adapter_weights', 'builder'] is pruned" in result.stderr


def shorten_for_olive(project: Sandbox) -> None:
    """Two optimiser steps: what Olive makes of the file is the point, not how well it learns."""
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=2))
