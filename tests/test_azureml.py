"""Fine-tuning on Azure ML: the rendered job, `edgetune submit`, and what a run does within a job."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from azure_server import SECRET, AzureServer
from conftest import ENVIRONMENT, REPOSITORY, Sandbox
from edgetune import in_job
from edgetune.azureml import Client, LeftError, fetch
from edgetune.errors import EdgetuneError, GateError, Problem, failure
from edgetune.job_file import Workspace
from edgetune.mlflow_folder import flat
from edgetune.project import Project
from edgetune.stages import run_lock

REGISTRY = "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/10"
STORE = "azureml://datastores/workspaceblobstore/paths/a/it's rows.jsonl"
CLOUD = {
    "compute": "azureml",
    "azureml_compute": "gpus",
    "device": "cuda",
    "base_model": "microsoft/Phi-3-mini-4k-instruct",
    "registry_model": REGISTRY,
    "dataset": "datastore",
    "datastore_path": STORE,
    "columns": "q,a",
}


@pytest.fixture(scope="module")
def in_cloud(render: Callable[..., Sandbox]) -> Sandbox:
    """Render the default project for Azure ML. Not to be changed by tests."""
    return render(compute="azureml", azureml_compute="cpu-cluster")


@pytest.fixture
def mine(in_cloud: Sandbox, tmp_path: Path) -> Sandbox:
    """Copy the project for Azure ML, to be changed at will."""
    return Sandbox(shutil.copytree(in_cloud.root, tmp_path / "my slm"))


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[AzureServer]:
    """Run the stand-in for Azure."""
    folder = tmp_path / "azure"
    folder.mkdir()
    with AzureServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def job_of(project: Sandbox) -> dict[str, Any]:
    """Return the job file as YAML reads it."""
    content: dict[str, Any] = yaml.safe_load((project.root / "fine-tuning/azureml-job.yml").read_text())
    return content


def pip_of(project: Sandbox) -> list[str]:
    """Return what pip installs into the environment of the job."""
    conda = yaml.safe_load((project.root / "setup/conda.yaml").read_text())
    [pip] = [part["pip"] for part in conda["dependencies"] if isinstance(part, dict)]
    return list(pip)


def replace(path: Path, old: str, new: str) -> None:
    """Change a file that has ``old`` in it."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---------------------------------------------------------------- what is rendered


@pytest.mark.slow
def test_the_sdk_loads_the_rendered_job(render: Callable[..., Sandbox]) -> None:
    """Data of a datastore and a registry's model are inputs, linked to where the workflow file expects them."""
    from azure.ai.ml import load_job

    project = render(**CLOUD)

    job = load_job(project.root / "fine-tuning/azureml-job.yml")

    assert job.compute == "gpus"
    assert job.inputs["rows"].path == STORE
    assert job.inputs["base_model"].path == REGISTRY
    assert (job.distribution.type, job.distribution.process_count_per_instance) == ("pytorch", 1)
    assert job.resources.instance_count == 1
    assert job.environment.image.endswith("cuda12.6-ubuntu24.04")
    command = job.command.replace("${{inputs.rows}}", "/mnt/rows").replace("${{inputs.base_model}}", "/mnt/model")
    command = command.replace("${{outputs.gen_model}}", "/mnt/out")
    words = subprocess.run(
        ["bash", "-c", f"edgetune() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    mount = ["--mount", "/mnt/rows", "datasets/it's rows.jsonl"]
    assert words == ["finetune", *mount, "--base-model", "/mnt/model", "--copy-results", "/mnt/out"]
    config = json.loads(project.config.read_text())
    assert config["data_configs"][0]["load_dataset_config"]["data_files"] == f"../{words[3]}"


def test_the_cloud_has_the_versions_of_the_project(in_cloud: Sandbox) -> None:
    """conda.yaml repeats requirements.txt, with one flavour of onnxruntime; a runtime from a folder is left out."""
    lines = (in_cloud.root / "setup/requirements.txt").read_text().splitlines()

    pip = pip_of(in_cloud)

    assert pip[0].endswith("whl/cpu")
    assert pip[1:] == [line for line in lines if "==" in line]
    assert [line.partition("==")[0] for line in pip if line.startswith("onnxruntime")] == [
        "onnxruntime",
        "onnxruntime-genai",
    ]


def test_a_gated_model_on_gpus_with_a_published_runtime(render: Callable[..., Sandbox]) -> None:
    """The job names a vault for the token, to fill in, and an identity; the runtime is installed as anywhere."""
    wanted = "edgetune[train,export-cuda,olive,azureml]==0.1.0"

    project = render(compute="azureml", base_model="google/gemma-3-1b-it", device="cuda", runtime_requirement=wanted)

    job, pip = job_of(project), pip_of(project)
    assert "--hub-token '<key-vault>/hf-token'" in job["command"]
    assert job["identity"] == {"type": "managed"}
    assert "cuda" in job["environment"]["image"]
    assert pip[0].endswith("whl/cu126")
    assert pip[1] == wanted
    assert [line.partition("==")[0] for line in pip if line.startswith("onnxruntime")] == [
        "onnxruntime-gpu",
        "onnxruntime-genai-cuda",
    ]


# ---------------------------------------------------------------- checked offline


IDS = {"AZUREML_ARM_SUBSCRIPTION": "s", "AZUREML_ARM_RESOURCEGROUP": "g", "AZUREML_ARM_WORKSPACE_NAME": "w"}


def test_workspace_of_az(tmp_path: Path) -> None:
    """Without variables the defaults of `az` count; what is missing is told, all of it."""
    (tmp_path / "config").write_text("[defaults]\ngroup = rg\nworkspace = ws\n")
    listed = [{"id": "s-0", "isDefault": False}, {"id": "s-1", "isDefault": True}]
    (tmp_path / "azureProfile.json").write_text("\ufeff" + json.dumps({"subscriptions": listed}), encoding="utf-8")

    assert Workspace.find({"AZURE_CONFIG_DIR": str(tmp_path)}) == Workspace("s-1", "rg", "ws")
    assert Workspace.find(IDS | {"AZURE_CONFIG_DIR": str(tmp_path)}) == Workspace("s", "g", "w")
    with pytest.raises(EdgetuneError) as caught:
        Workspace.find({"AZURE_CONFIG_DIR": str(tmp_path / "none")})
    assert len(caught.value.problems) == 3
    with pytest.raises(EdgetuneError, match="'<workspace>' is a placeholder"):
        Workspace.find(IDS | {"AZUREML_ARM_WORKSPACE_NAME": "<workspace>"})


def test_placeholders_and_mistakes_are_told_together(mine: Sandbox) -> None:
    """Each with its file and line, before the SDK is asked."""
    replace(mine.root / "fine-tuning/azureml-job.yml", "cpu-cluster", "<compute>")
    with (mine.root / "fine-tuning/azureml-job.yml").open("a") as file:
        file.write('description: "azureml://datastores/d/paths/Your train_data.json Azure ML Location"')
    mine.edit(lambda c: c["passes"]["lora"].update(ranc=3))

    result = mine.run("submit", "--dry-run", env=IDS)

    line = (mine.root / "fine-tuning/azureml-job.yml").read_text().splitlines().index(
        'compute: "azureml:<compute>"'
    ) + 1
    assert result.returncode == 1
    assert f"error: fine-tuning/azureml-job.yml:{line}: '<compute>' is a placeholder" in result.stderr
    assert "'Your train_data.json Azure ML Location' is a placeholder" in result.stderr
    assert "does not know the key 'ranc'" in result.stderr


def test_a_project_without_a_job_says_how_to_get_one(fresh: Sandbox) -> None:
    """The answer to the template's question can be given later."""
    result = fresh.run("submit", "--dry-run", env=IDS)

    assert result.returncode == 1
    assert "copier update --data compute=azureml" in result.stderr


@pytest.mark.slow
def test_weights_from_a_folder_are_not_sent(mine: Sandbox) -> None:
    """A base model that no Hub has must be an input of the job."""
    shutil.copytree(REPOSITORY / "src/edgetune/builtin/tiny-phi3", mine.root / "model-cache/acme/phi")
    mine.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/phi"))
    assert mine.run("download").returncode == 0

    result = mine.run("submit", "--dry-run", env=IDS)

    assert result.returncode == 1
    assert "acme/phi has weights from a local folder" in result.stderr


@pytest.mark.slow
def test_a_dry_run_prints_what_would_be_sent(mine: Sandbox) -> None:
    """The job and its files: no secrets, no results, and the runtime when it is from a folder."""
    (mine.root / ".env").write_text("HF_TOKEN=hf_secret")
    (mine.root / "gen-model/onnx").mkdir()
    (mine.root / "gen-model/onnx/model.onnx").write_text("x")

    result = mine.run("submit", "--dry-run", env=IDS)

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("would be sent to the workspace w, resource group g, subscription s:\n")
    assert "compute: azureml:cpu-cluster" in result.stdout
    assert "experiment_name: my-slm" in result.stdout
    assert "  datasets/train.jsonl  " in result.stdout
    assert "  runtime/edgetune/cli.py  " in result.stdout
    assert ".env" not in result.stdout
    assert "model.onnx" not in result.stdout


@pytest.mark.slow
def test_the_sdk_refuses_a_wrong_job(mine: Sandbox) -> None:
    """What it says is told in a line, with the place."""
    replace(mine.root / "fine-tuning/azureml-job.yml", "type: pytorch", "type: pytorsh")

    result = mine.run("submit", "--dry-run", env=IDS)

    assert result.returncode == 1
    line = (mine.root / "fine-tuning/azureml-job.yml").read_text().splitlines().index("distribution:") + 1
    said = "distribution.type: Value 'pytorsh' passed is not in set ['pytorch']"
    assert f"error: fine-tuning/azureml-job.yml:{line}: {said}\n" in result.stderr


# ---------------------------------------------------------------- with the service


def submit(project: Sandbox, azure: AzureServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `edgetune submit` against the stand-in."""
    result = project.run("submit", *arguments, env=azure.environment)
    assert azure.azure.unknown == []
    return result


@pytest.mark.slow
def test_a_job_is_sent_followed_and_fetched(mine: Sandbox, azure: AzureServer, tmp_path: Path) -> None:
    """The service gets the project and the runtime; the log is shown; results take their places."""
    (tmp_path / "made/onnx").mkdir(parents=True)
    (tmp_path / "made/onnx/model.onnx").write_text("trained there")
    (tmp_path / "made/model.lock.json").write_text('{"a/b": {}}')
    replace(mine.root / "fine-tuning/azureml-job.yml", "process_count_per_instance: 1", "process_count_per_instance: 4")
    azure.azure.job = {"name": "job-7"}
    replace(mine.root / "fine-tuning/azureml-job.yml", "type: command", "type: command\nname: job-7")
    azure.azure.finished(tmp_path / "made")

    result = submit(mine, azure)

    assert result.returncode == 0, result.stderr
    assert "train step 1" in result.stderr
    assert result.stdout == "gen-model\n"
    assert (mine.root / "gen-model/onnx/model.onnx").read_text() == "trained there"
    assert json.loads((mine.root / "setup/model.lock.json").read_text()) == {"a/b": {}}
    sent = azure.azure.job["properties"]
    assert sent["jobType"] == "Command"
    assert sent["computeId"].endswith("/computes/cpu-cluster")
    assert sent["distribution"] == {"distributionType": "PyTorch", "processCountPerInstance": 4}
    assert sent["outputs"]["gen_model"]["jobOutputType"] == "uri_folder"
    assert "edgetune finetune" in sent["command"]
    code = azure.azure.code()
    assert code["datasets/train.jsonl"] == (mine.root / "datasets/train.jsonl").read_bytes()
    assert "runtime/edgetune/cli.py" in code


@pytest.mark.slow
@pytest.mark.parametrize("status", ["Failed", "Canceled"])
def test_a_job_that_fails_or_is_cancelled_is_an_error(mine: Sandbox, azure: AzureServer, status: str) -> None:
    """The log is shown, the end is named, and what is here stays."""
    azure.azure.statuses = ["Running", status]

    result = submit(mine, azure)

    assert result.returncode == 1
    assert "train step 1" in result.stderr
    assert f"has ended: {status}" in result.stderr
    assert not (mine.root / "gen-model/onnx").exists()


@pytest.mark.slow
def test_a_job_sent_before_is_followed(mine: Sandbox, azure: AzureServer, tmp_path: Path) -> None:
    """With --attach nothing is sent. A lock of another base model gets the one that the job has taken."""
    (tmp_path / "made/onnx").mkdir(parents=True)
    (tmp_path / "made/onnx/model.onnx").write_text("trained there")
    (tmp_path / "made/model.lock.json").write_text('{"a/b": {}, "c/d": {"of": "the job"}}')
    (mine.root / "setup/model.lock.json").write_text('{"c/d": {"of": "the project"}}')
    azure.azure.finished(tmp_path / "made")

    result = submit(mine, azure, "--attach", "job-1")

    assert result.returncode == 0, result.stderr
    assert not any(request.method == "PUT" for request in azure.azure.requests)
    assert (mine.root / "gen-model/onnx/model.onnx").exists()
    locked = json.loads((mine.root / "setup/model.lock.json").read_text())
    assert locked == {"a/b": {}, "c/d": {"of": "the project"}}


@pytest.mark.slow
def test_who_leaves_can_come_back(mine: Sandbox, azure: AzureServer) -> None:
    """Ctrl-C ends the following, not the job; how to follow it again is said."""
    azure.azure.statuses = ["Running"]
    command = [sys.executable, "-m", "edgetune", "submit", "--attach", "job-1"]
    environment = {**ENVIRONMENT, **azure.environment}
    followed = subprocess.Popen(command, cwd=mine.root, env=environment, stderr=subprocess.PIPE, text=True)
    while not any(request.path.partition("?")[0].endswith("/details") for request in azure.azure.requests):
        assert followed.poll() is None
        time.sleep(0.1)

    followed.send_signal(signal.SIGINT)
    said = followed.communicate()[1]

    assert followed.returncode == 130
    assert "the job job-1 goes on" in said
    assert "edgetune submit --attach job-1" in said
    assert not any("cancel" in request.path for request in azure.azure.requests)


def test_results_that_are_not_fetched_are_not_paid_for_twice(fresh: Sandbox) -> None:
    """Ctrl-C, and another run in the project: the way to the results of the job that was sent is told."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    project = Project(fresh.root)
    client = Client(Workspace("s", "g", "w"), SimpleNamespace(jobs=SimpleNamespace(download=interrupted)))

    with pytest.raises(LeftError) as left:
        fetch(project, client, "job-7")
    with run_lock(project), pytest.raises(EdgetuneError, match="another edgetune run") as held:
        fetch(project, client, "job-7")

    assert left.value.exit_code == 130
    for caught in (left, held):
        assert "edgetune submit --attach job-7" in caught.value.problems[-1].hint


@pytest.mark.slow
def test_what_the_service_says_is_told(mine: Sandbox, azure: AzureServer) -> None:
    """A compute that is not there, and a login that fails, are errors in a line."""
    replace(mine.root / "fine-tuning/azureml-job.yml", "cpu-cluster", "other")
    result = submit(mine, azure)
    assert result.returncode == 1
    assert "error: the job was not sent to ws: " in result.stderr
    assert "Unknown compute target 'other'." in result.stderr

    azure.azure.logged_in = False
    result = submit(mine, azure)
    assert result.returncode == 1
    assert "az login" in result.stderr
    assert "Attempted credentials" not in result.stderr


# ---------------------------------------------------------------- within the job


@pytest.mark.slow
def test_the_token_comes_from_the_vault(azure: AzureServer) -> None:
    """By name, with the SDK's own client."""
    code = "from edgetune import in_job; print(in_job.secret('my-vault/hf-token')); in_job.secret('my-vault/other')"
    environment = {**ENVIRONMENT, **azure.environment}

    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert result.stdout == f"{SECRET}\n", result.stderr
    assert "EdgetuneError: the secret other of https://my-vault.vault.azure.net cannot be read" in result.stderr


def test_inputs_are_linked_and_results_copied(fresh: Sandbox, tmp_path: Path) -> None:
    """A mounted file takes its place in the project; what was made is copied even when the run fails."""
    project = Project(fresh.root)
    rows = tmp_path / "mounted.jsonl"
    rows.write_text("{}")
    given = in_job.JobOptions([(str(rows), "datasets/own.jsonl")], results=tmp_path / "out")

    with pytest.raises(EdgetuneError, match="over"), in_job.prepared(project, given, print):
        assert (fresh.root / "datasets/own.jsonl").read_text() == "{}"
        (fresh.root / "gen-model/verify.json").write_text("said no")
        raise failure("over")

    assert (tmp_path / "out/verify.json").read_text() == "said no"


def test_the_error_of_the_run_counts(fresh: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results that cannot be copied are told, and the exit code is that of what went wrong before."""
    (tmp_path / "out").write_text("a file")
    (fresh.root / "gen-model").mkdir(exist_ok=True)
    (fresh.root / "gen-model/verify.json").write_text("said no")
    given = in_job.JobOptions(results=tmp_path / "out")

    with pytest.raises(GateError, match="over"), in_job.prepared(Project(fresh.root), given, print):
        raise GateError([Problem("over")])

    assert f"warning: the results could not be copied to {tmp_path / 'out'}" in capsys.readouterr().out


def test_a_users_file_is_not_replaced(fresh: Sandbox, tmp_path: Path) -> None:
    """Outside of a job a mount never takes the place of rows that are there."""
    (tmp_path / "mounted.jsonl").write_text("{}")
    given = in_job.JobOptions([(str(tmp_path / "mounted.jsonl"), "datasets/train.jsonl")])

    with pytest.raises(EdgetuneError, match="is there already"), in_job.prepared(Project(fresh.root), given, print):
        pass


def test_of_several_processes_the_first_copies(fresh: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find the inputs in their places; with RANK other than 0 nothing is copied."""
    (tmp_path / "mounted.jsonl").write_text("{}")
    mounts = [(str(tmp_path / "mounted.jsonl"), "datasets/own.jsonl")]

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with in_job.prepared(Project(fresh.root), in_job.JobOptions(mounts, results=tmp_path / rank), print):
            (fresh.root / "gen-model/verify.json").write_text(rank)

    assert (tmp_path / "0/verify.json").read_text() == "0"
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    "layout", [("model", "components/tokenizer"), ("data/model", "data/tokenizer"), ("data", "data")]
)
@pytest.mark.parametrize("above", ["", "mlflow_model_folder/"])
def test_mlflow_models_are_understood(tmp_path: Path, layout: tuple[str, str], above: str) -> None:
    """Weights and tokenizer lie in folders of their own, in today's layout and in older ones."""
    source = REPOSITORY / "src/edgetune/builtin/tiny-phi3"
    root = tmp_path / "in" / above
    for path in source.iterdir():
        folder = root / layout["token" in path.name or "chat" in path.name]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    (root / "MLmodel").write_text("flavors: {}")

    with flat(tmp_path / "in") as folder:
        found = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert found == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.slow
def test_the_command_of_the_job_gives_results_that_count_here(mine: Sandbox, tmp_path: Path) -> None:
    """The job's own command, with an MLflow model for the base, leaves what `edgetune status` calls up to date."""
    mlflow = tmp_path / "registry/mlflow_model_folder"
    shutil.copytree(REPOSITORY / "src/edgetune/builtin/tiny-phi3", mlflow / "model")
    (mlflow / "MLmodel").write_text("flavors: {}")
    mine.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/phi"))
    mine.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=2))
    there = Sandbox(shutil.copytree(mine.root, tmp_path / "there"))
    command = job_of(there)["command"].replace("${{outputs.gen_model}}", str(tmp_path / "out"))
    command = command.replace("edgetune finetune", f'"{sys.executable}" -m edgetune finetune')

    result = there.command("bash", "-c", f'{command} --base-model "{mlflow.parent}"')

    assert result.returncode in (0, 3), result.stderr  # two steps teach little
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    for path in (tmp_path / "out").iterdir():
        if path.is_dir():
            shutil.copytree(path, mine.root / "gen-model" / path.name)
    shutil.copy(tmp_path / "out/model.lock.json", mine.root / "setup")
    assert mine.steps()["train"] == mine.steps()["merge"] == "up to date"
