"""Broken input: exit 1, every problem with its place and a hint, and nothing that was there is lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Sandbox
from edgetune.stages import read_manifest


def line_of(path: Path, text: str, occurrence: int = 1) -> int:
    """Return the line number of the n-th line that contains ``text``."""
    lines = [n for n, line in enumerate(path.read_text().splitlines(), start=1) if text in line]
    return lines[occurrence - 1]


def check_refused(project: Sandbox, *expected: str) -> None:
    """Assert that finetune fails with these messages, in the promised form, and leaves every result alone."""
    before = project.results()

    result = project.run("finetune")

    assert result.returncode == 1, result.stdout + result.stderr
    for text in expected:
        assert f"error: {text}" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert project.results() == before


def test_empty_dataset(project: Sandbox) -> None:
    """A training file without rows."""
    (project.root / "datasets/train.jsonl").write_text("")
    check_refused(project, "datasets/train.jsonl: the data set 'train_data' has no rows")


def test_missing_dataset(project: Sandbox) -> None:
    """A data file that is not there is named, with the line that names it."""
    (project.root / "datasets/eval.jsonl").unlink()
    line = line_of(project.config, "eval.jsonl")
    check_refused(project, f"fine-tuning/olive-config.json:{line}: the data file datasets/eval.jsonl does not exist")


def test_malformed_json_line(project: Sandbox) -> None:
    """A row that is no JSON is named by its line."""
    path = project.root / "datasets/train.jsonl"
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:-3]
    path.write_text("\n".join(lines) + "\n")
    check_refused(project, "datasets/train.jsonl:17: not valid JSON")


def test_missing_column_everywhere(project: Sandbox) -> None:
    """A file whose rows all lack a column of the template is one problem, not a thousand."""
    path = project.root / "datasets/train.jsonl"
    path.write_text(path.read_text().replace('"tone":', '"label":'))
    line = line_of(project.config, "text_template")
    check_refused(
        project,
        f"fine-tuning/olive-config.json:{line}: the template names the column 'tone', which datasets/train.jsonl lacks",
    )


def test_every_bad_row_is_told_at_once(project: Sandbox) -> None:
    """Missing, empty and non-text fields in several files come in one report."""
    for name, number, row in (
        ("train", 3, {"phrase": "x"}),
        ("train", 9, {"phrase": "", "tone": "joy"}),
        ("eval", 2, 7),
    ):
        path = project.root / f"datasets/{name}.jsonl"
        lines = path.read_text().splitlines()
        lines[number - 1] = json.dumps(row)
        path.write_text("\n".join(lines))
    check_refused(
        project,
        "datasets/train.jsonl:3: the column 'tone' is missing",
        "datasets/train.jsonl:9: the column 'phrase' is empty",
        "datasets/eval.jsonl:2: the row is not a JSON object",
    )


def edit_training_args(**values: Any) -> Callable[[Any], None]:
    """Return an edit of the LoRA pass's training arguments."""
    return lambda c: c["passes"]["lora"]["training_args"].update(values)


@pytest.mark.parametrize(
    ("edit", "key", "message", "hint"),
    [
        (
            edit_training_args(learning_rat=1),
            '"learning_rat"',
            "does not know the key",
            "did you mean 'learning_rate'",
        ),
        (lambda c: c.update(azureml_client={}), "azureml_client", "style of 2024 (azureml_client)", "edgetune migrate"),
        (lambda c: c["passes"]["lora"].update(torch_dtype="float16"), "torch_dtype", "float32'", "--engine olive"),
        (lambda c: c.update(evaluate_input_model=True), "evaluate_input_model", "should be false", "--engine olive"),
        (lambda c: c["passes"]["lora"].update(r=-3), '"r"', "greater than or equal to 1", ""),
        (edit_training_args(learning_rate="fast"), "learning_rate", "valid number", ""),
        (lambda c: c["passes"]["builder"].update(type="Rtn"), "passes", "does not run these passes", "--engine olive"),
        (lambda c: c["passes"]["lora"].update(type="Lora"), "lora", "a pass of type 'Lora'", "did you mean 'LoRA'"),
        (lambda c: c["passes"]["builder"].update(precision="fp16"), "precision", "no fp16 for CPU", "int4, fp32"),
        (
            lambda c: c["passes"]["lora"].update(train_data_config="no"),
            "train_data_config",
            "not defined",
            "train_data",
        ),
        (lambda c: c["passes"].pop("lora"), "passes", "does not run these passes", "MergeAdapter"),
        (lambda c: c["passes"]["lora"].update(lora_r=8), "lora_r", "does not know", "today it is 'r'"),
        (lambda c: c["passes"]["builder"].pop("type"), "builder", "has no 'type'", "README"),
        (lambda c: c["data_configs"][0]["load_dataset_config"].update(split="eval"), '"eval"', "files have one", ""),
        (
            lambda c: c["data_configs"][0]["load_dataset_config"].update(data_files=[]),
            "data_files",
            "at least 1",
            "",
        ),
        (edit_training_args(weight_decay="a"), "weight_decay", "valid number", ""),
        (lambda c: c["input_model"].update(model_path="/phi"), "model_path", "must be ../model-cache/", ""),
    ],
)
def test_config_problem(project: Sandbox, edit: Callable[[Any], object], key: str, message: str, hint: str) -> None:
    """A key or value the native engine cannot honour is refused with its line and the way out."""
    project.edit(edit)
    line = line_of(project.config, key)

    result = project.run("status")

    assert result.returncode == 1
    assert re.search(
        rf"^error: fine-tuning/olive-config\.json:{line}: .*{re.escape(message)}", result.stderr, re.MULTILINE
    )
    assert hint in result.stderr


def test_config_syntax_error(project: Sandbox) -> None:
    """A workflow file that is no JSON is refused with line and column."""
    text = project.config.read_text().replace('"systems": {', '"systems" {')
    project.config.write_text(text)
    check_refused(project, f"fine-tuning/olive-config.json:{line_of(project.config, 'systems')}: not valid JSON")


def test_key_given_twice(project: Sandbox) -> None:
    """A key that stands twice is refused: JSON readers keep only the last one, silently."""
    project.config.write_text(project.config.read_text().replace('"r": 64,', '"r": 8,\n      "r": 64,'))
    line = line_of(project.config, '"r": 64')

    result = project.run("status")

    assert result.returncode == 1
    assert f"error: fine-tuning/olive-config.json:{line}: the key 'r' appears twice" in result.stderr


def test_key_given_twice_in_a_row(fresh: Sandbox) -> None:
    """A row with a key that stands twice, at any depth, is bad: readers keep only the last one, silently."""
    path = fresh.root / "datasets/train.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = '{"phrase": "so glad", "tone": "joy", "tone": "fear"}'
    path.write_text("\n".join(lines))
    (fresh.root / "datasets/eval.jsonl").write_text('[\n{"phrase": "a", "tone": "joy", "more": {"b": 1, "b": 2}}]')

    result = fresh.run("data")

    assert result.returncode == 1
    assert "error: datasets/train.jsonl:5: the key 'tone' appears twice\nhint: remove one of the two" in result.stderr
    assert "error: datasets/eval.jsonl:2 (row 1): the key 'b' appears twice" in result.stderr


def test_several_config_problems_are_told_at_once(project: Sandbox) -> None:
    """Two mistakes are two errors in one run."""
    project.edit(lambda c: (c["passes"]["lora"].update(r=0), c["passes"]["builder"].update(block=1)))

    assert project.run("status").stderr.count("error: ") == 2


def test_config_problems_come_in_the_order_of_lines(fresh: Sandbox) -> None:
    """Whoever mends a file goes through it once, from its top to its end."""
    builder = {"type": "ModelBuilder", "precision": "fp32", "use_qdq": True, "int4_block_size": 32}
    fresh.edit(lambda c: (c["passes"].update(builder=builder), c["input_model"].update(model_path="/phi")))

    lines = [
        int(line) for line in re.findall(r"error: fine-tuning/olive-config.json:(\d+): ", fresh.run("status").stderr)
    ]

    assert lines == [line_of(fresh.config, key) for key in ("model_path", "use_qdq", "int4_block_size")]


def test_missing_calibration_data(fresh: Sandbox) -> None:
    """Rows that only a pass after the training looks at are asked for before anything is done."""
    name = "../datasets/calibration.jsonl"

    def calibrate(content: Any) -> None:
        [train, _] = content["data_configs"]
        load = train["load_dataset_config"] | {"data_files": name}
        content["data_configs"].append(train | {"name": "calibration_data", "load_dataset_config": load})
        builder = content["passes"].pop("builder")
        content["passes"] |= {"gptq": {"type": "Gptq", "data_config": "calibration_data"}, "builder": builder}

    fresh.edit(calibrate)
    place = f"fine-tuning/olive-config.json:{line_of(fresh.config, name)}"

    result = fresh.run("finetune")

    assert result.returncode == 1
    assert result.stderr.startswith(
        f"error: {place}: the data file datasets/calibration.jsonl does not exist\nhint: put"
    )
    assert not (fresh.root / "model-cache/edgetune").exists()


def load_from(name: str) -> Callable[[Any], None]:
    """Return an edit that takes the training data from the Hub."""
    return lambda c: c["data_configs"][0].update(load_dataset_config={"data_name": name, "split": "train"})


@pytest.mark.parametrize(
    ("edit", "value", "message"),
    [
        (lambda c: c["input_model"].update(model_path="../model-cache/../../x"), "../../x", "model_path must be"),
        (lambda c: c["input_model"].update(model_path="../model-cache/a/../../../b/c"), "b/c", "model_path must be"),
        (lambda c: c["input_model"].update(model_path="/model-cache/a/b"), "/model-cache/a/b", "model_path must be"),
        (lambda c: c["input_model"].update(model_path="../model-cache/a/..\\b"), "cache/a/..", "model_path must be"),
        (lambda c: c["input_model"].update(model_path="../model-cache/a/b\0"), "model-cache/a/b", "model_path must be"),
        (
            lambda c: c["data_configs"][0].update(name="../../x"),
            '"../../x"',
            "data_configs.0.name: a data set is named with letters",
        ),
        (load_from("a/.."), '"a/.."', "data_configs.0.load_dataset_config.data_name: neither a format"),
        (load_from("../a"), '"../a"', "data_configs.0.load_dataset_config.data_name: neither a format"),
        (load_from("/a"), '"/a"', "data_configs.0.load_dataset_config.data_name: neither a format"),
        (
            lambda c: c.update(passes={"../../x": {"type": "OnnxPeepholeOptimizer"}} | c["passes"]),
            '"../../x"',
            "the pass is called '../../x'",
        ),
    ],
)
def test_name_that_leads_elsewhere(fresh: Sandbox, edit: Callable[[Any], object], value: str, message: str) -> None:
    """Names of models, data sets and passes become names of folders and files: none leads out of the project's."""
    fresh.edit(edit)

    result = fresh.run("finetune", "--smoke")

    assert result.returncode == 1
    assert f"error: fine-tuning/olive-config.json:{line_of(fresh.config, value)}: {message}" in result.stderr


def test_workflow_id_that_leads_elsewhere(fresh: Sandbox) -> None:
    """Stock Olive makes a folder of ``workflow_id`` in its cache."""
    fresh.edit(lambda c: c.update(workflow_id="../../../x"))

    result = fresh.run("finetune", "--engine", "olive")

    assert result.returncode == 1
    place = f"fine-tuning/olive-config.json:{line_of(fresh.config, 'workflow_id')}"
    assert f"error: {place}: workflow_id is '../../../x', which Olive makes the name of a folder" in result.stderr


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..\\x", "C:x", ""])
def test_manifest_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    """What lists files outside of its folder is no manifest: results may come from somebody else."""
    (tmp_path / "manifest.json").write_text(json.dumps({"key": "k", "outputs": {"a/b": {}, name: {}}}))

    assert read_manifest(tmp_path) is None


def test_target_module_that_matches_nothing(project: Sandbox) -> None:
    """A misspelt layer name is refused before any weights are loaded, with the names there are."""
    project.edit(lambda c: c["passes"]["lora"].update(target_modules=["q_proj", "o_proj"]))
    line = line_of(project.config, '"target_modules"')
    check_refused(project, f"fine-tuning/olive-config.json:{line}: target_modules: 'q_proj' matches no linear layer")
    assert "qkv_proj" in project.run("finetune").stderr


def test_template_with_unknown_column(project: Sandbox) -> None:
    """A template that names a column the data lacks."""

    def edit(config: Any) -> None:
        for data in config["data_configs"]:
            data["pre_process_data_config"]["text_template"] = "<|user|>\n{mood}<|end|>\n<|assistant|>\n{tone}<|end|>"

    project.edit(edit)
    line = line_of(project.config, "text_template")
    check_refused(
        project,
        f"fine-tuning/olive-config.json:{line}: the template names the column 'mood'",
        f"fine-tuning/olive-config.json:{line + 1}: text_cols names 'phrase', which text_template does not use",
    )


def test_template_without_end_token(project: Sandbox) -> None:
    """A completion without an end token would make a model that never stops: refused, with the right token."""

    def edit(config: Any) -> None:
        for data in config["data_configs"]:
            process = data["pre_process_data_config"]
            process["text_template"] = process["text_template"].removesuffix("<|end|>")

    project.edit(edit)
    line = line_of(project.config, "text_template")
    check_refused(project, f"fine-tuning/olive-config.json:{line}: completions do not end with a token that stops")
    assert "<|end|>" in project.run("data").stderr


def test_rows_longer_than_the_limit(project: Sandbox) -> None:
    """Rows longer than max_seq_len are an error: cutting them would cut the completion."""

    def edit(config: Any) -> None:
        for data in config["data_configs"]:
            data["pre_process_data_config"]["max_seq_len"] = 12

    project.edit(edit)
    check_refused(project, f"fine-tuning/olive-config.json:{line_of(project.config, 'max_seq_len')}: ")


def test_base_model_that_is_nowhere(project: Sandbox) -> None:
    """A base model that is neither there nor to be fetched leaves all results alone and names the ways out."""
    project.edit(lambda c: c["input_model"].update(model_path="../model-cache/nobody/nothing"))
    before = project.results()

    result = project.run("finetune", env={"HF_ENDPOINT": "http://127.0.0.1:9"})

    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "model-cache/nobody/nothing" in result.stderr
    assert project.results() == before


def test_removed_base_model_comes_back(project: Sandbox) -> None:
    """The built-in base model is restored from the package, byte for byte, and nothing else runs again."""
    folder = project.root / "model-cache/edgetune/tiny-phi3"
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    before = project.keys()

    assert project.run("finetune").returncode == 0
    assert (folder / "model.safetensors").read_bytes() == weights
    assert project.keys() == before


def test_changed_base_model_is_refused(project: Sandbox) -> None:
    """Base weights that differ from the lock are an error, not a new base."""
    weights = project.root / "model-cache/edgetune/tiny-phi3/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    check_refused(project, "setup/model.lock.json: files in model-cache/edgetune/tiny-phi3 differ from")


def test_outside_a_project(tmp_path: Path) -> None:
    """Without a project every command says how to start one."""
    result = Sandbox(tmp_path).run("finetune")

    assert result.returncode == 1
    assert "copier copy" in result.stderr


def test_usage_errors_exit_2(tuned: Sandbox) -> None:
    """A wrong option is a usage error."""
    assert tuned.run("finetune", "--fast").returncode == 2


@pytest.mark.slow
def test_diverged_training_is_not_published(project: Sandbox) -> None:
    """A learning rate that turns weights into NaN is an error, not an adapter."""
    project.edit(edit_training_args(learning_rate=1e38, max_steps=4, eval_strategy="no"))
    line = line_of(project.config, '"learning_rate"')
    check_refused(project, f"fine-tuning/olive-config.json:{line}: training diverged")


@pytest.mark.slow
def test_unusable_training_argument(project: Sandbox) -> None:
    """What only transformers can judge is an error with its place too."""
    project.edit(edit_training_args(optim="no_such_optimiser"))
    check_refused(project, f"fine-tuning/olive-config.json:{line_of(project.config, 'training_args')}: training_args: ")


def test_rows_that_are_no_text(project: Sandbox) -> None:
    """Half a character, an endless number, a nested abyss: told by line like any other bad row."""
    path = project.root / "datasets/train.jsonl"
    lines = path.read_text().splitlines()
    lines[1:4] = [r'{"phrase": "\ud800", "tone": "joy"}', "1" * 5000, "[" * 5000]
    path.write_text("\n".join(lines))
    check_refused(project, *(f"datasets/train.jsonl:{number}: not valid JSON" for number in (2, 3, 4)))


def test_csv_as_spreadsheets_and_pandas_write_it(fresh: Sandbox) -> None:
    """Quoted newlines, an unnamed index column and a byte-order mark are fine; short and long rows are told."""
    fresh.edit(lambda c: c["data_configs"][0]["load_dataset_config"].update(data_name="csv", data_files="own.csv"))
    own = fresh.config.parent / "own.csv"
    own.write_text('\ufeff,phrase,tone\n0,"two\nlines, and a comma",joy\n1,plain,fear\n', encoding="utf-8")
    result = fresh.run("data")
    assert result.returncode == 0, result.stderr
    assert "train       2 rows" in result.stdout

    own.write_text("phrase,tone\na,joy\nb\nc,joy,extra\n")
    result = fresh.run("data")
    assert result.returncode == 1
    assert "error: fine-tuning/own.csv:3: the row does not have 2 fields" in result.stderr
    assert "error: fine-tuning/own.csv:4: the row does not have 2 fields" in result.stderr
