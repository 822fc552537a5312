"""Send the project to Azure ML as a job, follow it, and bring its results back, with Azure's own SDK.

Reads ``fine-tuning/azureml-job.yml`` and the project's files; writes ``gen-model/`` and what
``setup/model.lock.json`` does not have yet.
"""

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from edgetune import job_file
from edgetune.errors import EXIT_INTERRUPTED, EdgetuneError, Problem, failure, first_line, missing_extra
from edgetune.job_file import Parcel, Workspace
from edgetune.project import Project
from edgetune.stages import publish, read_json, run_lock, write_json

OUTPUT = "gen_model"
"""What the job file calls the output that gets gen-model/."""


_SAID = ("experiment_name", "display_name", "description", "tags")
"""What the SDK sends and does not write down."""


class LeftError(EdgetuneError):
    """The user does not wait any longer; nothing happens to the job."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class Client:
    """A workspace of Azure ML, with the SDK's client for it."""

    workspace: Workspace
    sdk: Any

    @classmethod
    def connect(cls, workspace: Workspace) -> "Client":
        """Prepare to talk to a workspace; nothing is sent yet."""
        _check_installed()
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        ids = (workspace.subscription, workspace.group, workspace.name)
        return cls(
            workspace, MLClient(DefaultAzureCredential(), *ids, show_progress=_is_seen(), enable_telemetry=False)
        )


def _is_seen() -> bool:
    return sys.stderr.isatty()


def _check_installed() -> None:
    try:
        import azure.ai.ml
        import azure.identity  # noqa: F401 - it has to be there too
    except ImportError as error:
        raise missing_extra("azureml", error) from None
    logging.getLogger("azure.ai.ml").setLevel(logging.ERROR)  # it warns of its own classes
    logging.getLogger("azure.identity").setLevel(logging.ERROR)  # and tells at length what is in the error too


@contextmanager
def _parcel(project: Project) -> Iterator[Parcel]:
    _check_installed()
    with tempfile.TemporaryDirectory() as folder:
        yield job_file.packed(project, Path(folder) / project.root.name)


def dry_run(project: Project) -> list[str]:
    """Return what would be sent where. Raises EdgetuneError for all that can be known without asking Azure."""
    workspace = job_file.check(project)
    with _parcel(project) as parcel:
        sizes = {name: path.stat().st_size for name, path in parcel.files.items()}
        text = _as_yaml(parcel.job)
    where = f"workspace {workspace.name}, resource group {workspace.group}, subscription {workspace.subscription}"
    lines = [f"would be sent to the {where}:", "", *text.splitlines(), ""]
    lines.append(f"with {len(sizes)} files, {decimal(sum(sizes.values()))}:")
    return lines + [f"  {name}  {decimal(size)}" for name, size in sizes.items()]


def _as_yaml(job: Any) -> str:
    """Write a job as the SDK has understood it, without what it repeats for use in pipelines."""
    import yaml  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yml"
        job.dump(path)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    del content["component"]
    said = {key: value for key in _SAID if (value := getattr(job, key))}
    return str(yaml.safe_dump(content | said | {"command": job.command, "code": ".."}, sort_keys=False, width=120))


def send(project: Project, client: Client, tell: Callable[[str], None]) -> str:
    """Send the job; return its name. Raises EdgetuneError when it is not accepted."""
    with _parcel(project) as parcel, _explained(f"the job was not sent to {client.workspace.name}"):
        job = client.sdk.jobs.create_or_update(parcel.job)
    tell(f"sent as {job.name}" + (f": {job.studio_url}" if job.studio_url else ""))
    return str(job.name)


def follow(client: Client, name: str, tell: Callable[[str], None]) -> None:
    """Show the log of a job until it ends. Raises EdgetuneError unless it ends well, and when the user leaves."""
    hint = f"`edgetune submit --attach {name}` follows it again; `az ml job cancel --name {name}` ends it"
    try:
        with _explained(f"the job {name} cannot be followed", hint):
            _stream(client, name)
        with _explained(f"the job {name} cannot be looked up", hint):
            job = client.sdk.jobs.get(name)
    except KeyboardInterrupt:
        raise LeftError([Problem(f"the job {name} goes on", hint=hint)]) from None
    status = getattr(job.status, "value", job.status)  # an enum, or a text
    if status != "Completed":
        look = f"its log is above; what it left: `az ml job download --name {name} --output-name {OUTPUT}`"
        raise failure(f"the job {name} has ended: {status}", where=job.studio_url or "", hint=look)
    tell(f"the job {name} is done")


def _stream(client: Client, name: str) -> None:
    from azure.ai.ml.exceptions import JobException

    try:
        with redirect_stdout(sys.stderr):
            client.sdk.jobs.stream(name)
    except JobException as error:  # the job has failed, or the user does not wait
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from None


def fetch(project: Project, client: Client, name: str) -> None:
    """Put the results of a job in the place of those in gen-model/. Raises EdgetuneError when they cannot be had."""
    hint = f"`edgetune submit --attach {name}` fetches them; without --attach another job would be sent"
    missing = Problem(f"the results of the job {name} are not here yet", hint=hint)
    try:
        with run_lock(project), _explained(f"the results of {name} did not arrive"):
            _fetch(project, client, name)
    except KeyboardInterrupt:
        raise LeftError([missing]) from None
    except EdgetuneError as error:
        raise EdgetuneError([*error.problems, missing]) from error


def _fetch(project: Project, client: Client, name: str) -> None:
    arrived = project.fetched
    shutil.rmtree(arrived, ignore_errors=True)
    with redirect_stdout(sys.stderr):
        client.sdk.jobs.download(name, download_path=arrived, output_name=OUTPUT)
    found = arrived / "named-outputs" / OUTPUT
    if not found.is_dir():
        raise failure(f"the job {name} has no output {OUTPUT}", where=project.name(project.job))
    _adopt(project, found)
    shutil.rmtree(arrived)


def _adopt(project: Project, found: Path) -> None:
    lock = found / project.lock.name
    if lock.is_file():
        _add_locked(lock, project.lock)
        lock.unlink()
    for path in sorted(found.iterdir()):
        target = project.results / path.name
        if path.is_dir():
            publish(path, target)
        else:
            path.replace(target)


def _add_locked(arrived: Path, lock: Path) -> None:
    """Take the base models that the project's own lock does not name; a damaged one is left to whoever mends it."""
    own = read_json(lock) if lock.exists() else {}
    other = read_json(arrived) or {}
    if own is not None and not other.keys() <= own.keys():
        write_json(lock, other | own)


@contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Raise what Azure says as an error with a remedy."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    try:
        yield
    except ClientAuthenticationError as error:
        login = (
            "log in with `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET; "
            "--debug shows what was tried"
        )
        failed = re.search(r"Credential: Authentication failed: (.*)", str(error))  # others are only not set up
        raise failure(f"{what}: {failed[1] if failed else first_line(error)}", hint=login) from error
    except (AzureError, OSError, ValueError) as error:
        raise failure(f"{what}: {first_line(error)}", hint=hint) from error
