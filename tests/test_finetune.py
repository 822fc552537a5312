"""The main job on the built-in model: what a user sees of ``make finetune`` and ``make infer``."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ENVIRONMENT, Sandbox

TONES = ("joy", "sadness", "fear", "surprise")


def eval_rows(project: Sandbox) -> list[dict[str, str]]:
    """Return the rows of the evaluation set."""
    text = (project.root / "datasets" / "eval.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answers_of_transformers(folder: Path, rows: list[dict[str, str]]) -> list[str]:
    """Answer with transformers in float32, greedily: what the exported model is compared with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [f"<|user|>\n{row['phrase']}<|end|>\n<|assistant|>\n" for row in rows]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(answers: list[str], rows: list[dict[str, str]]) -> float:
    """Return the share of answers that are exactly the label."""
    return sum(answer == row["tone"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def test_make_infer_answers_every_prompt_with_its_tone(tuned: Sandbox) -> None:
    """After ``make finetune``, ``make infer`` prints the four tones and writes them as JSONL."""
    result = tuned.make("infer")

    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tuned.root / "inferences/outputs-onnx.jsonl").read_text().splitlines()]
    assert {record["answer"] for record in records} == set(TONES)
    assert all(f"{record['phrase']} → {record['answer']}" in result.stdout for record in records)
    assert "written to inferences/outputs-onnx.jsonl" in result.stderr


def test_fine_tuning_teaches_the_task_and_int4_keeps_it(tuned: Sandbox, tmp_path: Path) -> None:
    """The base model does not know the task; the merged model does; int4 stays within 2 points and stops."""
    rows = eval_rows(tuned)
    output = tmp_path / "answers.jsonl"
    result = tuned.run("infer", "--prompts", "datasets/eval.jsonl", "--output", str(output))
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    base = accuracy(answers_of_transformers(tuned.root / "model-cache/edgetune/tiny-phi3", rows), rows)
    merged = accuracy(answers_of_transformers(tuned.root / "gen-model/merged", rows), rows)
    int4 = accuracy([record["answer"] for record in records], rows)

    assert base <= 0.45
    assert merged >= 0.90
    assert abs(int4 - merged) <= 0.02
    assert sum(record["stop_reason"] == "stop" for record in records) >= 0.99 * len(rows)


def test_exported_context_is_what_the_workflow_asks_for(tuned: Sandbox) -> None:
    """``max_length`` comes from ``ModelBuilder.search``, not from the model's full context."""
    config = json.loads((tuned.root / "gen-model/onnx/genai_config.json").read_text())
    asked = json.loads(tuned.config.read_text())["passes"]["builder"]["search"]["max_length"]

    assert config["search"]["max_length"] == asked
    assert asked < config["model"]["context_length"]


def test_second_run_does_nothing(project: Sandbox) -> None:
    """``make finetune`` again says "up to date" for every step and builds nothing."""
    before = project.keys()

    result = project.make("finetune")

    assert result.returncode == 0
    assert re.findall(r"^(\w+) +up to date$", result.stderr, re.MULTILINE) == [
        "download",
        "data",
        "train",
        "merge",
        "export",
        "verify",
    ]
    assert project.keys() == before


def test_second_run_imports_nothing_heavy(tuned: Sandbox) -> None:
    """Help, status and an up-to-date run need none of the packages that take seconds to import."""
    heavy = ("torch", "transformers", "olive", "peft", "datasets", "onnxruntime", "onnxruntime_genai", "numpy")
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from edgetune.cli import main; sys.exit(main())"

    for arguments in (["--help"], ["status"], ["doctor"], ["data"], ["finetune"]):
        result = tuned.command(sys.executable, "-c", code, *arguments)
        assert result.returncode == 0, result.stderr


def test_touching_files_changes_nothing(project: Sandbox) -> None:
    """Keys depend on content: new time stamps everywhere leave every step up to date."""
    for path in project.root.rglob("*"):
        os.utime(path)

    assert set(project.steps().values()) == {"up to date"}


def test_learning_rate_reruns_from_training_on(project: Sandbox) -> None:
    """A changed learning rate makes train stale (and so merge and export), but not download and data."""
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(learning_rate=3e-4))

    assert project.steps() == {
        "download": "up to date",
        "data": "up to date",
        "train": "stale",
        "merge": "stale",
        "export": "stale",
        "verify": "stale",
    }


def test_logging_interval_reruns_nothing(project: Sandbox) -> None:
    """What changes no weight is not part of a key."""
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(logging_steps=3))

    assert set(project.steps().values()) == {"up to date"}


def test_one_edited_row_reruns_training(project: Sandbox) -> None:
    """One changed data row makes data and training stale."""
    path = project.root / "datasets" / "train.jsonl"
    path.write_text(path.read_text().replace('"tone"', '"tone" ', 1))

    assert project.steps()["download"] == "up to date"
    assert project.steps()["train"] == "stale"


def test_block_size_reruns_only_the_export(project: Sandbox) -> None:
    """A changed int4 block size exports again and leaves the steps before it, and the published model, alone."""
    before, content = project.keys(), project.config.read_text()
    project.edit(lambda c: c["passes"]["builder"].update(int4_block_size=64))

    result = project.run("export")

    assert result.returncode == 0, result.stderr
    assert result.stdout == "gen-model/onnx.candidate\n"
    assert project.keys() == before
    assert project.steps()["verify"] == "stale"
    project.config.write_text(content)
    assert set(project.steps().values()) == {"up to date"}


def test_tampered_output_is_built_again(project: Sandbox) -> None:
    """A published file that was changed afterwards is not taken for the stage's result."""
    weights = project.root / "gen-model/merged/model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))

    assert project.steps()["merge"] == "stale"
    assert project.run("merge").returncode == 0
    assert weights.read_bytes() == original


def shorten(project: Sandbox, steps: int) -> None:
    """Make training a matter of seconds, with a checkpoint every two steps."""
    project.edit(
        lambda c: c["passes"]["lora"]["training_args"].update(max_steps=steps, save_steps=2, eval_strategy="no")
    )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 11])
def test_eval_loss_is_the_mean_over_all_learned_tokens(project: Sandbox, rows: int) -> None:
    """However many rows are left for the last batch."""
    from peft import PeftModel
    from torch.nn.functional import cross_entropy

    from edgetune.batches import IGNORED, Collator
    from edgetune.dataset import Tokens
    from edgetune.loading import load_weights

    shorten(project, 2)
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(eval_strategy="steps", eval_steps=2))
    file = project.root / "datasets/eval.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")

    assert project.run("train").returncode == 0

    base, adapter = project.root / "model-cache/edgetune/tiny-phi3", project.root / "gen-model/adapter"
    samples = Tokens(project.root / "gen-model/data", "eval")
    batch = Collator(base)([samples[row] for row in range(len(samples))])
    model: Any = PeftModel.from_pretrained(load_weights(base, dtype="float32", trusted=False), adapter)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED).item()
    manifest = json.loads((adapter / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["eval_loss"] == pytest.approx(wanted, rel=1e-4)


def wait_until(process: "subprocess.Popen[Any]", condition: Callable[[], bool]) -> None:
    """Wait for something a running process does; fail when it ends or two minutes pass before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended before"
        assert time.monotonic() < deadline, "waited two minutes in vain"
        time.sleep(0.02)


def kill_in_training(project: Sandbox) -> Path:
    """Start training, kill -9 it after two checkpoints are whole; return their folder."""
    checkpoints = project.root / "gen-model/adapter.partial/checkpoints"
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "train"],
        cwd=project.root,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(process, lambda: len(list(checkpoints.glob("*/manifest.json"))) == 2)
        process.send_signal(signal.SIGKILL)
    return checkpoints


@pytest.mark.slow
def test_killed_training_continues_to_the_same_adapter(project: Sandbox) -> None:
    """Killed in the middle, training continues from a checkpoint and ends where an undisturbed run ends."""
    from safetensors.numpy import load_file

    shorten(project, 14)
    assert project.run("train").returncode == 0
    adapter = project.root / "gen-model/adapter/adapter_model.safetensors"
    undisturbed = load_file(adapter)
    (project.root / "gen-model/adapter/manifest.json").unlink()
    kill_in_training(project)

    result = project.run("train")

    assert result.returncode == 0, result.stderr
    assert re.search(r"continuing from step \d+ of an interrupted run", result.stderr)
    for name, tensor in load_file(adapter).items():
        assert abs(tensor - undisturbed[name]).max() <= 1e-6
    assert not (project.root / "gen-model/adapter/checkpoints").exists()


@pytest.mark.slow
def test_half_written_checkpoint_is_skipped(project: Sandbox) -> None:
    """A checkpoint with a truncated file is passed over for the one before it."""
    shorten(project, 14)
    checkpoints = kill_in_training(project)
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    weights = newest / "adapter_model.safetensors"
    if weights.exists():
        weights.write_bytes(weights.read_bytes()[:1000])

    result = project.run("train")

    assert result.returncode == 0, result.stderr
    assert f"skipping {newest.name}: it was not written completely" in result.stderr
    assert "continuing from step" in result.stderr


WITHOUT_PICKLE = """
import sys

def refuse(event, arguments):
    if event == "pickle.find_class":
        frame = sys._getframe()
        while frame:
            if "/multiprocessing/" in frame.f_code.co_filename:  # what our own processes tell one another
                return
            frame = frame.f_back
        raise SystemExit(f"a pickle asks for {arguments}")

sys.addaudithook(refuse)
import torch
from edgetune import cli

load = torch.load

def load_tensors(*arguments, **options):
    if options.get("weights_only") is not True:
        raise SystemExit("torch.load without weights_only=True")
    print("loaded", arguments[0], file=sys.stderr)
    return load(*arguments, **options)

torch.load = load_tensors
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_no_pickle_is_ever_loaded(fresh: Sandbox) -> None:
    """From a checkpoint to answers: torch.load is called for tensors only, which cannot run code."""
    shorten(fresh, 14)
    kill_in_training(fresh)

    resumed = fresh.command(sys.executable, "-c", WITHOUT_PICKLE, "finetune")

    assert resumed.returncode in {0, 3}, resumed.stderr  # a model that has hardly learned may not pass
    assert "continuing from step" in resumed.stderr
    assert "verify    " in resumed.stderr
    log = (fresh.root / "gen-model/logs/train.log").read_text(encoding="utf-8")
    assert re.findall(r"^loaded .*/(.*)$", log, re.MULTILINE) == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    asked = fresh.command(sys.executable, "-c", WITHOUT_PICKLE, "infer", "--backend", "adapter", "what a day")
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow
def test_interrupt_ends_with_130_and_keeps_results(project: Sandbox) -> None:
    """Ctrl-C during training is no traceback, exits 130, and the published results stay."""
    before = project.results()
    shorten(project, 500)
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "train"],
        cwd=project.root,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(process, lambda: any((project.root / "gen-model/adapter.partial").glob("checkpoints/checkpoint-*")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in errors
    assert project.results() == before


def test_two_runs_at_once_are_refused(project: Sandbox) -> None:
    """The second run in one project names the process that holds it."""
    shorten(project, 500)
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", "train"], cwd=project.root, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as process:
        holder = project.root / "gen-model/.lock.pid"
        wait_until(process, lambda: holder.exists() and holder.read_text() == str(process.pid))
        try:
            result = project.run("finetune")
        finally:
            process.kill()

    assert result.returncode == 1
    assert f"process {process.pid}" in result.stderr


def test_piped_output_is_plain_text(project: Sandbox) -> None:
    """With stderr in a file there are no carriage returns or escape codes, even when colour is forced."""
    project.edit(lambda c: c["passes"]["builder"].update(int4_block_size=64))

    result = project.run("export", env={"FORCE_COLOR": "1"})

    assert result.returncode == 0, result.stderr
    assert result.stdout == "gen-model/onnx.candidate\n"
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr
    events = [json.loads(line) for line in (project.root / "gen-model/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["stage"] == "export"][-1] == "done"


def test_missing_adapter_makes_later_steps_stale(project: Sandbox) -> None:
    """A merged model whose adapter is gone is not up to date: the next adapter may differ in its last bits."""
    shutil.rmtree(project.root / "gen-model/adapter")

    assert project.steps() == {
        "download": "up to date",
        "data": "up to date",
        "train": "missing",
        "merge": "stale",
        "export": "stale",
        "verify": "stale",
    }


def test_project_can_be_named_from_elsewhere(tuned: Sandbox) -> None:
    """``--project`` takes relative paths with ``..``."""
    elsewhere = Sandbox(tuned.root / "datasets")

    result = elsewhere.run("status", "--project", "../../my-slm")

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("up to date") == 6
