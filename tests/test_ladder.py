"""``edgetune export --auto``: the smallest int4 model that holds, and its settings in the workflow file."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from conftest import ENVIRONMENT, Sandbox
from edgetune.ladder import Rung, with_settings
from edgetune.project import Project


@pytest.mark.parametrize("options", [["--max-drop", "1"], ["--max-ms-per-token", "5"], ["--json"]])
def test_limits_without_the_ladder(fresh: Sandbox, options: list[str]) -> None:
    """An option that nothing would obey is a usage error."""
    result = fresh.run("export", *options)

    assert result.returncode == 2
    assert f"{options[0]} can only be given with --auto" in result.stderr


def test_bad_rows_that_are_allowed(fresh: Sandbox) -> None:
    """``export --auto --max-bad`` leaves bad rows out, as the other commands do: it comes as far as the training."""
    with (fresh.root / "datasets" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    fresh.edit(lambda content: content["passes"]["lora"].update(target_modules=["nothing"]))

    result = fresh.run("export", "--auto", "--max-bad", "1")

    assert result.returncode == 1
    assert "cannot be learned from" not in result.stderr
    assert "'nothing' matches no linear layer" in result.stderr


def crlf(text: str) -> bytes:
    """Write it as an editor on Windows does."""
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("encode", [str.encode, crlf])
def test_a_rungs_settings_in_the_workflow_file(fresh: Sandbox, encode: Callable[[str], bytes]) -> None:
    """A key that is there is replaced, others stand behind ``precision``; all other bytes stay."""
    text = fresh.config.read_text(encoding="utf-8").replace('"int4_block_size": 128', '"int4_algo_config":"rtn"')
    fresh.config.write_bytes(encode(text))
    settings = {"precision": "int4", "int4_algo_config": "k_quant_mixed", "int4_is_symmetric": False}
    target = fresh.config.with_name("new.json")

    workflow = with_settings(Project(fresh.root), Rung("k_quant_mixed", settings), fresh.config, target)

    expected = text.replace('"int4_algo_config":"rtn"', '"int4_algo_config":"k_quant_mixed"')
    expected = expected.replace('"precision": "int4"', '"precision": "int4",\n      "int4_is_symmetric": false')
    assert target.read_bytes() == encode(expected)
    assert workflow.builder.int4_algo_config == "k_quant_mixed"
    assert workflow.builder.int4_accuracy_level == 4


@pytest.mark.slow
def test_interrupted_on_the_ladder(project: Sandbox) -> None:
    """Ctrl-C ends it with exit code 130 and leaves nothing behind."""
    config, results = project.config.read_bytes(), project.results()
    command = [sys.executable, "-m", "edgetune", "export", "--auto"]
    with subprocess.Popen(command, cwd=project.root, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("comparing the exported model" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)

        assert "interrupted" in process.stderr.read()

    assert process.returncode == 130
    assert project.config.read_bytes() == config
    assert project.results() == results
    assert not [*project.config.parent.glob("*.tmp"), *(project.root / "gen-model").glob("ladder*")]


@pytest.mark.slow
@pytest.mark.parametrize("encode", [str.encode, crlf])
def test_the_winner_is_written_into_the_workflow_file(project: Sandbox, encode: Callable[[str], bytes]) -> None:
    """The first rung that holds replaces fp32, no other byte changes, and the export is brought up to date."""
    text = project.config.read_text(encoding="utf-8")
    text = text.replace('      "int4_block_size": 128,\n      "int4_accuracy_level": 4,\n', "")
    project.config.write_bytes(encode(text.replace('"precision": "int4"', '"precision":  "fp32"')))

    result = project.run("export", "--auto", "--json")

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    [rung] = found["rungs"]
    assert rung["rung"] == "int4"
    assert rung["faults"] == []
    assert rung["bytes"] < 5e6
    assert rung["ms_per_token"] > 0
    assert rung["numbers"]["onnx_accuracy"] > 0.95
    assert found["model"] == "gen-model/onnx.candidate"
    assert project.config.read_bytes() == encode(text.replace('"precision": "int4"', '"precision":  "int4"'))
    assert project.steps()["export"] == "up to date"
    assert not [*project.config.parent.glob("*.tmp"), *(project.root / "gen-model").glob("ladder*")]


@pytest.mark.slow
def test_no_rung_holds(project: Sandbox) -> None:
    """Exit 3, every rung with its numbers and its reason, and nothing changed."""
    config, results = project.config.read_bytes(), project.results()

    result = project.run("export", "--auto", "--max-ms-per-token", "0.001")

    assert result.returncode == 3, result.stderr
    header, *rungs, merged = result.stdout.splitlines()
    assert "accuracy" in header
    assert [rung.split("  ")[0] for rung in rungs] == ["int4", "int4, last layer int8", "k_quant_mixed", "Gptq"]
    assert all("ms a token, 0.001 are let through" in rung for rung in rungs)
    *sizes, gptq = [float(rung[22:32]) for rung in rungs]
    assert sizes == sorted(sizes)
    assert gptq < sizes[1], "only the last layer's quantisation is the builder's, in four bits"
    assert merged.startswith("(before the export)")
    assert "no rung holds; nothing was changed" in result.stderr
    assert project.config.read_bytes() == config
    assert project.results() == results
    assert not list((project.root / "gen-model").glob("ladder*"))


def test_settings_that_no_rung_goes_with(project: Sandbox) -> None:
    """A key that the second rung would ignore is named before anything is built."""
    project.edit(lambda c: c["passes"]["builder"].update(use_qdq=True))
    config = project.config.read_bytes()

    result = project.run("export", "--auto")

    assert result.returncode == 1
    assert "use_qdq" in result.stderr
    assert project.config.read_bytes() == config
