"""What `edgetune submit` makes of ``fine-tuning/azureml-job.yml`` before anything is sent: checks, and what travels.

Reads the project; writes into a folder of its own.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from edgetune import config, download
from edgetune.errors import EdgetuneError, Problem, failure, first_line, refuse
from edgetune.project import Project
from edgetune.stages import Job

_RUNTIME = "runtime"  # the folder beside the project's own that brings edgetune along
_WITH_RUNTIME = f'export PYTHONPATH="$PWD/{_RUNTIME}"; edgetune() {{ python -m edgetune "$@"; }}; '
_PLACEHOLDER = re.compile(r"<[A-Za-z][\w -]*>|\b[Yy]our[-_][\w-]+|\bYour \w[\w. ]*")
_METADATA = ("METADATA", "entry_points.txt")


@dataclass(frozen=True)
class Workspace:
    """A workspace of Azure ML."""

    subscription: str
    group: str
    name: str

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> "Workspace":
        """Take the ids from the environment, or else from the defaults of `az`. Raises EdgetuneError without them."""
        defaults = _AzDefaults(Path(environment.get("AZURE_CONFIG_DIR") or Path.home() / ".azure"))
        found, problems = {}, []
        for what, (names, default) in _WORKSPACE.items():
            value, where = next(((environment[name], name) for name in names if environment.get(name)), ("", ""))
            if not value:
                value, where = defaults.read(what)
            if not value:
                problems.append(
                    Problem(f"the {what} of the workspace is not known", hint=f"set {names[0]}, or {default}")
                )
            elif _PLACEHOLDER.search(value):
                problems.append(Problem(f"{value!r} is a placeholder", where, f"put the real {what} there"))
            found[what] = value
        refuse(problems)
        return cls(found["subscription"], found["resource group"], found["name"])


_WORKSPACE = {
    "subscription": (("AZUREML_ARM_SUBSCRIPTION", "AZURE_SUBSCRIPTION_ID"), "run `az account set --subscription ID`"),
    "resource group": (
        ("AZUREML_ARM_RESOURCEGROUP", "AZURE_DEFAULTS_GROUP"),
        "run `az configure --defaults group=NAME`",
    ),
    "name": (
        ("AZUREML_ARM_WORKSPACE_NAME", "AZURE_DEFAULTS_WORKSPACE"),
        "run `az configure --defaults workspace=NAME`",
    ),
}
"""The environment's names: Azure ML's own, then those of Azure's tools; and how `az` is told."""


class _AzDefaults:
    """What `az login`, `az account set` and `az configure` have left in the folder of `az`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, what: str) -> tuple[str, str]:
        """Return a default and the file it is from; empty texts when there is none."""
        if what == "subscription":
            return self._subscription()
        import configparser

        path = self.folder / "config"
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, configparser.Error):
            return "", ""
        key = "group" if what == "resource group" else "workspace"
        return parser.get("defaults", key, fallback=""), str(path)

    def _subscription(self) -> tuple[str, str]:
        import json

        path = self.folder / "azureProfile.json"
        try:
            listed = json.loads(path.read_text(encoding="utf-8-sig"))["subscriptions"]
            return next((str(one["id"]) for one in listed if one.get("isDefault")), ""), str(path)
        except (OSError, ValueError, KeyError, TypeError):
            return "", ""


@dataclass(frozen=True)
class Parcel:
    """What is sent: the job as the SDK has loaded it, and its files by the names they have in the job."""

    job: Any
    files: dict[str, Path]


def check(project: Project) -> Workspace:
    """Return the workspace; raise EdgetuneError with everything that keeps the project from running there as a job."""
    if not project.job.is_file():
        hint = "answer the template's question: `copier update --data compute=azureml`"
        raise failure("the project has no job for Azure ML", where=project.name(project.job), hint=hint)
    problems = [*_placeholders(project, project.job), *_placeholders(project, project.conda)]
    workspace = Workspace("", "", "")
    try:
        workspace = Workspace.find()
    except EdgetuneError as error:
        problems += error.problems
    try:
        job = Job.start(project, config.load(project))
    except EdgetuneError as error:
        problems += error.problems
    else:
        if download.is_local(job) and "--base-model" not in project.job.read_text(encoding="utf-8"):
            hint = "let the job take them from Azure ML, with an input and --base-model (docs/azure.md)"
            message = f"{job.base_id} has weights from a local folder, which are not sent"
            problems.append(Problem(message, project.name(project.lock), hint))
    refuse(problems)
    return workspace


def _placeholders(project: Project, path: Path) -> Iterator[Problem]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for found in _PLACEHOLDER.findall(code):
            yield Problem(f"{found!r} is a placeholder", f"{project.name(path)}:{number}", "put the real name there")


def packed(project: Project, folder: Path) -> Parcel:
    """Copy what is sent into ``folder`` and load the job there. Raises EdgetuneError when the SDK refuses the job."""
    files = {project.name(path): path for path in project.own_files() if not path.name.startswith(".env")}
    name = project.name(project.job)
    for target, source in files.items():
        _copy(source, folder / target)
    job = _loaded(folder / name, name)
    for target in _mounted(job.command, name):
        if files.pop(target, None):
            (folder / target).unlink()
    if _lacks_runtime(project, job):
        job.command = _WITH_RUNTIME + job.command
        for target, source in _runtime_files(folder):
            _copy(source, folder / target)
            files[target] = folder / target
    return Parcel(job, files)


def _copy(source: Path, target: Path) -> None:
    if source != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _loaded(path: Path, name: str) -> Any:
    from azure.ai.ml import load_job
    from azure.core.exceptions import AzureError
    from marshmallow import ValidationError

    try:
        job = load_job(path)
    except ValidationError as error:
        raise _refused(error, name, path.read_text(encoding="utf-8")) from error
    except (AzureError, ValueError, OSError) as error:
        raise failure(f"Azure ML's SDK does not take the job: {' '.join(str(error).split())}", where=name) from error
    if job.type != "command":
        raise failure(f"the job is of the type {job.type!r}", where=name, hint="edgetune runs as `type: command`")
    return job


def _refused(error: BaseException, name: str, text: str) -> EdgetuneError:
    """Tell what the schema of the SDK has against the job, key by key: the first error says it in the plainest form."""
    while error.__context__ is not None:
        error = error.__context__
    found = getattr(error, "messages", str(error))
    lines = [line.partition(":")[0] for line in text.splitlines()]
    hint = "https://learn.microsoft.com/azure/machine-learning/reference-yaml-job-command has the keys"
    problems = []
    for keys, message in _leaves(found if isinstance(found, dict) else {"": found}):
        where = f"{name}:{lines.index(keys[0]) + 1}" if keys[0] in lines else name
        problems.append(Problem(f"{'.'.join(keys)}: {message}", where, hint))
    return EdgetuneError(problems)


def _leaves(found: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Return all messages with the keys that lead to them; of alternatives, those of the nearest one."""
    if isinstance(found, dict):
        return [leaf for key, below in found.items() for leaf in _leaves(below, (*keys, str(key)))]
    if isinstance(found, list) and any(isinstance(one, dict) for one in found):
        return min((_leaves(one, keys) for one in found), key=len)
    return [(keys, str(text)) for text in (found if isinstance(found, list) else [found])]


def _mounted(command: str, where: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        hint = "quote it as a shell takes it"
        raise failure(f"the command cannot be read: {first_line(error)}", where=where, hint=hint) from error
    return [words[at + 2] for at, word in enumerate(words[:-2]) if word == "--mount"]


def _lacks_runtime(project: Project, job: Any) -> bool:
    """Tell whether edgetune has to travel with the job: no package index has what is in a local folder.

    Raises EdgetuneError when the environment cannot have edgetune in any way.
    """
    conda = getattr(job.environment, "conda_file", None)
    if not conda:
        return False  # an environment of the workspace, which is the user's
    wanted = [text for text in _pip(conda) if re.match(r"edgetune\b", text)]
    is_local = any("file:" in text for text in wanted)
    if wanted and not is_local:
        return False
    name = project.name(project.conda)
    if is_local:
        hint = "remove the line: `edgetune submit` sends what is installed here"
        raise failure("no machine of Azure ML can install edgetune from a local folder", where=name, hint=hint)
    if not _is_local(project):
        hint = "add the line of setup/requirements.txt that names it"
        raise failure("the environment does not install edgetune", where=name, hint=hint)
    return True


def _pip(conda: dict[str, Any]) -> list[str]:
    parts = [part["pip"] for part in conda.get("dependencies") or [] if isinstance(part, dict) and "pip" in part]
    return [str(text) for part in parts for text in part]


def _is_local(project: Project) -> bool:
    """Tell whether setup/requirements.txt takes edgetune from a folder."""
    if not project.requirements.is_file():
        return True
    lines = project.requirements.read_text(encoding="utf-8").splitlines()
    line = next((line for line in lines if re.match(r"edgetune\b", line)), "")
    return "file:" in line


def _runtime_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the installed edgetune, package and metadata, as it can be imported from a folder."""
    package = Path(__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{_RUNTIME}/edgetune/{path.relative_to(package).as_posix()}", path
    found = distribution("edgetune")
    for name in _METADATA:
        if text := found.read_text(name):
            target = f"{_RUNTIME}/edgetune-{found.version}.dist-info/{name}"
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            yield target, path
