"""The copier template: what it renders, what it refuses, and what the rendered files do."""

import functools
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import copier
import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from plumbum import local
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput

from conftest import ENVIRONMENT
from edgetune import config
from edgetune.contract import Template
from edgetune.project import Project
from edgetune.prompt import load_tokenizer
from templates import CONSTRAINTS, RELEASE, REPOSITORY, commit, copy_template, git, render

QUESTIONS: dict[str, Any] = yaml.safe_load((REPOSITORY / "copier.yml").read_text(encoding="utf-8"))
CATALOGUE: dict[str, dict[str, Any]] = QUESTIONS["catalogue"]["default"]
FILE_FORMATS: list[str] = list(QUESTIONS["data_formats"]["default"])
MODELS = [name for name in CATALOGUE if name != "custom"]
CHOICES: dict[str, dict[str, str]] = {
    "tone": {},
    "qa": {"dataset": "qa"},
    "file": {"dataset": "file", "data_file": "own.csv", "columns": "text, a second text , label"},
    "file-tsv": {"dataset": "file", "data_file": "datasets/mine/own.tsv", "columns": "frage,größe 😀"},
    "file-absolute": {"dataset": "file", "data_file": "/srv/my rows/own.PARQUET", "columns": "completion,prompt"},
    "hub": {"dataset": "hub", "hub_dataset": "some-org/a.set_1", "columns": "instruction,output"},
    "hub-chats": {"dataset": "hub", "hub_dataset": "legacy", "columns": " messages "},
    "datastore": {
        "dataset": "datastore",
        "datastore_path": "azureml://datastores/workspaceblobstore/paths/a/b/own.jsonl",
        "columns": "q,a",
    },
    "datastore-long": {
        "dataset": "datastore",
        "datastore_path": "azureml://subscriptions/s/resourcegroups/r/workspaces/w/datastores/d/paths/own.json",
        "columns": "messages",
    },
    "datastore-folder": {
        "dataset": "datastore",
        "datastore_path": "azureml://datastores/workspaceblobstore/paths/tones/v2/",
        "columns": "q,a",
    },
    "qlora": {"method": "qlora", "base_model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "dora": {"method": "dora"},
    "none": {"method": "none", "dataset": "qa"},
    "cuda": {"device": "cuda"},
    "directml": {"device": "directml"},
}
PASSES = {"qlora": ["qlora"], "dora": ["dora"], "none": []}
FORMATS = {
    "phi3": "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}<|end|>",
    "chatml": "<|im_start|>user\n{phrase}<|im_end|>\n<|im_start|>assistant\n{tone}<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{phrase}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{tone}<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\n{phrase}<end_of_turn>\n<start_of_turn>model\n{tone}<end_of_turn>",
    "mistral": "<s>[INST] {phrase}[/INST]{tone}</s>",
    "plain": "{phrase}\n{tone}<|endoftext|>",
}
LITTLE_WORDS = frozenset(
    {"a", "an", "the", "is", "are", "do", "does", "did", "in", "of", "to", "for", "from", "its", "all"}
)
COMMANDS = {
    "download": "download",
    "data": "data",
    "smoke": "finetune --smoke",
    "finetune": "finetune",
    "verify": "verify",
    "infer": "infer --prompts inferences/prompts.jsonl",
    "chat": "infer --chat",
    "evaluate": "evaluate",
    "report": "report",
    "package": "package",
    "olive": "finetune --engine olive",
    "status": "status",
    "doctor": "doctor",
}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Load the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config_of(project: Path) -> dict[str, Any]:
    """Load a project's Olive workflow file."""
    return dict(json.loads((project / "fine-tuning/olive-config.json").read_text(encoding="utf-8")))


def requirement_of(project: Path) -> str:
    """Return the line of ``setup/requirements.txt`` that installs edgetune."""
    lines = (project / "setup/requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("edgetune"))


def make(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in ``project``, untouched by a make that runs these tests."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON", "TORCH_INDEX"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(["make", *arguments], cwd=project, env=clean, check=False, capture_output=True, text=True)


def script(path: Path, *lines: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the template in a plain folder whose path has a space."""
    return copy_template(tmp_path_factory.mktemp("a template"))


@pytest.fixture(scope="session")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with the default answers, for reading only."""
    return render(template, tmp_path_factory.mktemp("rendered") / "my slm")


@pytest.fixture(scope="session")
def chosen(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that renders each of ``CHOICES`` once, for reading only."""
    return functools.cache(lambda choice: render(template, tmp_path_factory.mktemp(choice) / "out", **CHOICES[choice]))


@pytest.fixture
def own_project(project: Path, tmp_path: Path) -> Path:
    """Return a copy of the default project for one test to change."""
    return shutil.copytree(project, tmp_path / "my slm")


@pytest.fixture(scope="session")
def git_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a git repository of the template, tagged as its version is; copier keeps its mirrors beside it."""
    folder = tmp_path_factory.mktemp("remote")
    repository = copy_template(folder / "edgetune.git")
    commit(repository, RELEASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPIER_CACHE_DIR", str(folder / "mirrors"))
        yield repository


# ---------------------------------------------------------------- what is rendered


FILES = {
    ".copier-answers.yml",
    ".env.example",
    ".github/workflows/ci.yml",
    ".gitignore",
    "Makefile",
    "README.md",
    "datasets/README.md",
    "fine-tuning/README.md",
    "fine-tuning/olive-config.json",
    "gen-model/.gitkeep",
    "inferences/README.md",
    "inferences/prompts.jsonl",
    "model-cache/.gitkeep",
    "setup/requirements.lock",
    "setup/requirements.txt",
}
"""What every project has."""
FILES_OF_A_SAMPLE = {"datasets/eval.jsonl", "datasets/train.jsonl"}
FILES_OF_COMPUTE: dict[str, set[str]] = {
    "local": set(),
    "azureml": {".amlignore", "fine-tuning/azureml-job.yml", "setup/conda.yaml"},
}
UNUSABLE_ON_WINDOWS = re.compile(
    r'[<>:"|?*\\\x00-\x1f]|[. ](/|$)|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', re.IGNORECASE
)
TARGETS = ["help", "setup", *COMMANDS, "clean"]


def files_of(folder: Path) -> list[str]:
    """Return the names of all files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_files(rendered: Path, answers: dict[str, str]) -> None:
    """Check that a project has the files of its answers and no others, with names that Windows can write."""
    sample = FILES_OF_A_SAMPLE if answers.get("dataset", "tone") in {"tone", "qa"} else set()
    names = files_of(rendered)
    assert set(names) == FILES | sample | FILES_OF_COMPUTE[answers.get("compute", "local")]
    assert not [name for name in names if UNUSABLE_ON_WINDOWS.search(name) or len(name) > 80]
    assert len({name.lower() for name in names}) == len(names)


def check_texts(rendered: Path) -> None:
    """Check that no template syntax is left over, that files parse, and that no code of others is trusted."""
    for path in (p for p in rendered.rglob("*") if p.is_file() and p.name != ".gitkeep"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\$\{\{(inputs|outputs)\.\w+\}\}", "", text)  # as Azure ML writes its own
        assert not [mark for mark in ("{{", "}}", "{%", "%}", "{#", "#}") if mark in text], path
        assert not re.search(r" $|\n\n\n|(?<!`)``(?!`)", text, re.MULTILINE), path
        assert re.search(r"[^\n]\n\Z", text), path
        assert not re.search(r"trust_remote_code\W{0,5}true", text, re.IGNORECASE), path
        if path.suffix == ".json":
            json.loads(text)
        if path.suffix in {".yml", ".yaml"}:
            yaml.safe_load(text)
        if path.suffix == ".toml":
            tomllib.loads(text)
        if path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines()), path


@pytest.mark.parametrize("choice", CHOICES)
def test_a_project_is_what_its_answers_ask_for(chosen: Callable[[str], Path], choice: str) -> None:
    """The files of the design, no more and no less; a workflow that edgetune accepts; targets that make understands."""
    check_files(chosen(choice), CHOICES[choice])

    method = CHOICES[choice].get("method", "lora")
    passes = [step.type.lower() for step in config.load(Project(chosen(choice))).passes.values()]
    assert passes == [*([method, "mergeadapterweights"] if method != "none" else []), "modelbuilder"]
    dry = make(chosen(choice), "-n", *TARGETS)
    assert dry.returncode == 0, dry.stderr


DATA = {name: answers for name, answers in CHOICES.items() if not answers or ("dataset" in answers and name != "none")}
BASE_MODELS: list[dict[str, str]] = [
    {},
    {"base_model": "Qwen/Qwen3-0.6B"},
    {"base_model": "custom", "custom_model": "me/mine", "prompt_format": "llama3"},
]


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_all_answers_go_together(template: Path, tmp_path: Path, stock_olive: Any, data: str) -> None:
    """Every data source with every method, device and compute, the kinds of base models in turn.

    edgetune and stock Olive accept each, and make understands its targets.
    """
    methods, devices, computes = (list(QUESTIONS[name]["choices"].values()) for name in ("method", "device", "compute"))
    for method, device, compute in itertools.product(methods, devices, computes):
        if compute == "azureml" and (device == "directml" or data == "file-absolute"):
            continue  # the question says why not
        model = BASE_MODELS[(methods.index(method) + devices.index(device)) % len(BASE_MODELS)]
        answers = DATA[data] | model | {"method": method, "device": device, "compute": compute}

        rendered = render(template, tmp_path / f"{method}-{device}-{compute}", **answers)

        check_files(rendered, answers)
        check_texts(rendered)
        workflow = config.load(Project(rendered))
        of_olive = stock_olive.RunConfig.model_validate(config_of(rendered))
        assert [steps[0].type for steps in of_olive.passes.values()] == [
            step.type.lower() for step in workflow.passes.values()
        ]
        assert not workflow.input_model.load_kwargs.trust_remote_code
        dry = make(rendered, "-n", *TARGETS)
        assert dry.returncode == 0, dry.stderr


def test_the_template_itself_runs_nothing_and_can_be_cloned_anywhere() -> None:
    """No tasks, migrations or extensions, which copier would want to be trusted for; names that Windows can write."""
    settings = {name for name in QUESTIONS if name.startswith("_")}

    assert not settings & {"_tasks", "_migrations", "_jinja_extensions"}
    assert not [name for name in files_of(REPOSITORY / "template") if UNUSABLE_ON_WINDOWS.search(name)]


@pytest.mark.parametrize(
    "answers",
    [
        {"base_model": "google/gemma-3-1b-it", "project_name": "tone.v2_a-b"},
        {"base_model": "Qwen/Qwen3-0.6B"},
        {"base_model": "custom", "custom_model": "some.org/a-model_1.5", "prompt_format": "plain"},
        *CHOICES.values(),
        {"compute": "azureml"},
        {
            "compute": "azureml",
            "azureml_compute": "gpus",
            "device": "cuda",
            "base_model": "microsoft/Phi-3-mini-4k-instruct",
            "registry_model": "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/10",
            "dataset": "datastore",
            "datastore_path": "azureml://datastores/workspaceblobstore/paths/a/rows",
            "columns": "q,a",
        },
    ],
    ids=["gated", "own-template", "custom", *CHOICES, "azureml", "azureml-datastore"],
)
def test_text_files_are_complete(template: Path, tmp_path: Path, answers: dict[str, str]) -> None:
    """No template syntax is left over, every file ends with one newline, and JSON and YAML parse."""
    check_texts(render(template, tmp_path / "out", **answers))


def test_prompts_are_not_in_the_datasets(project: Path) -> None:
    """The model is asked about phrases that it has neither learned from nor been measured on."""

    def phrases(name: str) -> set[str]:
        return {row["phrase"].lower() for row in lines_of(project / name)}

    prompts = phrases("inferences/prompts.jsonl")

    assert 4 <= len(prompts) <= 6
    assert prompts.isdisjoint(phrases("datasets/train.jsonl") | phrases("datasets/eval.jsonl"))


def test_after_copying_the_next_commands_can_be_pasted(template: Path, tmp_path: Path) -> None:
    """The message quotes the project's folder for the shell, and the commands are make targets."""
    folder = tmp_path / "it's mine"
    command = [sys.executable, "-m", "copier", "copy", "--defaults", str(template), str(folder)]

    message = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    change = next(line for line in message.splitlines() if line.strip().startswith("cd "))
    pasted = subprocess.run(["sh", "-c", f"{change} && pwd"], check=True, capture_output=True, text=True).stdout
    assert pasted.strip() == str(folder)
    assert "make finetune && make infer" in message


def test_ignored_are_secrets_and_everything_generated(own_project: Path) -> None:
    """Git sees what describes the project, the lock file and the two empty folders included."""
    generated = [
        ".env",
        ".venv/bin/python",
        "fine-tuning/cache/x.json",
        "gen-model/onnx/model.onnx",
        "gen-model/.lock",
        "inferences/outputs-onnx.jsonl",
        "model-cache/edgetune/tiny-phi3/model.safetensors",
    ]
    for name in [*generated, "setup/model.lock.json"]:
        (own_project / name).parent.mkdir(parents=True, exist_ok=True)
        (own_project / name).touch()
    git(own_project, "init", "--quiet")

    seen = git(own_project, "ls-files", "--others", "--exclude-standard").splitlines()

    assert not set(generated) & set(seen)
    assert {"setup/model.lock.json", "model-cache/.gitkeep", "gen-model/.gitkeep", ".env.example"} <= set(seen)


# ---------------------------------------------------------------- the workflow file


@pytest.mark.parametrize("base_model", MODELS)
def test_every_catalogue_model_fits_its_configuration(template: Path, tmp_path: Path, base_model: str) -> None:
    """Layer names, prompt format and sizes are those of the model's family."""
    config = config_of(render(template, tmp_path / "out", base_model=base_model))

    family = base_model.split("/")[1].lower()
    is_phi = "phi" in family
    data = [entry["pre_process_data_config"] for entry in config["data_configs"]]
    begins = {"phi": "<|user|>", "qwen": "<|im_start|>", "smol": "<|im_start|>", "llam": "<|begin_of_text|>"}
    begins |= {"tiny": "<|user|>", "gemm": "<bos>", "mist": "<s>[INST]"}
    ends = {"phi": "<|end|>", "qwen": "<|im_end|>", "smol": "<|im_end|>", "llam": "<|eot_id|>"}
    ends |= {"tiny": "<|end|>", "gemm": "<end_of_turn>", "mist": "</s>"}
    key = "phi" if family.startswith("phi") else family[:4]
    assert config["input_model"]["model_path"] == f"../model-cache/{base_model}"
    assert config["passes"]["lora"]["target_modules"] == (
        ["o_proj", "qkv_proj"] if is_phi else ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    assert data[0] == data[1]
    assert data[0]["text_template"].startswith(begins[key])
    assert data[0]["text_template"].endswith("{tone}" + ends[key])
    assert data[0]["max_seq_len"] <= config["passes"]["builder"]["search"]["max_length"] <= 4096


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_a_custom_model_gets_the_chosen_prompt_format(template: Path, tmp_path: Path, prompt_format: str) -> None:
    """The format's special tokens stand literally around the two columns; the answers remember the choice."""
    answers = {"base_model": "custom", "custom_model": "me/mine", "prompt_format": prompt_format}

    rendered = render(template, tmp_path / "out", **answers)

    data = config_of(rendered)["data_configs"][0]["pre_process_data_config"]
    recorded = yaml.safe_load((rendered / ".copier-answers.yml").read_text(encoding="utf-8"))
    assert data["text_template"] == FORMATS[prompt_format]
    assert data["text_cols"] == [name for _, name, _, _ in Formatter().parse(FORMATS[prompt_format]) if name]
    assert config_of(rendered)["input_model"]["model_path"] == "../model-cache/me/mine"
    assert answers.items() <= recorded.items()


@pytest.mark.parametrize(
    ("base_model", "text_template"),
    [
        ("microsoft/Phi-4-mini-instruct", "<|user|>{phrase}<|end|><|assistant|>{tone}<|end|>"),
        (
            "Qwen/Qwen3-1.7B",
            FORMATS["chatml"].replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
        ),
    ],
)
def test_models_that_differ_from_their_family(
    template: Path, tmp_path: Path, base_model: str, text_template: str
) -> None:
    """Phi-4-mini has no line breaks between turns; Qwen3 is told not to think aloud."""
    config = config_of(render(template, tmp_path / "out", base_model=base_model))

    assert config["data_configs"][0]["pre_process_data_config"]["text_template"] == text_template


def test_the_paths_in_the_workflow_exist(project: Path) -> None:
    """Data files are found from the workflow's folder, and results stay inside the project."""
    config = config_of(project)
    start = project / "fine-tuning"

    assert all((start / entry["load_dataset_config"]["data_files"]).is_file() for entry in config["data_configs"])
    assert (start / config["output_dir"]).resolve() == project / "gen-model/olive"
    assert (start / config["cache_dir"]).resolve() == project / "fine-tuning/cache"


@pytest.fixture(scope="session")
def stock_olive() -> Any:
    """Return the module of stock Olive that reads workflow files."""
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    return pytest.importorskip("olive.workflows.run.config", reason="stock Olive (extra: olive) is not installed")


@pytest.mark.parametrize("choice", CHOICES)
def test_stock_olive_accepts_the_workflow(chosen: Callable[[str], Path], stock_olive: Any, choice: str) -> None:
    """Olive's own schema takes the file and keeps the steps and their order."""
    config = config_of(chosen(choice))

    workflow = stock_olive.RunConfig.model_validate(config)

    tuning = PASSES.get(choice, ["lora"])
    merge = ["mergeadapterweights"] if tuning else []
    assert [steps[0].type for steps in workflow.passes.values()] == [*tuning, *merge, "modelbuilder"]
    assert workflow.engine.output_dir == Path("../gen-model/olive").resolve()


@pytest.mark.parametrize("choice", CHOICES)
def test_stock_olive_ignores_no_key(chosen: Callable[[str], Path], stock_olive: Any, choice: str) -> None:
    """Olive drops keys it does not know with a mere warning or none: the workflow has none of them.

    Of ``load_dataset_config`` it passes on what it does not know to ``datasets.load_dataset``.
    """
    import transformers
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from olive.data.component.load_dataset import huggingface_dataset
    from olive.data.component.text_generation import TextGenParams
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.package_config import OlivePackageConfig
    from olive.passes.pytorch.lora import HFTrainingArguments

    assert stock_olive
    config = config_of(chosen(choice))
    accelerator = AcceleratorSpec("cpu", "CPUExecutionProvider")
    packages = OlivePackageConfig.load_default_config()

    for step in config["passes"].values():
        known = packages.import_pass_module(step["type"]).default_config(accelerator)
        assert set(step) - {"type"} <= set(known), step["type"]
    trainer = set(transformers.TrainingArguments.__dataclass_fields__)
    for arguments in (step["training_args"] for step in config["passes"].values() if "training_args" in step):
        assert set(arguments) <= trainer | set(HFTrainingArguments.model_fields)
    loaders = {"csv": CsvConfig, "json": JsonConfig, "parquet": ParquetConfig}
    for entry in config["data_configs"]:
        assert set(entry["pre_process_data_config"]) <= set(TextGenParams.model_fields)
        loading = entry["load_dataset_config"]
        passed_on = set(loading) - set(inspect.signature(huggingface_dataset).parameters)
        assert passed_on <= set(getattr(loaders.get(loading["data_name"]), "__dataclass_fields__", ()))


@pytest.mark.parametrize("ending", FILE_FORMATS)
def test_stock_olive_reads_the_rows_of_a_file(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock_olive: Any, ending: str
) -> None:
    """From the workflow's folder, Olive's loader finds every format: nine tenths to train on, the rest to evaluate."""
    import datasets
    from olive.data.component.load_dataset import huggingface_dataset

    assert stock_olive
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rendered = render(
        template, tmp_path / "my slm", dataset="file", data_file=f"own.{ending}", columns="the text,label"
    )
    rows = datasets.Dataset.from_list([{"the text": f"number {n}, with a comma", "label": f"l{n}"} for n in range(20)])
    target = rendered / f"datasets/own.{ending}"
    if ending == "parquet":
        rows.to_parquet(target)
    elif ending in {"csv", "tsv"}:
        rows.to_csv(target, sep={"csv": ",", "tsv": "\t"}[ending])
    else:
        rows.to_json(target, lines=ending == "jsonl")
    monkeypatch.chdir(rendered / "fine-tuning")

    train, evaluation = (
        huggingface_dataset(**entry["load_dataset_config"]) for entry in config_of(rendered)["data_configs"]
    )

    assert train.to_list() == rows.to_list()[:18]
    assert evaluation.to_list() == rows.to_list()[18:]


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("choice", "loading"),
    [
        ("file", {"data_name": "csv", "data_files": "../datasets/own.csv"}),
        ("file-tsv", {"data_name": "csv", "delimiter": "\t", "data_files": "../datasets/mine/own.tsv"}),
        ("file-absolute", {"data_name": "parquet", "data_files": "/srv/my rows/own.PARQUET"}),
        ("hub", {"data_name": "some-org/a.set_1"}),
        ("hub-chats", {"data_name": "legacy"}),
        ("datastore", {"data_name": "json", "data_files": "../datasets/own.jsonl"}),
        ("datastore-long", {"data_name": "json", "data_files": "../datasets/own.json"}),
    ],
)
def test_rows_of_ones_own_are_divided_by_slices(
    chosen: Callable[[str], Path], choice: str, loading: dict[str, str]
) -> None:
    """Both data sets read the chosen place, nine tenths and one; a ``datasets/`` before the name means the same."""
    rendered = chosen(choice)

    train, evaluation = (entry["load_dataset_config"] for entry in config_of(rendered)["data_configs"])
    assert train == loading | {"split": "train[:90%]"}
    assert evaluation == loading | {"split": "train[90%:]"}
    assert {path.name for path in (rendered / "datasets").iterdir()} == {"README.md"}


@pytest.mark.parametrize(
    ("choice", "prompt", "completion", "columns"),
    [
        ("qa", "{Question}", "{Best Answer}", ["Question", "Best Answer"]),
        ("file", "{text}\n{a second text}", "{label}", ["text", "a second text", "label"]),
        ("file-tsv", "{frage}", "{größe 😀}", ["frage", "größe 😀"]),
        ("file-absolute", "{completion}", "{prompt}", ["completion", "prompt"]),
    ],
)
def test_the_last_column_is_the_completion(
    chosen: Callable[[str], Path], choice: str, prompt: str, completion: str, columns: list[str]
) -> None:
    """The others make the prompt, whatever they are called; edgetune reads the template the same way."""
    rendered = chosen(choice)

    data = config_of(rendered)["data_configs"][0]["pre_process_data_config"]
    readme = (rendered / "datasets/README.md").read_text(encoding="utf-8")
    assert data["text_template"] == f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{completion}<|end|>"
    assert data["text_cols"] == list(Template.parse(data["text_template"]).columns) == columns
    assert all(list(row) == columns[:-1] for row in lines_of(rendered / "inferences/prompts.jsonl"))
    assert re.findall(r"^\| `(.*)` \| what", readme, re.MULTILINE) == columns


@pytest.mark.parametrize("choice", ["hub-chats", "datastore-long"])
def test_chats_are_written_with_the_models_own_template(
    project: Path, chosen: Callable[[str], Path], choice: str
) -> None:
    """The column ``messages`` alone means chats; how the text becomes tokens does not change."""
    texts = config_of(project)["data_configs"][0]["pre_process_data_config"]
    del texts["text_template"], texts["text_cols"]

    chats = [entry["pre_process_data_config"] for entry in config_of(chosen(choice))["data_configs"]]

    (prompt,) = lines_of(chosen(choice) / "inferences/prompts.jsonl")
    assert chats == [{"chat_template": True, "message_col": "messages"} | texts] * 2
    assert [message["role"] for message in prompt["messages"]] == ["user"]


def test_the_questions_are_all_different(chosen: Callable[[str], Path]) -> None:
    """Enough rows, short enough for the built-in model; no question stands twice, be it in another file."""
    rendered = chosen("qa")
    train, evaluation = (lines_of(rendered / f"datasets/{name}.jsonl") for name in ("train", "eval"))
    prompts = lines_of(rendered / "inferences/prompts.jsonl")
    data = config_of(rendered)["data_configs"][0]["pre_process_data_config"]
    tokenizer = load_tokenizer(REPOSITORY / "src/edgetune/builtin/tiny-phi3")

    def significant(question: str) -> frozenset[str]:
        return frozenset(re.findall(r"[a-z0-9']+", question.lower())) - LITTLE_WORDS

    questions = [significant(row["Question"]) for row in [*train, *evaluation, *prompts]]
    texts = [data["text_template"].format(**row) for row in [*train, *evaluation]]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert 160 <= len(train) <= 240
    assert (len(evaluation), len(prompts)) == (40, 5)
    assert all(list(row) == ["Question", "Best Answer"] for row in [*train, *evaluation])
    assert all(row["Question"].endswith("?") for row in [*train, *evaluation, *prompts])
    assert all(row["Best Answer"].endswith(".") for row in [*train, *evaluation])
    assert len(set(questions)) == len(questions)
    assert max(lengths) <= data["max_seq_len"]


@pytest.mark.parametrize(("choice", "checked"), [("file", True), ("file-absolute", False), ("datastore", False)])
def test_the_workflow_on_github_checks_rows_that_are_there(
    chosen: Callable[[str], Path], choice: str, *, checked: bool
) -> None:
    """A repository has neither files of another folder nor those of a datastore."""
    assert ci_commands(chosen(choice)) == ["make setup", *["make data", "make smoke"] * checked, "make status"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["tone", "file"])
def test_the_workflow_on_github_passes(chosen: Callable[[str], Path], tmp_path: Path, choice: str) -> None:
    """In a checkout of what git has of the project, with the environment of the tests for the one it would install."""
    project = shutil.copytree(chosen(choice), tmp_path / "project")
    if choice == "file":
        rows = [f"the number {number},in words,number {number}" for number in range(40)]
        (project / "datasets/own.csv").write_text("\n".join(["text,a second text,label", *rows]), encoding="utf-8")
    commit(project)
    git(tmp_path, "clone", "--quiet", str(project), "checkout")

    for command in ci_commands(project):
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=tmp_path / "checkout",
            env=ENVIRONMENT | {"VENV": sys.prefix},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_workflow_on_github_downloads_no_weights(template: Path, tmp_path: Path) -> None:
    """The smoke run is for the built-in model: others would be fetched for each push."""
    project = render(template, tmp_path / "out", base_model="Qwen/Qwen3-0.6B")

    assert ci_commands(project) == ["make setup", "make data", "make status"]


def ci_commands(project: Path) -> list[str]:
    """Return what the project's workflow on GitHub runs."""
    steps = yaml.safe_load((project / ".github/workflows/ci.yml").read_text())["jobs"]["data"]["steps"]
    return [step["run"] for step in steps if "run" in step]


def test_a_datastores_folder_has_both_files(chosen: Callable[[str], Path]) -> None:
    """A folder of a datastore is one with ``train.jsonl`` and ``eval.jsonl``, each read as a whole."""
    loads = [entry["load_dataset_config"] for entry in config_of(chosen("datastore-folder"))["data_configs"]]

    assert loads == [
        {"data_name": "json", "data_files": f"../datasets/{name}.jsonl", "split": "train"} for name in ("train", "eval")
    ]
    assert "/datasets/*.jsonl" in (chosen("datastore-folder") / ".gitignore").read_text(encoding="utf-8")


def test_git_ignores_the_copy_of_a_datastores_file(chosen: Callable[[str], Path], tmp_path: Path) -> None:
    """Its place is the datastore; everything else in ``datasets/`` belongs to the project."""
    rendered = shutil.copytree(chosen("datastore"), tmp_path / "out")
    (rendered / "datasets/own.jsonl").touch()
    git(rendered, "init", "--quiet")

    seen = git(rendered, "ls-files", "--others", "--exclude-standard", "datasets").splitlines()

    assert seen == ["datasets/README.md"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("tone", "is ready. Next:"),
        ("file-tsv", "is ready. Put your rows into datasets/mine/own.tsv, then:"),
        ("file-absolute", "is ready. Next:"),
        ("datastore", "is ready. Copy the datastore's file to datasets/own.jsonl, then:"),
    ],
)
def test_after_copying_it_says_where_the_rows_go(
    template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], choice: str, said: str
) -> None:
    """Commands that would fail for want of a file are not the first thing to do."""
    copier.run_copy(str(template), tmp_path / "out", CHOICES[choice], defaults=True, settings=copier.Settings())

    assert said in capfd.readouterr().err


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"method": "full"}, "method.*'full' is not in"),
        ({"device": "tpu"}, "device.*'tpu' is not in"),
        ({"dataset": "mine"}, "dataset.*'mine' is not in"),
        ({"compute": "cluster"}, "compute.*'cluster' is not in"),
        ({"compute": "azureml", "device": "directml"}, "The packages for DirectML are for Windows"),
        ({"azureml_compute": "big"}, "azureml_compute is read with compute=azureml only"),
        ({"compute": "azureml", "azureml_compute": "a b"}, "The name of a compute"),
        ({"compute": "azureml", "registry_model": "azureml:m:1"}, "not for the built-in model"),
        (
            {"compute": "azureml", "dataset": "file", "data_file": "/srv/own.csv", "columns": "a,b"},
            "A job of Azure ML cannot read /srv/own.csv",
        ),
        (
            {"compute": "azureml", "base_model": "Qwen/Qwen3-0.6B", "registry_model": "azureml://models/m"},
            "azureml://registries/REGISTRY/models/NAME/versions/N is needed",
        ),
        ({"columns": "question,answer"}, 'The dataset "tone" has the columns phrase,tone'),
        ({"dataset": "qa", "columns": "phrase,tone"}, 'The dataset "qa" has the columns Question,Best Answer'),
        ({"data_file": "own.csv"}, "with dataset=file only, and dataset is tone"),
        ({"dataset": "qa", "hub_dataset": "a/b"}, "with dataset=hub only, and dataset is qa"),
        ({"datastore_path": "azureml://x"}, "with dataset=datastore only, and dataset is tone"),
        *[
            ({"dataset": "file", "columns": "a,b"} | given, message)
            for given, message in (
                ({}, 'Question "data_file" is required'),
                ({"data_file": ""}, "A file name that ends with .json, .jsonl, .csv, .tsv, .parquet"),
                ({"data_file": "own.xlsx"}, "A file name that ends with"),
                ({"data_file": "csv"}, "A file name that ends with"),
                ({"data_file": "datasets/.csv"}, "A file name that ends with"),
                ({"data_file": "../own.csv"}, 'No "..": put the file into datasets/'),
                ({"data_file": "/srv/../own.csv"}, 'No "..": put the file into datasets/'),
                ({"data_file": "*.csv"}, "The name of a file in datasets/"),
                ({"data_file": "/srv/part[1].csv"}, "The name of a file in datasets/"),
                ({"data_file": "https://h.example/own.csv"}, "The name of a file in datasets/"),
                ({"data_file": "~/own.csv"}, "The name of a file in datasets/"),
                ({"data_file": "mine\\own.csv"}, "The name of a file in datasets/"),
            )
        ],
        *[
            ({"dataset": "hub", "columns": "a,b"} | given, message)
            for given, message in (
                ({}, 'Question "hub_dataset" is required'),
                ({"hub_dataset": ""}, "An id on the Hugging Face Hub"),
                ({"hub_dataset": "https://huggingface.co/datasets/a/b"}, "An id on the Hugging Face Hub"),
                ({"hub_dataset": "../b"}, "An id on the Hugging Face Hub"),
                ({"hub_dataset": "csv"}, '"csv" is the name of a file format'),
            )
        ],
        *[
            ({"dataset": "datastore", "columns": "a,b"} | given, message)
            for given, message in (
                ({}, 'Question "datastore_path" is required'),
                ({"datastore_path": ""}, "azureml://datastores/STORE/paths/PATH is needed"),
                (
                    {"datastore_path": "azureml://datastores/d/paths/own.xlsx"},
                    "azureml://datastores/STORE/paths/PATH is needed",
                ),
                (
                    {"datastore_path": "azureml://datastores/d/own.csv"},
                    "azureml://datastores/STORE/paths/PATH is needed",
                ),
                ({"datastore_path": "azureml:own:1"}, "azureml://datastores/STORE/paths/PATH is needed"),
                ({"datastore_path": "https://h.example/own.csv"}, "azureml://datastores/STORE/paths/PATH is needed"),
                ({"datastore_path": "azureml://datastores/d/paths/../own.csv"}, "One place is needed"),
                ({"datastore_path": "azureml://datastores/d/paths/*.csv"}, "One place is needed"),
            )
        ],
        ({"dataset": "file", "data_file": "own.csv"}, 'Question "columns" is required'),
        *[
            ({"dataset": "file", "data_file": "own.csv", "columns": columns}, message)
            for columns, message in (
                ("", "Two names or more are needed"),
                ("a", "Two names or more are needed"),
                ("a, b ,a", "A column stands there twice"),
                *[
                    (f"a,{name}", "A name is empty, a bare number, or has one of")
                    for name in ("", " ", "1", "b\nc", *'{}[].!:"\\')
                ],
            )
        ],
        (
            {"base_model": "custom", "custom_model": "a/b", "prompt_format": "plain", "dataset": "hub"}
            | {"hub_dataset": "a/b", "columns": "messages"},
            "name two columns or more",
        ),
        ({"base_model": "nobody/nothing"}, "base_model.*'nobody/nothing' is not in"),
        ({"base_model": "custom"}, 'Question "custom_model" is required'),
        ({"base_model": "custom", "custom_model": ""}, "needs custom_model, a Hub id: organisation/name"),
        ({"base_model": "custom", "custom_model": "../up"}, "needs custom_model, a Hub id"),
        ({"base_model": "custom", "custom_model": "a/b/c"}, "needs custom_model, a Hub id"),
        ({"base_model": "custom", "custom_model": MODELS[1]}, "is in the catalogue"),
        ({"base_model": "custom", "custom_model": "a/b", "prompt_format": "alpaca"}, "'alpaca' is not in"),
        ({"custom_model": "a/b"}, "with base_model=custom only"),
        ({"prompt_format": "gemma"}, "The catalogue knows the prompt format of edgetune/tiny-phi3"),
        ({"project_name": "a/b"}, "project_name.*Letters, digits"),
        ({"project_name": ""}, "project_name.*Letters, digits"),
        ({"project_name": "-x"}, "project_name.*Letters, digits"),
        ({"runtime_requirement": "torch"}, "A requirement for edgetune"),
        ({"runtime_requirement": "edgetune\ntorch"}, "A requirement for edgetune"),
        ({"catalogue": "{}"}, "The catalogue is part of the template"),
        ({"formats": "{}"}, "The prompt formats are part of the template"),
        ({"samples": "{}"}, "The samples are part of the template"),
        ({"data_formats": "{}"}, "The file formats are part of the template"),
        ({"model": "{}"}, "This follows from base_model"),
        ({"data": "{}"}, "This follows from dataset"),
    ],
    ids=lambda value: ",".join(f"{k}={v!r}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_answer_is_refused(template: Path, tmp_path: Path, answers: dict[str, str], message: str) -> None:
    """Also for questions that are not asked: nothing given with ``--data`` is silently ignored."""
    with pytest.raises(ValueError, match=message):
        render(template, tmp_path / "out", **answers)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "answers",
    [
        {"base_model": "custom"},
        {"base_model": MODELS[0], "dataset": "file"},
        {"base_model": MODELS[0], "dataset": "hub"},
        {"base_model": MODELS[0], "dataset": "datastore"},
        {"base_model": MODELS[0], "dataset": "hub", "hub_dataset": "a/b"},
    ],
    ids=["custom_model", "data_file", "hub_dataset", "datastore_path", "columns"],
)
def test_what_only_the_user_knows_is_asked(template: Path, tmp_path: Path, answers: dict[str, str]) -> None:
    """Copier gets as far as asking: it checks a question's default before, and stops if that is refused."""
    given = {"project_name": "x", **answers}

    with create_app_session(DummyInput(), DummyOutput()), pytest.raises(copier.errors.InteractiveSessionError):
        copier.run_copy(str(template), tmp_path / "out", given, quiet=True, settings=copier.Settings())


@pytest.mark.parametrize(
    ("source", "advice"),
    [(".", 'copier copy "$PWD" my-slm'), ("../x", 'copier copy "$PWD/../x" my-slm')],
)
def test_a_relative_template_path_is_refused(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, advice: str
) -> None:
    """Neither installing nor updating would work from it; the message has the command that does."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "x"))

    with pytest.raises(ValueError, match="is relative") as refused:
        render(source, tmp_path / "out")

    assert advice in str(refused.value)


# ---------------------------------------------------------------- setup/requirements.txt


def test_pins_are_those_of_the_constraints_file(project: Path) -> None:
    """Exact versions come from one file; all packages that this project runs with are pinned."""
    constraints = (REPOSITORY / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in constraints if "==" in line and not line.startswith("#"))

    lines = (project / "setup/requirements.txt").read_text(encoding="utf-8").splitlines()

    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins == {name: version for name, version in tested.items() if name in pins}
    others = {
        name for name in tested if name.startswith("onnxruntime") and name.endswith(("-gpu", "-cuda", "-directml"))
    }
    azure = {name for name in tested if name.startswith("azure-")}
    assert set(tested) - set(pins) == {"bitsandbytes", "copier"} | others | azure


DEVICES = {
    "cpu": ("CPUExecutionProvider", "export", {"onnxruntime", "onnxruntime-genai"}),
    "cuda": ("CUDAExecutionProvider", "export-cuda", {"onnxruntime-gpu", "onnxruntime-genai-cuda"}),
    "directml": ("DmlExecutionProvider", "export-directml", {"onnxruntime-directml", "onnxruntime-genai-directml"}),
}


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_has_one_flavour_of_onnxruntime(chosen: Callable[[str], Path], device: str) -> None:
    """The pins and the extra name one onnxruntime and the onnxruntime-genai that fits; the workflow its provider."""
    provider, extra, flavour = DEVICES[device]
    project = chosen("tone" if device == "cpu" else device)

    lines = (project / "setup/requirements.txt").read_text(encoding="utf-8").splitlines()
    workflow = config.load(Project(project))

    assert {line.split("==")[0] for line in lines if line.startswith("onnxruntime")} == flavour
    assert Requirement(requirement_of(project)).extras == {"train", extra, "olive"}
    assert workflow.provider == provider
    assert workflow.builder.precision == "int4"


def extras() -> dict[str, list[Requirement]]:
    """Return what each extra of edgetune asks for, with the extras it refers to written out."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {name: [*map(Requirement, lines)] for name, lines in declared["optional-dependencies"].items()}

    def whole(name: str) -> list[Requirement]:
        own = [requirement for requirement in listed[name] if requirement.name != "edgetune"]
        inner = {
            extra for requirement in listed[name] if requirement.name == "edgetune" for extra in requirement.extras
        }
        return own + [requirement for extra in sorted(inner) for requirement in whole(extra)]

    return {name: whole(name) for name in listed}


@pytest.mark.parametrize("device", DEVICES)
def test_the_extras_of_a_project_bring_no_second_flavour(device: str) -> None:
    """Neither directly nor through another extra; and the tested versions are within their ranges."""
    constraints = (REPOSITORY / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in constraints if "==" in line and not line.startswith("#"))
    _, extra, flavour = DEVICES[device]

    asked = [requirement for name in ("train", extra, "olive") for requirement in extras()[name]]

    assert {requirement.name for requirement in asked if requirement.name.startswith("onnxruntime")} == flavour
    assert all(
        tested[requirement.name] in requirement.specifier for requirement in asked if requirement.name in flavour
    )


def test_a_folder_is_installed_from_its_file_url(template: Path, project: Path) -> None:
    """The path is percent-encoded, so that pip finds a folder whose name has a space."""
    line = requirement_of(project)

    requirement = Requirement(line)
    assert " " in str(template)
    assert requirement.url == template.resolve().as_uri()
    assert requirement.extras == {"train", "export", "olive"}


def test_a_tagged_repository_is_installed_at_the_tag(git_template: Path, tmp_path: Path) -> None:
    """The runtime has the version of the template."""
    rendered = render(git_template.as_uri(), tmp_path / "out")

    assert Requirement(requirement_of(rendered)).url == f"git+{git_template.as_uri()}@{RELEASE}"


def test_a_tag_of_this_repository_is_the_version_of_its_package() -> None:
    """A release with another number would install what it was not made with."""
    tags = git(REPOSITORY, "tag", "--points-at", "HEAD").split()

    assert {tag for tag in tags if tag.startswith("v")} <= {RELEASE}


def test_a_commit_without_a_tag_is_installed_by_its_full_hash(git_template: Path, tmp_path: Path) -> None:
    """Git's description of such a commit, or a shortened hash, could not be fetched."""
    newer = tmp_path / "newer.git"
    git(tmp_path, "clone", "--quiet", str(git_template), str(newer))
    (newer / "template/newer.txt").touch()
    commit(newer)
    settings = copier.Settings()

    copier.run_copy(newer.as_uri(), tmp_path / "out", defaults=True, quiet=True, vcs_ref="HEAD", settings=settings)

    head = git(newer, "rev-parse", "HEAD").strip()
    assert Requirement(requirement_of(tmp_path / "out")).url == f"git+{newer.as_uri()}@{head}"


@pytest.mark.parametrize(
    ("source", "cloned", "installed"),
    [
        ("gh:acme/edgetune", "https://github.com/acme/edgetune.git", "https://github.com/acme/edgetune"),
        ("gl:acme/edgetune", "https://gitlab.com/acme/edgetune.git", "https://gitlab.com/acme/edgetune"),
        ("git+https://h.example/e", "https://h.example/e", "https://h.example/e"),
        ("git@h.example:acme/e.git", "git@h.example:acme/e.git", "ssh://git@h.example/acme/e.git"),
        ("ssh://git@h.example/e.git", "ssh://git@h.example/e.git", "ssh://git@h.example/e.git"),
    ],
)
def test_every_spelling_of_a_git_address_is_one_that_pip_knows(
    git_template: Path, tmp_path: Path, source: str, cloned: str, installed: str
) -> None:
    """Copier's shortcuts and ssh's short form are written out."""
    rewrite = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{git_template.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": cloned,
    }
    with local.env(**rewrite):  # which copier starts git with
        render(source, tmp_path / "out")

    assert Requirement(requirement_of(tmp_path / "out")).url == f"git+{installed}@{RELEASE}"


def test_a_password_in_the_address_is_refused(git_template: Path, tmp_path: Path) -> None:
    """It would be committed with the project."""
    address = "https://me:secret@h.example/e.git"
    rewrite = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{git_template.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }
    with local.env(**rewrite), pytest.raises(ValueError, match="carries a password"):
        render(address, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_the_requirement_can_be_given(template: Path, tmp_path: Path) -> None:
    """A whole requirement replaces the one derived from the template, and is remembered for updates."""
    wish = "edgetune[train,export]==0.1.0 --no-binary edgetune"

    rendered = render(template, tmp_path / "out", runtime_requirement=wish)

    assert requirement_of(rendered) == wish
    assert yaml.safe_load((rendered / ".copier-answers.yml").read_text())["runtime_requirement"] == wish


# ---------------------------------------------------------------- setup/requirements.lock


def locked(project: Path) -> dict[str, Requirement]:
    """Return the packages of ``setup/requirements.lock``, each of which has hashes and nothing else."""
    text = (project / "setup/requirements.lock").read_text(encoding="utf-8")
    entry = re.compile(r"([a-z][^\n\\]*)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
    assert not entry.sub("", re.sub(r"(?m)^#.*\n", "", text))
    packages = [Requirement(found[1]) for found in entry.finditer(text)]
    assert len({package.name for package in packages}) == len(packages)
    return {package.name: package for package in packages}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("device", "compute"),
    [("cpu", "local"), ("cuda", "local"), ("directml", "local"), ("cpu", "azureml"), ("cuda", "azureml")],
)
def test_the_lock_has_what_the_runtime_of_a_project_needs(
    template: Path, tmp_path: Path, device: str, method: str, compute: str
) -> None:
    """Every package that edgetune asks for with the project's extras, in the versions of requirements.txt.

    Not torch and its CUDA libraries, and nothing that only projects with other answers need.
    """
    project = render(template, tmp_path / "out", device=device, method=method, compute=compute)
    pins = (project / "setup/requirements.txt").read_text(encoding="utf-8").splitlines()

    packages = locked(project)

    assert not [name for name in packages if re.match(r"(torch|triton|nvidia-.*|cuda-.*)$", name)]
    assert {name for name in packages if name.startswith("onnxruntime")} == DEVICES[device][2]
    assert ("bitsandbytes" in packages) == (method == "qlora")
    assert ("azure-core" in packages) == (compute == "azureml")
    versions = {name: str(package.specifier) for name, package in packages.items()}
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    asked = [requirement for extra in Requirement(requirement_of(project)).extras for requirement in extras()[extra]]
    for requirement in [*map(Requirement, declared), *asked]:
        if requirement.name != "torch":
            assert versions[canonicalize_name(requirement.name)].removeprefix("==") in requirement.specifier
    for name, _, version in (line.partition("==") for line in pins if "==" in line and not line.startswith("torch==")):
        assert versions[canonicalize_name(name)] == f"=={version}"


# ---------------------------------------------------------------- the Makefile


def test_help_lists_every_target_before_setup(project: Path) -> None:
    """Plain ``make`` is ``make help``; it needs no environment and works in a path with a space."""
    listed = make(project)

    assert " " in str(project)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == make(project, "help").stdout
    names = [line.split()[1] for line in listed.stdout.splitlines() if line.startswith("  make ")]
    assert names == TARGETS
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("target", COMMANDS)
def test_a_target_sets_up_and_runs_one_command(project: Path, target: str) -> None:
    """The last line that is run is the edgetune command, visible as it stands in the README."""
    dry = make(project, "-n", target)

    lines = dry.stdout.splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert lines[-1] == f".venv/bin/edgetune {COMMANDS[target]}"
    assert sum(line.startswith(".venv/bin/edgetune") for line in lines) == 1
    assert f"| `make {target}` | `edgetune {COMMANDS[target]}` |" in (project / "README.md").read_text()


def test_an_existing_environment_is_used_as_it_is(own_project: Path, tmp_path: Path) -> None:
    """With VENV nothing is installed and no .venv appears."""
    script(tmp_path / "an env/bin/edgetune", 'echo "called with $*"')

    done = make(own_project, "infer", f"VENV={tmp_path / 'an env'}")

    assert "called with infer --prompts inferences/prompts.jsonl" in done.stdout
    assert not (own_project / ".venv").exists()


def test_an_environment_without_edgetune_is_an_error(own_project: Path, tmp_path: Path) -> None:
    """The message says what is missing and how to get it."""
    done = make(own_project, "status", f"VENV={tmp_path}")

    assert done.returncode != 0
    assert f"error: there is no edgetune in VENV={tmp_path}" in done.stderr
    assert "hint: install it there with: pip install -r setup/requirements.txt" in done.stderr


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """Return a Python that makes environments of itself and writes down what its pip is asked for."""
    log = tmp_path / "pip.log"
    return script(
        tmp_path / "fake-python",
        'if [ "$2" = venv ]; then',
        '  mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "#!/bin/sh" > "$3/bin/edgetune"',
        '  chmod +x "$3/bin/edgetune"; exit 0',
        "fi",
        f'echo "$*" >> "{log}"',
        'case "$*" in *no-index-here*) exit 1;; esac',
    )


def pip_calls(fake_python: Path) -> list[str]:
    """Return the arguments pip was called with."""
    return (fake_python.parent / "pip.log").read_text(encoding="utf-8").splitlines()


def test_setup_takes_torch_from_its_own_index(own_project: Path, fake_python: Path) -> None:
    """What is locked comes first and torch alone, without waiting for a dead index; the runtime comes alone, too."""
    torch = next(p for p in (REPOSITORY / CONSTRAINTS).read_text().splitlines() if p.startswith("torch=="))

    done = make(own_project, "setup", f"PYTHON={fake_python}")

    assert done.returncode == 0, done.stderr
    index = "--index-url https://download.pytorch.org/whl/cpu"
    assert pip_calls(fake_python) == [
        "-m pip install --require-hashes --no-deps -r setup/requirements.lock",
        f"-m pip install --no-deps --retries 0 --timeout 5 {index} {torch}",
        "-m pip install -r /dev/stdin",
        "-m pip install --no-deps -r setup/requirements.txt",
    ]


def test_a_cuda_project_gets_the_torch_that_fits_its_onnxruntime(
    chosen: Callable[[str], Path], tmp_path: Path, fake_python: Path
) -> None:
    """onnxruntime-gpu 1.26 and torch share the CUDA 12 libraries."""
    project = shutil.copytree(chosen("cuda"), tmp_path / "my slm")

    done = make(project, "setup", f"PYTHON={fake_python}")

    assert done.returncode == 0, done.stderr
    assert "--index-url https://download.pytorch.org/whl/cu126 torch==" in pip_calls(fake_python)[1]


def test_setup_falls_back_when_the_torch_index_is_out_of_reach(own_project: Path, fake_python: Path) -> None:
    """Torch then comes from wherever pip is configured to look."""
    done = make(own_project, "status", f"PYTHON={fake_python}", "TORCH_INDEX=https://no-index-here")

    assert done.returncode == 0, done.stderr
    _, first, second, _, _ = pip_calls(fake_python)
    assert "--index-url https://no-index-here" in first
    assert second == f"-m pip install {first.split()[-1]}"


def test_setup_is_repeated_only_after_the_requirements_change(own_project: Path, fake_python: Path) -> None:
    """A second command installs nothing; an edited requirements.txt or another lock is installed by the next one."""
    python = f"PYTHON={fake_python}"
    make(own_project, "setup", python)
    setup = pip_calls(fake_python)

    make(own_project, "status", python)
    assert pip_calls(fake_python) == setup
    for number, name in enumerate(["requirements.txt", "requirements.lock"], 2):
        os.utime(own_project / "setup" / name, (time.time() + 5, time.time() + 5))
        make(own_project, "status", python)
        (own_project / ".venv/.ready").touch()
        os.utime(own_project / "setup" / name, (0, 0))
        assert pip_calls(fake_python) == setup * number


def test_a_package_of_ones_own_comes_with_what_it_needs(own_project: Path, fake_python: Path) -> None:
    """A line added to requirements.txt is installed with its dependencies; edgetune is not, it has its lock."""
    script(
        fake_python.parent / "reading-python",
        f'[ "$5" != /dev/stdin ] || cat > "{fake_python.parent / "others"}"',
        *fake_python.read_text(encoding="utf-8").splitlines()[1:],
    )
    with (own_project / "setup/requirements.txt").open("a", encoding="utf-8") as file:
        file.write("mlflow >= 3\n")

    done = make(own_project, "setup", f"PYTHON={fake_python.parent / 'reading-python'}")

    assert done.returncode == 0, done.stderr
    others = (fake_python.parent / "others").read_text(encoding="utf-8")
    assert "\nmlflow >= 3\n" in others
    assert not re.search("(?m)^edgetune", others)


def test_a_failed_setup_is_not_taken_for_done(own_project: Path, fake_python: Path) -> None:
    """When pip fails, no command runs, and the next make starts again."""
    requirements = own_project / "setup/requirements.txt"
    requirements.write_text(requirements.read_text().replace("torch==", "torch==no-index-here"), encoding="utf-8")

    done = make(own_project, "status", f"PYTHON={fake_python}")

    assert done.returncode != 0
    assert ".venv/bin/edgetune status" not in done.stdout
    assert not (own_project / ".venv/.ready").exists()


def test_clean_removes_results_only(own_project: Path) -> None:
    """Data, base model, lock file, configuration and answers stay."""
    results = ["gen-model/onnx/model.onnx", "gen-model/adapter/x", "fine-tuning/cache/x"]
    kept = ["model-cache/edgetune/tiny-phi3/x", "setup/model.lock.json", "inferences/outputs-onnx.jsonl"]
    before = {path for path in own_project.rglob("*") if path.is_file()}
    for name in results + kept:
        (own_project / name).parent.mkdir(parents=True, exist_ok=True)
        (own_project / name).touch()

    done = make(own_project, "clean")

    assert done.returncode == 0, done.stderr
    assert not any((own_project / name).exists() for name in results)
    assert all((own_project / name).exists() for name in kept)
    assert all(path.exists() for path in before)


# ---------------------------------------------------------------- examples


EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yml"))
OWN_ROWS = "datasets/tickets.csv"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_what_the_template_renders(tmp_path: Path, file: Path) -> None:
    """Each example is byte for byte a render of today's template but for rows of its own; `make examples` renews it."""
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    answers = yaml.safe_load(file.read_text(encoding="utf-8"))
    source = copy_template(tmp_path / "template")

    copier.run_copy(
        str(source), tmp_path / "out", data=answers, defaults=True, quiet=True, exclude=[".copier-answers.yml"]
    )

    def content(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    kept = content(file.with_suffix(""))
    assert {name: data for name, data in kept.items() if name != OWN_ROWS} == content(tmp_path / "out")
    assert (OWN_ROWS in kept) == (answers.get("data_file") == OWN_ROWS)
    assert answers["runtime_requirement"].endswith(f"=={version}")
    assert {path.stem for path in EXAMPLES} == {path.name for path in file.parent.iterdir() if path.is_dir()}
