"""What a run needs around it in a job of Azure ML: brings data, base model and token to it, and hands results over.

A job mounts its inputs where it likes. They are linked to where the workflow file expects them, so that the file is
the same in a job and elsewhere.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from edgetune.errors import failure, first_line, missing_extra
from edgetune.project import Project

_LOCAL_NAMES = (".lock", ".lock.pid", ".hashes.json", ".job.lock")  # of use on one machine only


@dataclass(frozen=True)
class JobOptions:
    """What the job says of itself on the command line."""

    mounts: Sequence[tuple[str, str]] = ()
    """Places of inputs, and the names they have in the project."""
    base_model: Path | None = None
    """The folder of the base model."""
    hub_token: str = ""
    """Key vault and secret, separated by a slash."""
    results: Path | None = None
    """The folder that gets a copy of what is made."""
    olive: bool = False
    """Stock Olive judges the workflow file."""


@contextmanager
def prepared(project: Project, given: JobOptions, tell: Callable[[str], None]) -> Iterator[None]:
    """Prepare the project, and copy the results in the end, however the run ends.

    Of several processes on a machine one at a time prepares; of all, the first copies. Raises EdgetuneError. After an
    error of the run, a copy that fails is only told.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # read now: the run may take it away
    if given.hub_token:
        os.environ["HF_TOKEN"] = secret(given.hub_token)
    if given.mounts or given.base_model:
        project.job_lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(project.job_lock):
            for source, name in given.mounts:
                _link(Path(source), project, name)
            if given.base_model:
                _take_base_model(project, given.base_model, olive=given.olive)
    results = given.results if is_first else None
    try:
        yield
    except BaseException:
        try:
            copy_results(project, results)
        except OSError as error:
            tell(f"warning: the results could not be copied to {results}: {first_line(error)}")
        raise
    copy_results(project, results)


def _link(source: Path, project: Project, name: str) -> None:
    target = project.root / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise failure(f"--mount {name}: the name must lie in the project", hint="as datasets/train.jsonl does")
    if not source.exists():
        raise failure(f"{source} is not there", where=name, hint="--mount takes an input's place, then its name here")
    if target.is_symlink() and target.readlink() == source.absolute():
        return  # by another process of this job, which may be reading already
    if target.is_symlink() or (target.is_file() and "AZUREML_RUN_ID" in os.environ):  # a copy that came with the code
        target.unlink()
    if target.exists():
        raise failure(f"{name} is there already", where=name, hint="move it away: --mount puts the input in its place")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.absolute())


def _take_base_model(project: Project, folder: Path, *, olive: bool) -> None:
    from edgetune import config, download, workflow
    from edgetune.stages import Job

    load = config.load_for_olive if olive else config.load
    job = Job.start(project, load(project))
    if not download.is_current(job):
        workflow.run(job, "download", source=folder.absolute())


def secret(address: str) -> str:
    """Return a secret of a key vault, given as VAULT/SECRET. Raises EdgetuneError when it cannot be read."""
    vault, _, name = address.rpartition("/")
    if not vault or not name:
        raise failure(f"--hub-token {address}: not a secret of a key vault", hint="as in my-vault/hf-token")
    try:
        from azure.core.exceptions import AzureError
        from azure.identity import DefaultAzureCredential
        from azure.keyvault.secrets import SecretClient
    except ImportError as error:
        raise missing_extra("azureml", error) from None
    url = vault if "://" in vault else f"https://{vault}.vault.azure.net"
    # The variable names the identity of the compute, which may have several.
    credential = DefaultAzureCredential(managed_identity_client_id=os.environ.get("DEFAULT_IDENTITY_CLIENT_ID"))
    try:
        value: str | None = SecretClient(url, credential).get_secret(name).value
    except AzureError as error:
        hint = "the identity that runs this needs the role Key Vault Secrets User for the vault"
        raise failure(f"the secret {name} of {url} cannot be read: {first_line(error)}", hint=hint) from error
    if not value:
        raise failure(f"the secret {name} of {url} is empty", hint="store the token of the Hub in it")
    return value


def copy_results(project: Project, folder: Path | None) -> None:
    """Copy what was made, with the lock of the base model: whoever gets it knows what it was made of.

    Plain copies without rights and times, which a mounted store does not keep. Without a folder nothing is copied.
    """
    if folder is None:
        return
    files = [path for path in sorted(project.results.rglob("*")) if path.is_file() and path.name not in _LOCAL_NAMES]
    named = {path.relative_to(project.results): path for path in files}
    if project.lock.is_file():
        named[Path(project.lock.name)] = project.lock
    for name, path in named.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
