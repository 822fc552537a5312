"""What Olive did on Azure ML, as a command job of Azure ML's own (``az ml job create``)."""

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from edgetune.migration.draft import Draft, Section, free_name
from edgetune.source import Location

_WORKSPACE = {
    "subscription_id": "--subscription",
    "resource_group": "--resource-group",
    "workspace_name": "--workspace-name",
}
_SCHEMA = "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
_IMAGE = "mcr.microsoft.com/azureml/openmpi5.0-ubuntu24.04"
_SECRET = "hf-token"  # noqa: S105 - the name under which Olive of 2024 looked for the Hub's token
_RESOURCES = ("instance_count", "instance_type", "shm_size", "docker_args", "properties")


@dataclass
class CloudJob:
    """What a job file is made of; there is none unless the old file speaks of Azure ML."""

    wanted: bool = False
    workspace: dict[str, str] = field(default_factory=dict)
    vault: str = ""
    compute: str = ""
    environment: Any = None
    resources: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def text(self, made_from: str) -> str:
        """Return the job file."""
        given = [(option, self.workspace[key]) for key, option in _WORKSPACE.items() if key in self.workspace]
        options = "".join(f" {option} {shlex.quote(value)}" for option, value in given)
        head = [
            f"Made by `edgetune migrate` from {made_from}. It belongs into fine-tuning/, beside olive-config.json.",
            "`edgetune submit` sends it, follows it and brings gen-model/ back; or, to the old file's workspace,",
            f"  az ml job create --file fine-tuning/azureml-job.yml{options}",
            *self.remarks,
        ]
        content: dict[str, Any] = {"$schema": _SCHEMA, "type": "command", "code": "..", "command": self._command()}
        if self.inputs:
            content["inputs"] = self.inputs
        content["outputs"] = {"gen_model": {"type": "uri_folder", "mode": "rw_mount"}}
        if self.vault:
            content["identity"] = {"type": "managed"}  # of the compute, which reads the token
        content["environment"] = self.environment or {"image": _IMAGE, "conda_file": CONDA_FILE}
        if self.compute:
            content["compute"] = f"azureml:{self.compute}"
        content["resources"] = {"instance_count": 1} | self.resources
        content["distribution"] = {"type": "pytorch", "process_count_per_instance": 1}
        return "\n".join([*(f"# {' '.join(line.splitlines())}" for line in head), *_yaml(content), ""])

    def defaults(self) -> str:
        """Return the commands that make the old file's workspace the one of `az`."""
        ids = {key: shlex.quote(value) for key, value in self.workspace.items()}
        account = [f"`az account set --subscription {ids['subscription_id']}`"] if "subscription_id" in ids else []
        names = {"resource_group": "group", "workspace_name": "workspace"}
        named = " ".join(f"{name}={ids[key]}" for key, name in names.items() if key in ids)
        return ", ".join(account + ([f"`az configure --defaults {named}`"] if named else []))

    def _command(self) -> list[str]:
        """Return the lines of the command."""
        token = [f"--hub-token {shlex.quote(f'{self.vault}/{_SECRET}')}"] if self.vault else []
        return ["edgetune finetune", *self.options, *token, '--copy-results "${{outputs.gen_model}}"']


CONDA_FILE = "../setup/conda.yaml"


def client(draft: Draft, job: CloudJob, place: Location) -> None:
    """Read the workspace of the whole file."""
    job.wanted = True
    if not isinstance(draft.at(place), dict):
        draft.left_out(place, f"name the workspace to `az`: the file {draft.at(place)!r} is not read")
        return
    given = Section(draft, place)
    draft.changed(place, "azureml_client")
    for key in _WORKSPACE:
        found = given.take(key)
        if found and is_placeholder(found.value):
            draft.to_do(found.place, f"{found.value!r} is a placeholder: tell `az` the real one (docs/azure.md)")
        elif found:
            job.workspace[key] = str(found.value)
    if job.workspace:
        draft.to_do(place, f"tell `az` the workspace that `edgetune submit` sends to: {job.defaults()}")
    if found := given.take("keyvault_name"):
        job.vault = str(found.value)
        draft.changed(found.place, "keyvault_name")
        _check_placeholder(draft, found.place, found.value)
    given.leave_rest(reason="`az` has its own settings")


def system(draft: Draft, job: CloudJob, given: Section) -> None:
    """Read the AzureML system that the workflow runs on."""
    job.wanted = True
    compute = given.take("aml_compute")
    if compute:
        draft.changed(compute.place, "aml_compute")
        _check_placeholder(draft, compute.place, compute.value)
        job.compute = job.compute or str(compute.value)
    environment = _environment(draft, given)
    job.environment = job.environment or environment
    job.resources = _resources(draft, given) | job.resources
    if token := given.take("hf_token"):
        draft.left_out(token.place, "the job takes the token from the vault" if job.vault else "")
        if not job.vault and token.value:
            draft.to_do(token.place, "a gated base model or private data set needs HF_TOKEN in the job's environment")
    for key in ("is_dev", "olive_managed_env", "requirements_file", "tags"):
        if found := given.take(key):
            draft.left_out(found.place, "the job runs `edgetune finetune` in the environment of setup/conda.yaml")


def other_system(draft: Draft, job: CloudJob, place: Location) -> None:
    """Keep the compute of an AzureML system that is neither host nor target as a remark."""
    job.wanted = True
    system = draft.at(place)
    inner = system.get("config") if isinstance(system.get("config"), dict) else system
    name = f"the compute {inner['aml_compute']}" if "aml_compute" in inner else "no compute"
    job.remarks.append(f"The old file has another system, {place[-1]}, with {name}.")
    draft.left_out(place, "neither host nor target; a remark in `azureml-job.yml` keeps its compute")


def _environment(draft: Draft, given: Section) -> Any:
    """Return the ``environment`` of the job, None where the old file says nothing."""
    if named := given.section("aml_environment_config"):
        name, version, label = (named.take(key) for key in ("name", "version", "label"))
        draft.changed(named.place, "", "`environment` of `azureml-job.yml`", "it has to have edgetune installed")
        named.leave_rest(reason="the registered environment has it")
        if name and (version or label):
            return f"azureml:{name.value}" + (f":{version.value}" if version else f"@{label.value}" if label else "")
        return f"azureml:{name.value}@latest" if name else None
    docker = given.section("aml_docker_config")
    if docker is None:
        return None
    draft.changed(docker.place, "", "`environment` of `azureml-job.yml`", "a job of Azure ML's own says so there")
    image, conda = docker.take("base_image"), docker.take("conda_file_path")
    folder, file = docker.take("build_context_path"), docker.take("dockerfile")
    if conda:
        draft.changed(conda.place, "conda_file_path")
    docker.leave_rest(reason="the job's environment needs it no more")
    if folder:
        draft.to_do(folder.place, "the image has to have edgetune installed")
        return {"build": {"path": str(folder.value)} | ({"dockerfile_path": str(file.value)} if file else {})}
    if image and "cuda11" in str(image.value):
        draft.to_do(image.place, "today's packages are for CUDA 12: take an image with it")
    return {"image": str(image.value) if image else _IMAGE, "conda_file": CONDA_FILE}


def _resources(draft: Draft, given: Section) -> dict[str, Any]:
    found = {key: old for key in _RESOURCES if (old := given.take(key))}
    if inner := given.section("resources"):
        found |= {key: old for key in _RESOURCES if (old := inner.take(key))}
        inner.leave_rest()
    for old in found.values():
        draft.changed(old.place, "", "`resources` of `azureml-job.yml`", "a job of Azure ML's own says so there")
    return {key: old.value for key, old in found.items()}


def data_input(draft: Draft, job: CloudJob, place: Location, name: str, target: str) -> bool:
    """Let the job link a file of a datastore to ``target`` (from the project's folder); False if it is no such file."""
    address = _address(draft, job, place)
    if not address:
        return False
    input_name = _input_name(job, name)
    job.inputs[input_name] = {"type": "uri_file", "path": address, "mode": "ro_mount"}
    job.options.append(f'--mount "${{{{inputs.{input_name}}}}}" {shlex.quote(target)}')
    draft.to_do(place, f"to run on a machine of your own, bring the file to {target}")
    return True


def model_input(draft: Draft, job: CloudJob, place: Location) -> str:
    """Let the job take the base model from Azure ML; return its name there, or an empty text."""
    address = _address(draft, job, place)
    if address:
        job.inputs["base_model"] = {"type": "custom_model", "path": address, "mode": "ro_mount"}
        job.options.append('--base-model "${{inputs.base_model}}"')
    config = draft.at(place).get("config") or draft.at(place)
    return str(config.get("name", "")) if address else ""


def _address(draft: Draft, job: CloudJob, place: Location) -> str:
    """Return the address of a resource on Azure ML."""
    given = Section(draft, place)
    kind = given.take("type")
    if inner := given.take("config"):
        given.absorb(inner.place)
    values = {key: old.value for key in (*_ADDRESSES_OF, "azureml_client") if (old := given.take(key))}
    pattern = next((text for name, text in _PATTERNS.items() if kind and kind.value == name), "")
    if not kind or not pattern:
        return ""
    draft.changed(place, str(kind.value))
    job.wanted = True
    for key in _ADDRESSES_OF:
        if key in values:
            _check_placeholder(draft, _inside(draft, place, key), values[key])
    given.leave_rest()
    if "datastore_url" in values:
        return str(values["datastore_url"])
    if missing := [key for key in re.findall(r"{(\w+)}", pattern) if key not in values]:
        draft.refused(place, f"the {kind.value} has no {missing[0]!r}", "complete it")
        return ""
    prefix = _prefix(job, values.get("azureml_client"), str(kind.value))
    if "azureml_client" in values:
        at = _inside(draft, place, "azureml_client")
        if "/" in prefix.removeprefix("azureml://"):
            draft.changed(at, "azureml_client", "`azureml-job.yml`", "the address of the file names this workspace")
        else:
            draft.left_out(at, "the job's own workspace is taken; write another one into the path of the input")
    return prefix + pattern.format(**values)


_ADDRESSES_OF = (
    "datastore_url",
    "datastore_name",
    "relative_path",
    "job_name",
    "output_name",
    "registry_name",
    "name",
    "version",
)
_PATTERNS = {
    "azureml_datastore": "datastores/{datastore_name}/paths/{relative_path}",
    "azureml_job_output": "jobs/{job_name}/outputs/{output_name}/paths/{relative_path}",
    "azureml_registry_model": "registries/{registry_name}/models/{name}/versions/{version}",
    "azureml_model": "azureml:{name}:{version}",
}


def _prefix(job: CloudJob, workspace: Any, kind: str) -> str:
    """Return what precedes an address: the workspace too when it is another one than the job's."""
    if kind == "azureml_model":
        return ""
    ids = [workspace.get(key) for key in _WORKSPACE] if isinstance(workspace, dict) else []
    own = [job.workspace.get(key) for key in _WORKSPACE]
    if kind != "azureml_datastore" or not ids or not all(ids) or ids == own or any(map(is_placeholder, ids)):
        return "azureml://"
    return "azureml://subscriptions/{}/resourcegroups/{}/workspaces/{}/".format(*ids)


def _inside(draft: Draft, place: Location, key: str) -> Location:
    return (*place, "config", key) if "config" in draft.at(place) else (*place, key)


def is_placeholder(value: object) -> bool:
    """Tell whether a value is still what a sample file has in its place."""
    return isinstance(value, str) and re.match(r"\s*(your\b|<.*>\s*$|\{\{)", value, re.IGNORECASE) is not None


def _check_placeholder(draft: Draft, place: Location, value: object) -> None:
    if is_placeholder(value):
        draft.to_do(place, f"{value!r} is a placeholder: put the real one into azureml-job.yml")


def _input_name(job: CloudJob, name: str) -> str:
    clean = re.sub(r"\W", "_", name)
    return free_name(clean, job.inputs)


def _yaml(content: dict[str, Any], indent: str = "") -> list[str]:
    """Write nested objects as YAML, texts of several lines folded, and all else as JSON, which is YAML too."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{key}: >-", *(f"{indent}  {line}" for line in value)]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}")
    return lines
