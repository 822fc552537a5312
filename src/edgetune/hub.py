"""Fetch a base model from the Hub, or from a mirror of it, with the Hub's own client.

It looks first (all that stands against the download is found before any weights travel), then fetches what is
missing, and then holds every file against what the lock, or else the server's list of files, says of it.
"""

import logging
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from rich.filesize import decimal

from edgetune import base_model, preflight
from edgetune.errors import EdgetuneError, failure, refuse
from edgetune.stages import Job, git_blob_id

_CLIENT_FOLDER = ".cache"  # the client keeps its own notes and unfinished files below the folder it fills
_TOKENS = "https://huggingface.co/settings/tokens"
_WAITS = (1, 3)  # seconds; the client does not repeat a look-up by itself
_PASSING = (408, 429, 500, 502, 503, 504)  # status codes that may be better in a moment


@dataclass(frozen=True)
class HubFile:
    """A file of a repository as it must arrive. ``blob_id`` is git's, given for files outside of LFS."""

    name: str
    size: int | None
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def is_weights(self) -> bool:
        """Whether this is one of the large files."""
        return self.name.endswith(".safetensors")


def fetch(job: Job, target: Path, revision: str | None, locked: tuple[HubFile, ...] = ()) -> tuple[str, dict[str, str]]:
    """Fill ``target`` with the files of one commit; return the commit and the sha256 of each file.

    With ``locked`` files ``revision`` is their commit, and exactly these arrive. Whole files of an earlier try are
    kept. Raises EdgetuneError when the repository, the disk, the network or a file's content forbids it.
    """
    load_dotenv(job.project.dotenv)
    files, names = locked, tuple(file.name for file in locked)
    if not locked:
        revision, files, names = _look_up(job, revision)
    download = _Download(job, target, str(revision), files, is_locked=bool(locked))
    download.reuse()
    download.announce()
    problems = base_model.listing_problems(job, names) + base_model.space_problems(job, download.missing)
    try:
        download.take("config.json")
    except EdgetuneError as error:
        problems += error.problems
    if "config.json" in download.digests:
        problems += base_model.config_problems(job, target, names) or preflight.download_problems(job, target)
    refuse(problems)
    download.take(*(file.name for file in files if not file.is_weights))
    refuse(base_model.shard_problems(job, target, names))
    download.take(*(file.name for file in files))
    shutil.rmtree(target / _CLIENT_FOLDER, ignore_errors=True)
    refuse(base_model.folder_problems(job, target))
    return download.commit, download.digests


@dataclass
class _Download:
    """Brings the files of one commit into a folder."""

    job: Job
    target: Path
    commit: str
    files: tuple[HubFile, ...]
    is_locked: bool
    digests: dict[str, str] = field(default_factory=dict)
    """The sha256 of the files that are there and right."""

    @property
    def total(self) -> int:
        """Bytes of all files, as far as their sizes are known."""
        return sum(file.size or 0 for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return sum(file.size or 0 for file in self.files if file.name not in self.digests)

    def reuse(self) -> None:
        """Keep what is right of an earlier try, take over what is right of the published folder, drop the rest."""
        self.target.mkdir(parents=True, exist_ok=True)
        wanted = {file.name for file in self.files}
        for path in self.target.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for file in self.files:
            path, published = self.target / file.name, self.job.base_folder / file.name
            if self._accept(path, file, unknown=False):
                continue
            path.unlink(missing_ok=True)
            if self._accept(published, file, unknown=False):
                _link(published, path)

    def announce(self) -> None:
        """Tell what is going to be fetched."""
        text = f"{self.job.base_id} at {self.commit[:12]} on {_server()}: {decimal(self.missing)} to fetch"
        if self.digests:
            text += f" of {decimal(self.total)}, the rest is here already"
        self.job.progress.say(text, revision=self.commit)
        if self.missing:
            self.job.progress.transfer(self.total - self.missing, self.total)

    def take(self, *names: str) -> None:
        """Fetch those of these files that are not there yet, small ones first.

        Raises EdgetuneError when one cannot be fetched or arrives with another content than it must have.
        """
        wanted = [file for file in self.files if file.name in names and file.name not in self.digests]
        for file in sorted(wanted, key=lambda file: file.size or 0):
            self._fetch(file)
            path = self.target / file.name
            if not self._accept(path, file, unknown=True):
                path.unlink()
                raise self._wrong(file)

    def _fetch(self, file: HubFile) -> None:
        client = _client()
        try:
            client.hf_hub_download(
                self.job.base_id,
                file.name,
                revision=self.commit,
                local_dir=self.target,
                endpoint=_endpoint(),
                tqdm_class=self._silent_bar(),
            )
        except Exception as error:  # noqa: BLE001 - raised again, if need be as it is
            _reraise(self.job, error)

    def _silent_bar(self) -> type:
        """Return a progress bar for the client that draws nothing and reports the bytes of the current file."""
        from huggingface_hub.utils.tqdm import tqdm

        progress, total, done = self.job.progress, self.total, self.total - self.missing
        most = 0

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                nonlocal most
                self.n += n or 0
                if self.n > most:  # Xet has two bars for a file: received and written
                    most = int(self.n)
                    progress.transfer(done + most, total)

        return Bar

    def _accept(self, path: Path, file: HubFile, *, unknown: bool) -> bool:
        """Note the sha256 of a file that is what it must be; ``unknown``: also when nothing is known of its content."""
        if not path.is_file() or file.size not in (None, path.stat().st_size):
            return False
        if file.sha256 is None and not (git_blob_id(path) == file.blob_id if file.blob_id else unknown):
            return False
        digest = self.job.hashes[path]
        if file.sha256 not in (None, digest):
            return False
        self.digests[file.name] = digest
        return True

    def _wrong(self, file: HubFile) -> EdgetuneError:
        name, lock = f"{self.job.base_id}/{file.name}", self.job.project.name(self.job.project.lock)
        if self.is_locked:
            return failure(
                f"{name} as fetched differs from {lock}: this is not the base model the project was locked to",
                where=lock,
                hint="run again in case the transfer was at fault, or move on with `edgetune download --update-lock`",
            )
        return failure(
            f"{name} did not arrive as {_server()} announces it, and was deleted",
            where=self.job.workflow.where("input_model", "model_path"),
            hint="run again; if that does not help, a mirror (HF_ENDPOINT) or a proxy changes files on the way",
        )


def _look_up(job: Job, revision: str | None) -> tuple[str, tuple[HubFile, ...], tuple[str, ...]]:
    """Return the commit that ``revision`` stands for, the files of it that are used, and the names of all files."""
    client = _client()
    from huggingface_hub import constants, errors

    api = client.HfApi(endpoint=_endpoint())
    for wait in (*_WAITS, 0):
        try:
            info = api.model_info(
                job.base_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            break
        except (ValueError, KeyError, TypeError) as error:  # a web page, or JSON of another kind
            if isinstance(error, errors.HFValidationError | errors.HfHubHTTPError):
                _reraise(job, error)
            hint = "check HF_ENDPOINT, and whether this network wants a login in a browser first"
            raise failure(f"{_server()} does not answer as a Hub does", hint=hint) from error
        except Exception as error:  # noqa: BLE001 - raised again, if need be as it is
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
            if not wait or status not in _PASSING:
                _reraise(job, error)
            job.progress.say(f"{_server()} answers with status {status}, asking again")
            time.sleep(wait)
    code = job.workflow.trusts_code
    siblings = info.siblings or []
    files = tuple(
        HubFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
        for s in siblings
        if base_model.is_used(s.rfilename, code=code)
    )
    return str(info.sha), files, tuple(s.rfilename for s in siblings)


def _client() -> Any:
    """Import the Hub's client, with short timeouts and a log that keeps secrets."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        hint = f"copy it again from {_TOKENS}"
        raise failure("HF_TOKEN holds characters that no token has", where="the environment or .env", hint=hint)
    import huggingface_hub

    session = huggingface_hub.get_session()
    if _limit_waiting not in session.event_hooks["request"]:
        session.event_hooks = {"request": [*session.event_hooks["request"], _limit_waiting]}
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_keep_secrets)  # the same filter is added once
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # the stage's log, wherever the client was imported first
    return huggingface_hub


def _limit_waiting(request: Any) -> None:
    """Wait for an answer no longer than for the next bytes; the client's last try at a header waits 6 times 60 s."""
    from huggingface_hub import constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    timeouts = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: min(timeouts.get(kind) or limit, limit) for kind in ("connect", "read", "write", "pool")
    }


def _keep_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = clean(record.getMessage()), ()
    return True


def clean(text: str) -> str:
    """Return a message without what only its reader may know: tokens, passwords, and the signatures in URLs."""
    text = re.sub(r"(https?://)[^/\s@]+@", r"\1", text)
    text = re.sub(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*", r"\1", text)
    token = os.environ.get("HF_TOKEN", "").strip()
    return re.sub(r"hf_\w{8,}", "hf_…", text.replace(token, "…") if token else text)


def unreachable(path: str, seconds: float) -> str:
    """Ask the Hub for an address, without a token; return why no answer came, empty when one did.

    Raises EdgetuneError when HF_TOKEN is none.
    """
    session = _client().get_session()
    try:
        response = session.head(f"{_endpoint()}/{path}", timeout=seconds, follow_redirects=True)
    except Exception as error:  # noqa: BLE001 - whatever stands between here and there
        return f"{_server()}: {clean(str(error)).partition(chr(10))[0] or type(error).__name__}"
    failed = response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return f"{_server()} answers with status {response.status_code}" if failed else ""


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _server() -> str:
    return clean(_endpoint())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def load_dotenv(path: Path) -> None:
    """Take HF_* variables from ``.env`` unless the environment has them already."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name, _, value = line.strip().removeprefix("export ").partition("=")
        value = value.partition(" #")[0].strip().strip("'\"")
        if name.strip().startswith("HF_") and value:  # nothing after the "=" means the default
            os.environ.setdefault(name.strip(), value)


def _reraise(job: Job, error: Exception) -> NoReturn:
    """Raise the client's error as a sentence with a remedy, or as it is when the Hub has no part in it."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's own sentence speaks of a cache that is not in use here
    said, model = clean(str(error)).strip().partition("\n")[0], job.base_id
    transfer = (errors.LocalEntryNotFoundError, httpx2.HTTPError, httpx2.InvalidURL, ConnectionError)
    if (sentence := _sentence(job, error)) is not None:
        message, hint = sentence
    elif isinstance(error, transfer) or (isinstance(error, OSError) and error.errno is None):
        message = f"the Hub could not be reached for {model} ({_server()}): {said}"
        hint = (
            "run again when online (finished files are kept), set HF_ENDPOINT to a mirror, or copy the model with "
            f"`edgetune download --from FOLDER`; the base model is missing in {job.project.name(job.base_folder)}"
        )
    elif isinstance(error, RuntimeError):  # what the Xet library raises
        message = f"a file of {model} could not be fetched: {said}"
        hint = "run again (finished files are kept); HF_HUB_DISABLE_XET=1 goes another way"
    else:
        raise error
    is_revision = isinstance(error, errors.RevisionNotFoundError)
    key = ("load_kwargs", "revision") if is_revision else ("model_path",)
    raise failure(message, where=job.workflow.where("input_model", *key), hint=hint) from error


def _sentence(job: Job, error: Exception) -> tuple[str, str] | None:
    """Return what a refusal of the server means, and what to do about it."""
    from huggingface_hub import errors

    model, server, login = job.base_id, _server(), "put HF_TOKEN=… into .env or run `hf auth login`"
    status = said = url = None
    if isinstance(error, errors.HfHubHTTPError):
        status, url = error.response.status_code, clean(str(error.response.url))
        said = clean(error.response.headers.get("X-Error-Message", ""))
    said = f" ({said})" if said else ""
    sentences = (
        (
            isinstance(error, errors.GatedRepoError),
            f"{model} is gated: its owner asks for consent first{said}",
            f"accept the terms on https://huggingface.co/{model}, then {login}",
        ),
        (
            isinstance(error, errors.RevisionNotFoundError),
            f"{model} has no such revision",
            "take one from the model's page, or remove load_kwargs.revision",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError),
            f"{model} was not found on the Hub ({server})",
            f"check input_model.model_path; if the model is private, {login}",
        ),
        (
            isinstance(error, errors.RemoteEntryNotFoundError),
            f"{server} lacks a file of {model}: {url}",
            "take the model from where the file is (HF_ENDPOINT), or move on with `edgetune download --update-lock`",
        ),
        (
            isinstance(error, errors.OfflineModeIsEnabled),
            f"{model} is not complete in {job.project.name(job.base_folder)}, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or copy the model with `edgetune download --from FOLDER`",
        ),
        (
            status == HTTPStatus.UNAUTHORIZED,
            f"{server} refuses access without a valid token{said}",
            f"make a new one on {_TOKENS} and {login}",
        ),
        (
            status == HTTPStatus.FORBIDDEN,
            f"the token may not read {model}{said}",
            f"give it read access to this model on {_TOKENS}, or {login} of another account",
        ),
        (
            status == HTTPStatus.TOO_MANY_REQUESTS,
            f"{server} takes no more requests for now (status 429)",
            f"run again in some minutes; to be allowed more, {login}",
        ),
        (
            (status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR,
            f"{server} has a problem of its own (status {status})",
            "run again later; finished files are kept",
        ),
    )
    return next(((message, hint) for applies, message, hint in sentences if applies), None)
