"""Workflow files of 2024 become today's: every intention is kept, or named with what to do about it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ENVIRONMENT, REPOSITORY, Sandbox
from edgetune import config, migrate
from edgetune.errors import EdgetuneError
from edgetune.migration import names
from edgetune.project import Project
from edgetune.schema import PRECISIONS

CHAT = "<|user|>\n{Question}<|end|>\n<|assistant|>\n{Answer}<|end|>"
BARE = "### Question: {Question}\n### Answer:\n{Answer}"
Change = Callable[[dict[str, Any]], object]

CLIENT = {"subscription_id": "s-1", "resource_group": "rg", "workspace_name": "ws"}


def lora(**more: Any) -> dict[str, Any]:
    """Return an old fine-tuning pass."""
    return {"type": "LoRA", "config": {"lora_r": 8, "lora_alpha": 32, "train_data_config": "rows_train"} | more}


def old_file(**more: Any) -> dict[str, Any]:
    """Return a small file in the style of 2024."""
    hf = {"model_name": "microsoft/Phi-3-mini-4k-instruct", "task": "text-generation"}
    load = {"data_name": "json", "data_files": "dataset/rows.json", "split": "train"}
    process = {"dataset_type": "corpus", "text_template": CHAT, "text_cols": ["Question", "Answer"]}
    return {
        "input_model": {"type": "PyTorchModel", "config": {"hf_config": hf}},
        "systems": {"local": {"type": "LocalSystem", "config": {"accelerators": ["gpu"]}}},
        "data_configs": [
            {
                "name": "rows_train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"params": load},
                "pre_process_data_config": {
                    "params": process | {"corpus_strategy": "join", "source_max_len": 512, "pad_to_max_len": False}
                },
            }
        ],
        "passes": {"tune": lora(), "merge": {"type": "MergeAdapterWeights"}, "build": builder()},
        "engine": {"host": "local", "target": "local", "search_strategy": False, "cache_dir": "c", "output_dir": "o"},
    } | more


def builder(**more: Any) -> dict[str, Any]:
    """Return an old export pass."""
    return {"type": "ModelBuilder", "config": {"precision": "int4"} | more}


def result_of(folder: Path, old: Any) -> tuple[dict[str, Any], migrate.Migrated]:
    """Migrate a file in-process; return the new one, and all that was said."""
    path = folder / "old.json"
    path.write_text(json.dumps(old, indent=2), encoding="utf-8")
    result = migrate.migrated(path)
    assert result is not None
    return json.loads(result.text), result


def said(result: migrate.Migrated, key: str) -> str:
    """Return what is said of the old key."""
    return "\n".join(note.text for note in result.notes if re.search(rf"\b{key}\b", note.text.split(" ")[0]))


def without_olive(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment where Olive is not installed."""
    code = "import sys; sys.modules['olive'] = None; from edgetune.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_intention_of_a_small_file(tmp_path: Path) -> None:
    """Base model, data, adapter, device and export of the old file are those of the new one."""
    new, result = result_of(tmp_path, old_file())

    assert new["input_model"] == {
        "type": "HfModel",
        "model_path": "../model-cache/microsoft/Phi-3-mini-4k-instruct",
        "task": "text-generation",
    }
    [system] = new["systems"].values()
    assert system["accelerators"] == [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]
    [data] = new["data_configs"]
    assert data["load_dataset_config"] == {"data_name": "json", "data_files": "../datasets/rows.json", "split": "train"}
    process: dict[str, Any] = {"text_template": CHAT, "text_cols": ["Question", "Answer"], "strategy": "line-by-line"}
    process |= {"max_seq_len": 512, "pad_to_max_len": False, "add_special_tokens": False}
    assert data["pre_process_data_config"] == process
    assert new["passes"]["tune"] == {"type": "LoRA", "r": 8, "alpha": 32, "train_data_config": "rows_train"}
    assert [step["type"] for step in new["passes"].values()] == ["LoRA", "MergeAdapterWeights", "ModelBuilder"]
    assert (new["host"], new["target"], new["output_dir"]) == ("local", "local", "../gen-model/olive")
    assert result.job == ""
    assert "one level up" in said(result, "config")
    for key in ("lora_r", "lora_alpha", "dataset_type", "corpus_strategy", "source_max_len"):
        assert "stock Olive ignores the old key" in said(result, key), key


def tune(**more: Any) -> Change:
    """Return the change that gives the fine-tuning pass more keys."""
    return lambda old: old["passes"]["tune"]["config"].update(more)


def training(**more: Any) -> Change:
    """Return the change that gives the fine-tuning pass training arguments."""
    return tune(training_args=more)


def rows(part: str, **more: Any) -> Change:
    """Return the change that gives a part of the data config more keys."""
    return lambda old: old["data_configs"][0][part]["params"].update(more)


def steps(**passes: Any) -> Change:
    """Return the change that puts other passes behind the fine-tuning pass."""
    return lambda old: old.update(passes={"tune": lora(), **passes})


def at(new: dict[str, Any], path: str) -> Any:
    """Return a value of the new file; the third step and such are numbers."""
    value: Any = new
    for step in path.split("/"):
        value = (
            list(value.values())[int(step)]
            if isinstance(value, dict) and step.isdigit()
            else (value[int(step)] if isinstance(value, list) else value.get(step))
        )
    return value


LOAD, TEXT = "load_dataset_config", "pre_process_data_config"
BUILD = "passes/2"
ARGUMENTS = "passes/tune/training_args"


CASES: list[tuple[Change, str, Any, str, str]] = [
    (
        training(evaluation_strategy="steps"),
        f"{ARGUMENTS}/eval_strategy",
        "steps",
        "evaluation_strategy",
        "ignores",
    ),
    (
        training(group_by_length=True),
        f"{ARGUMENTS}/train_sampling_strategy",
        "group_by_length",
        "group_by_length",
        "5",
    ),
    (training(warmup_ratio=0.1), f"{ARGUMENTS}/warmup_steps", 0.1, "warmup_ratio", "share"),
    (training(extra_args={"max_steps": 7}), f"{ARGUMENTS}/max_steps", 7, "extra_args", "one level up"),
    (training(lerning_rate=1, seed=3), f"{ARGUMENTS}/learning_rate", None, "lerning_rate", "mean 'learning_rate'"),
    (training(bf16=True), "passes/tune/torch_dtype", "bfloat16", "bf16", "type"),
    (tune(torch_dtype="float16"), "passes/tune/torch_dtype", None, "torch_dtype", "left out"),
    (tune(double_quant=True), "passes/tune/double_quant", None, "double_quant", '"type": "QLoRA"'),
    (
        tune(eval_dataset_size=0.1),
        "data_configs/0/load_dataset_config/split",
        "train[:90%]",
        "eval_dataset_size",
        "90%",
    ),
    (
        tune(eval_dataset_size=0.1),
        "data_configs/1/load_dataset_config/split",
        "train[90%:]",
        "eval_dataset_size",
        "90%",
    ),
    (tune(eval_dataset_size=0.1), "passes/tune/eval_data_config", "rows_eval", "eval_dataset_size", "rows_eval"),
    (
        tune(eval_dataset_size=50),
        "data_configs/1/load_dataset_config/split",
        "train[-50:]",
        "eval_dataset_size",
        "-50",
    ),
    (
        rows(LOAD, split="train[:200]"),
        "data_configs/0/load_dataset_config/split",
        "train[:200]",
        "data_files",
        "datasets",
    ),
    (rows(LOAD, split="test"), "data_configs/0/load_dataset_config/split", "train", "split", "rows of a file"),
    (
        rows(LOAD, data_files={"train": "a.csv", "test": "b.csv"}, data_name="csv"),
        "data_configs/0/load_dataset_config/data_files",
        "../datasets/a.csv",
        "data_files",
        "own files",
    ),
    (rows(LOAD, token=True), "data_configs/0/load_dataset_config/token", None, "token", "HF_TOKEN"),
    (
        rows(TEXT, text_template=BARE),
        "data_configs/0/pre_process_data_config/text_template",
        BARE + "<|end|>",
        "text_template",
        r"with <\|end\|>",
    ),
    (
        rows(TEXT, text_template=BARE, add_special_tokens=False),
        "data_configs/0/pre_process_data_config/text_template",
        BARE,
        "corpus_strategy",
        "line-by-line",
    ),
    (
        rows(TEXT, text_template=None),
        "data_configs/0/pre_process_data_config/text_template",
        "{Question} {Answer}<|end|>",
        "text_cols",
        "template",
    ),
    (
        rows(TEXT, text_cols=["Question", "Answer", "Source"]),
        "data_configs/0/pre_process_data_config/text_cols",
        ["Question", "Answer"],
        "text_cols",
        "does not use",
    ),
    (
        rows(TEXT, text_template=None, dataset_type="pair", input_col="q", output_col="a", target_max_len=100),
        "data_configs/0/pre_process_data_config/text_template",
        "{q}{a}<|end|>",
        "input_col",
        "asked",
    ),
    (
        rows(TEXT, text_template=None, dataset_type="pair", target_max_len=100),
        "data_configs/0/pre_process_data_config/max_seq_len",
        612,
        "target_max_len",
        "together",
    ),
    (
        rows(TEXT, chat_template=True, message_col="messages"),
        "data_configs/0/pre_process_data_config/message_col",
        "messages",
        "text_template",
        "left out",
    ),
    (steps(export={"type": "OptimumConversion"}), f"{BUILD}/precision", "fp32", "type", "ModelBuilder"),
    (
        steps(
            export={"type": "OnnxConversion"},
            opt={"type": "OrtTransformersOptimization", "config": {"float16": True}},
        ),
        f"{BUILD}/precision",
        "fp16",
        "type",
        "fused operators",
    ),
    (
        steps(quant={"type": "OnnxMatMul4Quantizer", "config": {"block_size": 32, "is_symmetric": False}}),
        f"{BUILD}/int4_block_size",
        32,
        "block_size",
        "int4_block_size",
    ),
    (
        steps(build={"type": "GenAIModelExporter", "config": {"precision": "int8"}}),
        f"{BUILD}/precision",
        "int4",
        "precision",
        "there are",
    ),
    (steps(), "passes/1/type", "MergeAdapterWeights", "passes", "adapter inside"),
    (steps(apart={"type": "ExtractAdapters"}), "passes/1/type", "ModelBuilder", "type", "file of its own"),
    (
        steps(apart={"type": "ExtractAdapters"}, gptq={"type": "GptqQuantizer"}),
        "passes/1/type",
        "MergeAdapterWeights",
        "type",
        "cannot stay beside",
    ),
    (
        lambda old: old.update(evaluators={"e": {"metrics": []}}),
        "evaluators",
        None,
        "evaluators",
        "edgetune evaluate",
    ),
    (
        lambda old: old["systems"]["local"]["config"].update(
            accelerators=[{"device": "gpu", "execution_providers": ["DmlExecutionProvider", "CPUExecutionProvider"]}]
        ),
        "systems/local/accelerators/0",
        {"device": "gpu", "execution_providers": ["DmlExecutionProvider"]},
        "0",
        "one execution provider",
    ),
    (
        lambda old: (old.pop("systems"), old.update(engine={"execution_providers": ["CUDAExecutionProvider"]})),
        "systems/local_system/accelerators/0/device",
        "gpu",
        "execution_providers",
        "property of the machine",
    ),
]
"""A change of the old file; a place of the new one and its value; what is said of which old key."""


@pytest.mark.parametrize("case", CASES)
def test_old_key(tmp_path: Path, case: tuple[Change, str, Any, str, str]) -> None:
    """What an old key meant stands in the new file, or is named with what to do; either is said with its place."""
    change, path, value, key, words = case
    old = old_file()
    change(old)

    new, result = result_of(tmp_path, old)

    assert at(new, path) == value
    assert re.search(words, said(result, key))


def test_base_model_with_its_arguments(tmp_path: Path) -> None:
    """Arguments of loading keep a pinned revision with its code; code that may change is never trusted."""
    revision = "0123456789" * 4
    old = old_file()
    hf = old["input_model"]["config"]["hf_config"]
    hf["from_pretrained_args"] = {"trust_remote_code": True, "revision": revision, "device_map": "auto"}

    new, result = result_of(tmp_path, old)
    assert new["input_model"]["load_kwargs"] == {"trust_remote_code": True, "revision": revision}
    assert "is left out" in said(result, "device_map")

    del hf["from_pretrained_args"]["revision"]
    new, result = result_of(tmp_path, old)
    assert new["input_model"]["load_kwargs"] == {"trust_remote_code": False}
    assert "40 digits" in said(result, "trust_remote_code")


def test_early_data_config(tmp_path: Path) -> None:
    """The one block of early 2024 (params_config) means the same as the two that came after it."""
    old = old_file()
    data = old["data_configs"][0]
    process = data.pop("pre_process_data_config")["params"]
    load = data.pop("load_dataset_config")["params"]
    data["params_config"] = load | {"component_kwargs": {"pre_process_data": process}}

    early, _ = result_of(tmp_path, old)

    assert early == result_of(tmp_path, old_file())[0]


def test_azure(tmp_path: Path) -> None:
    """What Olive did on Azure ML is in a job file that stands on its own: workspace, compute, data, model, token."""
    docker = {"base_image": "mcr.microsoft.com/x:1", "conda_file_path": "conda.yaml"}
    cluster = {"accelerators": [{"device": "gpu"}], "aml_compute": "big", "hf_token": True, "aml_docker_config": docker}
    other = {"type": "AzureML", "config": {"aml_compute": "arc"}}
    old = old_file(
        azureml_client=CLIENT | {"keyvault_name": "safe"},
        systems={"arc": other, "aml": {"type": "AzureML", "config": cluster | {"resources": {"instance_type": "g1"}}}},
        engine={"host": "aml", "target": "aml"},
    )
    store = {
        "datastore_name": "blobs",
        "relative_path": "in/my rows.jsonl",
        "azureml_client": CLIENT | {"workspace_name": "w2"},
    }
    rows(LOAD, data_files={"type": "azureml_datastore", "config": store})(old)
    registry = {"registry_name": "azureml", "name": "Phi-3-mini-4k-instruct", "version": "10"}
    old["input_model"]["config"]["model_path"] = {"type": "azureml_registry_model", "config": registry}

    new, result = result_of(tmp_path, old)
    job = yaml.safe_load(result.job)

    assert new["systems"] == {"local_system": {"type": "LocalSystem", "accelerators": [GPU]}}
    assert (new["host"], new["target"]) == ("local_system", "local_system")
    assert new["input_model"]["model_path"] == "../model-cache/microsoft/Phi-3-mini-4k-instruct"
    assert new["data_configs"][0]["load_dataset_config"]["data_files"] == "../datasets/my rows.jsonl"
    assert "--subscription s-1 --resource-group rg --workspace-name ws" in result.job
    assert "arc, with the compute arc" in result.job
    assert (job["type"], job["code"], job["compute"]) == ("command", "..", "azureml:big")
    assert job["environment"] == {"image": "mcr.microsoft.com/x:1", "conda_file": "../setup/conda.yaml"}
    assert job["resources"] == {"instance_count": 1, "instance_type": "g1"}
    assert job["distribution"]["type"] == "pytorch"
    long = "azureml://subscriptions/s-1/resourcegroups/rg/workspaces/w2/datastores/blobs/paths/in/my rows.jsonl"
    assert job["inputs"]["rows_train"] == {"type": "uri_file", "path": long, "mode": "ro_mount"}
    assert (
        job["inputs"]["base_model"]["path"] == "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/10"
    )
    assert "edgetune finetune" in job["command"]
    assert "--hub-token safe/hf-token" in job["command"]
    assert job["identity"] == {"type": "managed"}
    assert "conda.yaml" in said(result, "conda_file_path")


@pytest.mark.slow
def test_the_sdk_of_azure_ml_loads_the_job(tmp_path: Path) -> None:
    """Inputs, compute and what the old file says of a Kubernetes cluster are where the schema wants them."""
    from azure.ai.ml import load_job

    system = {"aml_compute": "arc", "resources": {"instance_type": "gpu-large", "instance_count": 2}}
    old = old_file(
        azureml_client=CLIENT | {"keyvault_name": "safe"},
        systems={"aml": {"type": "AzureML", "config": system}},
        engine={"host": "aml"},
    )
    rows(LOAD, data_files=MOUNTED)(old)
    folder, setup = tmp_path / "fine-tuning", tmp_path / "setup"
    folder.mkdir()
    setup.mkdir()
    (setup / "conda.yaml").write_text("name: edgetune\ndependencies: [python=3.11]\n")
    (folder / "azureml-job.yml").write_text(result_of(folder, old)[1].job)

    job = load_job(folder / "azureml-job.yml")

    assert job.compute == "arc"
    assert (job.resources.instance_type, job.resources.instance_count) == ("gpu-large", 2)
    assert job.inputs["rows_train"].path.endswith("datastores/d/paths/p/x.json")
    assert "--hub-token safe/hf-token" in job.command


GPU = {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}


def test_command_of_the_job(tmp_path: Path) -> None:
    """The job's command, read by a shell, says where data go that the workflow file expects, and what is kept."""
    old = old_file(azureml_client=CLIENT)
    store = {"datastore_name": "blobs", "relative_path": "it's rows.jsonl"}
    rows(LOAD, data_files={"type": "azureml_datastore", "config": store})(old)
    _, result = result_of(tmp_path, old)
    command = yaml.safe_load(result.job)["command"]
    for name, path in (("inputs.rows_train", "mounted rows"), ("outputs.gen_model", "out")):
        command = command.replace(f"${{{{{name}}}}}", path)

    shell = f"edgetune() {{ printf '%s\\n' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True)

    wanted = ["finetune", "--mount", "mounted rows", "datasets/it's rows.jsonl", "--copy-results", "out"]
    assert done.stdout.splitlines() == wanted


def test_placeholders_are_named(tmp_path: Path) -> None:
    """What a sample file has in the place of real names is told with its line."""
    _, result = result_of(tmp_path, old_file(azureml_client=CLIENT | {"resource_group": "Your Azure Resource Group"}))

    [note] = [note for note in result.notes if "placeholder" in note.text]
    assert "'Your Azure Resource Group'" in note.text
    assert json.dumps("resource_group") in (tmp_path / "old.json").read_text().splitlines()[note.line - 1]
    assert "Your Azure" not in result.job


def test_where_the_workspace_is_said_today(tmp_path: Path) -> None:
    """The job file has no place for a workspace: the commands that `edgetune submit` goes by are named."""
    _, result = result_of(tmp_path, old_file(azureml_client=CLIENT))

    told = [note.text for note in result.notes if note.kind == "to do"]
    assert any(
        "`az account set --subscription s-1`, `az configure --defaults group=rg workspace=ws`" in t for t in told
    )


def options(**choices: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Return any of these keys with any of their values."""
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()})


TUNE = options(
    lora_r=[4, 64],
    lora_alpha=[16.0, 64],
    r=[8],
    lora_dropout=[0.1],
    target_modules=[["o_proj", "qkv_proj"]],
    double_quant=[True, False],
    quant_type=["nf4"],
    compute_dtype=["bfloat16", "float16"],
    torch_dtype=["float32", "float16"],
    eval_dataset_size=[0.1, 0.25, 0.999, 1, 200, 0],
    modules_to_save=[None],
    use_ort_trainer=[False],
    allow_tf32=[True],
    eval_data_config=["rows_test"],
)
ARGS = options(
    seed=[0],
    data_seed=[42],
    per_device_train_batch_size=[1],
    gradient_accumulation_steps=[4],
    learning_rate=[1e-4],
    gradient_checkpointing=[False],
    num_train_epochs=[1000],
    max_steps=[100],
    logging_steps=[100],
    eval_steps=[187],
    evaluation_strategy=["steps", "epoch", "no"],
    eval_strategy=["steps"],
    group_by_length=[True, False],
    adam_beta2=[0.999],
    max_grad_norm=[0.3],
    warmup_ratio=[0.03],
    warmup_steps=[0, 10],
    bf16=[True, False],
    fp16=[True],
    optim=["adamw_torch"],
    output_dir=["out"],
    overwrite_output_dir=[True],
    report_to=["none", "tensorboard", "all", ["tensorboard", "azure_ml"]],
    extra_args=[{"weight_decay": 0.1}],
    deepspeed=[True],
    push_to_hub=[False],
)
PROCESS = options(
    dataset_type=["corpus"],
    corpus_strategy=["join", "line-by-line", "join-random"],
    strategy=["line-by-line-random"],
    source_max_len=[1024],
    max_seq_len=[256],
    max_samples=[100],
    pad_to_max_len=[True, False],
    use_attention_mask=[True, False],
    add_special_tokens=[True, False],
    text_template=[CHAT, BARE],
    random_seed=[42],
    joiner=["\n"],
    stride=[8],
    padding_side=["left"],
    drop_short_sequences=[False],
    chat_template=[True, None],
)
MOUNTED = {"type": "azureml_datastore", "config": {"datastore_name": "d", "relative_path": "p/x.json"}}
LOADED = options(
    split=["train", "train[:80%]", "train[100:300]", "train[50:]", "test", "validation"],
    trust_remote_code=[True],
    data_files=[
        "rows.json",
        "./data/rows.json",
        "/data/rows.json",
        ["a.json", "b.json"],
        {"train": "a.json"},
        MOUNTED,
        [MOUNTED, MOUNTED],
        "https://host/rows.json?x=1",
        {"type": "local_file", "config": {"path": "x.json"}},
    ],
)
ACCELERATORS = options(
    accelerators=[
        ["gpu"],
        ["cpu"],
        ["npu"],
        [{"device": "gpu"}],
        [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}],
        [{"execution_providers": ["CPUExecutionProvider"]}, {"device": "gpu"}],
        [{"device": "cpu", "execution_providers": ["OpenVINOExecutionProvider"], "memory": "4GB"}],
    ],
    hf_token=[True],
    aml_compute=["cluster"],
    aml_docker_config=[{"base_image": "i", "conda_file_path": "c"}, {"build_context_path": "."}],
    aml_environment_config=[{"name": "e", "version": 1}, {"name": "e", "label": "l"}],
    instance_count=[2],
    is_dev=[True],
    resources=[{"instance_type": "t"}],
)
STEPS: list[dict[str, Any]] = [
    {"type": "ModelBuilder", "config": {"precision": "int4", "int4_accuracy_level": 0, "metadata_only": False}},
    {"type": "ModelBuilder", "precision": "FP16"},
    {"type": "OptimumConversion", "config": {"target_opset": 17}},
    {
        "type": "OrtTransformersOptimization",
        "disable_search": True,
        "config": {"model_type": "gpt2", "float16": True},
    },
    {
        "type": "OnnxMatMul4Quantizer",
        "evaluator": "e",
        "config": {"block_size": 32, "algo_config": {"name": "RTN"}},
    },
    {"type": "OnnxDynamicQuantization"},
    {"type": "ExtractAdapters"},
    {"type": "GptqQuantizer", "config": {"bits": 4, "group_size": 128, "data_config": "rows_train"}},
]
EXPORTS = st.lists(st.sampled_from(STEPS), unique_by=lambda one: str(one["type"]), max_size=3)
MODELS: list[dict[str, Any]] = [
    {"config": {"hf_config": {"model_name": "Qwen/Qwen2.5-0.5B"}}},
    {
        "config": {
            "hf_config": {"model_name": "gpt2", "model_loading_args": {"revision": "main", "extra_args": {"x": 1}}}
        }
    },
    {"config": {"model_path": "model-cache/microsoft/phi-2", "hf_config": {"task": "text-generation"}}},
    {
        "config": {
            "model_path": "phi",
            "hf_config": {"model_name": "a/b", "from_pretrained_args": {"trust_remote_code": True}},
        }
    },
    {"type": "HfModel", "model_path": "a/b", "load_kwargs": {"trust_remote_code": False, "torch_dtype": "float16"}},
    {"type": "HfModel", "config": {"model_path": {"type": "azureml_model", "config": {"name": "m", "version": 3}}}},
    {"config": {"model_path": {"type": "local_folder", "config": {"path": "x/y/z"}}}},
]


@st.composite
def old_files(draw: st.DrawFn) -> dict[str, Any]:
    """Return a workflow file that has any of the old keys in any combination."""
    nested = draw(st.booleans())

    def block(name: str, content: dict[str, Any]) -> dict[str, Any]:
        return {name: content} if nested else content

    load = {"data_name": "json", "data_files": "rows.json"} | draw(LOADED)
    process = {"text_cols": ["Question", "Answer"]} | draw(PROCESS)
    data = [
        {
            "name": name,
            "type": "HuggingfaceContainer",
            LOAD: block("params", load),
            TEXT: block("params", process),
        }
        for name in ("rows_train", "rows_test")
    ]
    passes: dict[str, Any] = {}
    if kind := draw(st.sampled_from(["LoRA", "QLoRA", "DoRA", "LoftQ", "lora", ""])):
        chosen = draw(TUNE) | {"train_data_config": "rows_train", "training_args": draw(ARGS)}
        passes["tune"] = {"type": kind} | block("config", chosen)
    if draw(st.booleans()):
        passes["merge"] = {"type": "MergeAdapterWeights"}
    passes |= {f"step{number}": step for number, step in enumerate(draw(EXPORTS))}
    systems = {
        name: {"type": draw(st.sampled_from(["AzureML", "LocalSystem", "PythonEnvironment"]))}
        | block("config", draw(ACCELERATORS))
        for name in draw(st.sampled_from([[], ["aml"], ["aml", "arc"], ["local_system", "aml"]]))
    }
    engine: dict[str, Any] = draw(
        options(
            log_severity_level=[0],
            host=[*systems, None],
            target=[*systems, None],
            search_strategy=[False, True],
            clean_cache=[True],
            evaluate_input_model=[True, False],
            execution_providers=[["CUDAExecutionProvider"], ["TensorrtExecutionProvider"]],
            packaging_config=[{"type": "Zipfile"}],
            evaluator=["common"],
            cache_dir=["cache"],
            output_dir=["models"],
        )
    )
    client: dict[str, Any] = draw(
        options(azureml_client=[CLIENT, CLIENT | {"keyvault_name": "v"}, "config.json", {"aml_config_path": "c"}])
    )
    return client | {
        "input_model": {"type": "PyTorchModel"} | draw(st.sampled_from(MODELS)),
        "data_configs": data,
        "passes": passes,
        **({"systems": systems} if systems else {}),
        **({"engine": engine} if nested else engine),
        **draw(options(evaluators=[{"common": {"metrics": []}}], pass_flows=[[["tune"]]])),
    }


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield every key that has no keys below it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    deeper = [(key, below) for key, below in inner if isinstance(value, dict) or isinstance(below, dict)]
    for key, below in deeper:
        yield from leaves(below, (*path, key))
    if not deeper and value not in (None, {}):
        yield path, value


def untold(old: dict[str, Any], new: dict[str, Any], result: migrate.Migrated) -> list[str]:
    """Return the keys of the old file that neither stand in the new one with their values nor are told of."""
    blocks = re.compile(r"one level up|→ `model_path`, `task`|the one block became two")
    told = {note.text.split(" ")[0].rstrip(":") for note in result.notes if not blocks.search(note.text)}
    told |= {place.rpartition(".")[0] for place in told if place.rpartition(".")[2].isdigit()}  # an item of a list
    kept = {(path[-1], json.dumps(value)) for path, value in leaves(new)}
    return [
        ".".join(map(str, path))
        for path, value in leaves(old)
        if (path[-1], json.dumps(value)) not in kept
        and not told & {".".join(map(str, path[:end])) for end in range(1, len(path) + 1)}
    ]


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(old_files())
def test_any_combination_of_old_keys(tmp_path_factory: pytest.TempPathFactory, old: dict[str, Any]) -> None:
    """The new file is valid and stays what it is; no key of the old one is lost without a word."""
    folder = tmp_path_factory.mktemp("old") / "fine-tuning"
    folder.mkdir()
    new, result = result_of(folder, old)

    project = Project(folder.parent)
    project.config.write_text(result.text, encoding="utf-8")
    assert config.load(project).provider in PRECISIONS
    assert migrate.migrated(project.config) is None
    assert untold(old, new, result) == []
    for key in ("lora_r", "lora_alpha"):
        chosen = old["passes"].get("tune", {})
        chosen = chosen | chosen.get("config", {})
        if key in chosen:
            assert new["passes"]["tune"][key.removeprefix("lora_")] == chosen[key]


def test_command(tmp_path: Path, fresh: Sandbox) -> None:
    """Paths go to stdout, changes with file and line to stderr; nothing is written over; a project takes the file."""
    old = tmp_path / "mine.json"
    old.write_text(json.dumps(old_file(azureml_client=CLIENT), indent=2))

    result = without_olive(tmp_path, "migrate", "mine.json")

    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["mine-migrated.json", "azureml-job.yml"]
    line = next(n for n, text in enumerate(old.read_text().splitlines(), start=1) if '"lora_r"' in text)
    assert f"mine.json:{line}: passes.tune.config.lora_r → `r: 8`" in result.stderr
    assert "not by stock Olive, which is not installed" in result.stderr
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.*"))]
    again = without_olive(tmp_path, "migrate", "mine.json")
    assert again.returncode == 1
    assert "error: mine-migrated.json: the file exists" in again.stderr
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.*"))] == before
    fresh.config.write_bytes((tmp_path / "mine-migrated.json").read_bytes())
    (fresh.root / "datasets/rows.json").write_text('[{"Question": "a", "Answer": "b"}]')
    assert fresh.steps()["data"] == "missing"


def test_file_of_today(fresh: Sandbox) -> None:
    """A file of today is left alone, and said to be one."""
    result = fresh.run("migrate", "fine-tuning/olive-config.json")

    assert (result.returncode, result.stdout) == (0, "")
    assert "of today already" in result.stderr
    assert not list(fresh.root.rglob("*-migrated*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "input_model": {},\n}', "old.json:3: not valid JSON"),
        ("[1]", "old.json:1: not a workflow file"),
        ('{\n "input_model": 3}', "old.json:2: not a workflow file"),
        (json.dumps(old_file(passes={"a": {"type": "SliceGPT"}})), "nothing in the place of 'SliceGPT'"),
        (
            json.dumps(old_file(passes={"tune": lora(lora_r=-3)})).replace('"lora_r"', '\n"lora_r"'),
            "old.json:2: .*greater than",
        ),
        (json.dumps(old_file(engine={"target": "none"})), "target names 'none', which is not defined"),
        (json.dumps(old_file(input_model={"type": "ONNXModel"})), "does not start from a ONNXModel"),
        ('{"input_model": {}, "passes": 3}', "passes is no JSON object"),
    ],
)
def test_what_cannot_be_migrated(tmp_path: Path, text: str, words: str) -> None:
    """A file that is broken, or that only its owner can decide on, is refused with its line; nothing is written."""
    (tmp_path / "old.json").write_text(text)

    result = without_olive(tmp_path, "migrate", "old.json")

    assert result.returncode == 1
    assert re.search(rf"error: .*{words}", result.stderr), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@pytest.mark.parametrize("engine", ["native", "olive"])
def test_old_file_in_a_project(fresh: Sandbox, engine: str) -> None:
    """Commands that read an old file say which one mends it, in a form that can be pasted."""
    fresh.config.write_text(json.dumps(old_file(), indent=2))

    result = fresh.run("finetune", "--engine", engine)

    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "hf_config" in result.stderr
    [command] = re.findall(r"hint: run `edgetune (migrate .*?)`", result.stderr)
    assert shlex.split(command) == ["migrate", "fine-tuning/olive-config.json"]


def test_page_has_every_rule() -> None:
    """docs/migrating.md shows the table that the command works by."""
    page = (REPOSITORY / "docs/migrating.md").read_text(encoding="utf-8")
    assert names.table() in page


def test_rules_of_the_page_are_used() -> None:
    """Every key of the table is one that the code reads or leaves out; none is told of in vain."""
    sources = (REPOSITORY / "src/edgetune/migration").glob("*.py")
    code = "".join(path.read_text(encoding="utf-8").lower() for path in sources)
    known = {key for key, rule in names.RULES.items() if rule.today}
    assert [key for key in known if code.count(f'"{key.lower()}"') < 2] == []


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(old_files())
def test_stock_olive_takes_the_new_file(tmp_path_factory: pytest.TempPathFactory, old: dict[str, Any]) -> None:
    """Olive's own schema of the workflow, of every pass and of the data accepts what comes out."""
    from edgetune.migration.with_olive import check

    folder = tmp_path_factory.mktemp("old")
    _, result = result_of(folder, old)
    (folder / "new.json").write_text(result.text)
    check(folder / "new.json")


@pytest.mark.slow
def test_command_with_olive(tmp_path: Path) -> None:
    """Where Olive is installed, it has read the file before it is written."""
    (tmp_path / "old.json").write_text(json.dumps(old_file()))

    result = Sandbox(tmp_path).run("migrate", "old.json", "-o", "new.json")

    assert result.returncode == 0, result.stderr
    assert "checked by edgetune and stock Olive" in result.stderr
    assert result.stdout == "new.json\n"


@pytest.mark.slow
def test_olive_has_the_last_word(tmp_path: Path) -> None:
    """What Olive refuses is an error with Olive's own words."""
    text = json.dumps({"input_model": {"type": "HfModel", "model_path": "a/b"}, "azureml_client": {}})

    with pytest.raises(EdgetuneError, match=r"stock Olive does not take the new file: .*azureml_client"):
        migrate.check_with_olive(text, tmp_path / "old.json")
