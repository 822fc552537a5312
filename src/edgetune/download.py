"""Bring the base model into ``model-cache/<org>/<name>/`` and pin its bytes in ``setup/model.lock.json``.

Sources: the built-in model, the Hub, a local folder (``--from``), or files that were put there by hand.
"""

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from edgetune.errors import EdgetuneError, Problem, failure
from edgetune.project import BUILTIN_MODELS
from edgetune.stages import Job, is_intact, partial_folder, publish, sha256, write_json

USED_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
"""What a run can use of a repository. Weights in pickle form are not among it."""

UNUSED_FILES = ("consolidated*", "*/*")
"""A second copy of the weights in another layout (Mistral), and whatever lies in subfolders."""

UNEXPORTABLE = {
    "gemma3": "cannot be exported by onnxruntime-genai 0.14.1 with transformers 5",
    "gemma3_text": "cannot be exported by onnxruntime-genai 0.14.1 with transformers 5",
    "olmo": "comes out of onnxruntime-genai 0.14.1 with other answers, without any error",
}
"""Architectures that would fail after hours of training, or worse, not fail."""

_CLIENT_FOLDER = ".cache"  # huggingface_hub keeps its own notes below the local folder


Source = Literal["built-in", "hub", "local"]


class LockedFile(BaseModel):
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


class LockEntry(BaseModel):
    """Where a base model came from and what it consists of."""

    source: Source
    revision: str | None
    files: Annotated[dict[Annotated[str, Field(pattern=r"^[^/\\]+$")], LockedFile], Field(min_length=1)]

    def as_outputs(self) -> dict[str, dict[str, Any]]:
        """Return the files as :func:`edgetune.stages.is_intact` takes them."""
        return {name: entry.model_dump() for name, entry in self.files.items()}


_Lock = TypeAdapter(dict[str, LockEntry])


def digests(job: Job, *, weights: bool) -> dict[str, str]:
    """Return the sha256 of the base model's files from the lock, all of them or the tokenizer's only."""
    locked = _read_lock(job).get(job.base_id)
    return {
        name: entry.sha256
        for name, entry in (locked.files if locked else {}).items()
        if weights or name in ("tokenizer.json", "generation_config.json", "config.json")
    }


def is_current(job: Job) -> bool:
    """Tell whether the base model is complete and exactly what the lock says."""
    locked = _read_lock(job).get(job.base_id)
    if locked is None or not is_intact(job.base_folder, locked.as_outputs(), job.hashes):
        return False
    _check_revision(job, locked)
    return True


def download(job: Job, *, source: Path | None = None, update_lock: bool = False) -> None:
    """Make the base model complete.

    With a lock the result has exactly the locked bytes; without one, or with ``update_lock``, it is written.
    Raises EdgetuneError when that cannot be done; what was there before stays as it was.
    """
    lock, folder = _read_lock(job), job.base_folder
    locked = lock.get(job.base_id)
    if locked is not None and not update_lock:
        _check_revision(job, locked)
        _refuse_changed_files(job, locked)
    if source is None and _may_adopt(job, locked, update_lock=update_lock):
        job.progress.say(f"found weights in {job.project.name(folder)}, adopting them")
        _check_model(job, folder)
        _write_lock(job, lock | {job.base_id: LockEntry(source="local", revision=None, files=_files(folder))})
        return
    partial = partial_folder(folder)
    fetched, revision = _fetch(job, partial, source, None if update_lock else locked)
    _check_model(job, partial)
    entry = LockEntry(source=fetched, revision=revision, files=_files(partial))
    if locked is None or update_lock:
        _write_lock(job, lock | {job.base_id: entry})  # first, so that being killed here does not lose the revision
    elif entry.files != locked.files:
        shutil.rmtree(partial)
        raise _differs(job, "what was fetched differs from")
    publish(partial, folder)


def _may_adopt(job: Job, locked: LockEntry | None, *, update_lock: bool) -> bool:
    """Tell whether the files that are there become the base: before any lock, or to replace another one."""
    if not _is_model(job.base_folder):
        return False
    return locked is None or (update_lock and not is_intact(job.base_folder, locked.as_outputs(), job.hashes))


def _fetch(job: Job, target: Path, source: Path | None, locked: LockEntry | None) -> tuple[Source, str | None]:
    """Fill ``target``; return what it came from, and the commit if that was the Hub."""
    if source is not None:
        _copy(job, source, target)
        return "local", None
    if job.base_id in BUILTIN_MODELS:
        _copy(job, BUILTIN_MODELS[job.base_id], target)
        return "built-in", None
    return "hub", _fetch_from_hub(job, target, locked)


def _copy(job: Job, source: Path, target: Path) -> None:
    """Copy the files that are used. Raises EdgetuneError when ``source`` is no model folder."""
    if not source.is_dir():
        raise failure(f"{source} is not a folder", hint="`--from` takes the folder that holds config.json")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    paths = _used_paths(source)
    for number, path in enumerate(paths, start=1):
        shutil.copyfile(path, target / path.name)
        job.progress.advance(number, len(paths), path.name)


def _fetch_from_hub(job: Job, target: Path, locked: LockEntry | None) -> str:
    """Fetch one commit of a Hub repository and return it; finished files of an earlier try are kept."""
    _load_dotenv(job.project.dotenv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub

    target.mkdir(parents=True, exist_ok=True)
    revision = locked.revision if locked else job.workflow.input_model.load_kwargs.revision
    try:
        info = huggingface_hub.HfApi().model_info(job.base_id, revision=revision)
        job.progress.say(f"fetching {job.base_id} at {str(info.sha)[:12]} from the Hub", revision=info.sha)
        huggingface_hub.snapshot_download(
            job.base_id,
            revision=info.sha,
            local_dir=target,
            allow_patterns=list(USED_FILES),
            ignore_patterns=list(UNUSED_FILES),
        )
    except Exception as error:
        raise _hub_problem(job, error) from error
    shutil.rmtree(target / _CLIENT_FOLDER, ignore_errors=True)
    of_this_commit = {sibling.rfilename for sibling in info.siblings or ()}
    for path in target.iterdir():  # an earlier try may have been for another commit
        if path.name not in of_this_commit:
            path.unlink()
    return str(info.sha)


def _used_paths(folder: Path) -> list[Path]:
    """Return the files of a model folder that a run can use."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and any(fnmatch(path.name, pattern) for pattern in USED_FILES)
        and not any(fnmatch(path.name, pattern) for pattern in UNUSED_FILES)
    ]


def _hub_problem(job: Job, error: Exception) -> Exception:
    """Translate the Hub client's errors into a sentence and a remedy; others stay what they are."""
    import httpx2
    from huggingface_hub import errors

    where, model = job.workflow.where("input_model", "model_path"), job.base_id
    page = f"https://huggingface.co/{model}"
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the terms on {page}, then put HF_TOKEN=… into .env or run `hf auth login`"
        return failure(f"{model} is gated: its owner asks for consent first", where=where, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "take a revision from the model's page, or remove load_kwargs.revision"
        return failure(f"{model} has no such revision", where=where, hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        hint = "check input_model.model_path; for a private model put HF_TOKEN=… into .env"
        return failure(f"{model} was not found on the Hub", where=where, hint=hint)
    unreachable = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx2.HTTPError, ConnectionError)
    if isinstance(error, unreachable):
        hint = (
            f"run again when online (finished files are kept), set HF_ENDPOINT to a mirror, or copy the model with "
            f"`edgetune download --from FOLDER`; the base model is missing in {job.project.name(job.base_folder)}"
        )
        return failure(f"the Hub could not be reached for {model}: {error}".split("\n")[0], where=where, hint=hint)
    return error


def _load_dotenv(path: Path) -> None:
    """Take HF_* variables from ``.env`` unless the environment has them already."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and name.strip().startswith("HF_"):
            os.environ.setdefault(name.strip(), value.strip().strip("'\""))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _check_model(job: Job, folder: Path) -> None:
    """Raise EdgetuneError unless ``folder`` holds all that the later steps need, of a kind they can use."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("weights as *.safetensors")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing += [name for name in sorted(shards) if not (folder / name).is_file()]
    where = job.workflow.where("input_model", "model_path")
    hint = "choose a model that ships safetensors weights and tokenizer.json (pickle files are never loaded)"
    if missing:
        raise EdgetuneError([Problem(f"{job.base_id} has no {name}", where, hint) for name in missing])
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise failure(f"the config.json of {job.base_id} names no model_type", where=where, hint=hint) from None
    if kind in UNEXPORTABLE:
        raise failure(f"{job.base_id} ({kind}) {UNEXPORTABLE[kind]}", where=where, hint="choose another base model")


def _check_revision(job: Job, locked: LockEntry) -> None:
    """Raise EdgetuneError when the workflow file asks for another commit than the locked one."""
    wanted = job.workflow.input_model.load_kwargs.revision
    if wanted is not None and locked.source == "hub" and wanted != locked.revision:
        raise failure(
            f"the revision {wanted!r} is not the locked one, {locked.revision!r}",
            where=job.workflow.where("input_model", "load_kwargs", "revision"),
            hint="move on with `edgetune download --update-lock`, or write the locked revision",
        )


def _refuse_changed_files(job: Job, locked: LockEntry) -> None:
    """Raise EdgetuneError when a file that is there is not the locked one."""
    files = locked.as_outputs()
    present = {name: entry for name, entry in files.items() if (job.base_folder / name).is_file()}
    if not is_intact(job.base_folder, present, job.hashes):
        raise _differs(job, f"files in {job.project.name(job.base_folder)} differ from")


def _differs(job: Job, what: str) -> EdgetuneError:
    lock = job.project.name(job.project.lock)
    return failure(
        f"{what} {lock}: this is not the base model the project was locked to",
        where=lock,
        hint=f"delete {job.project.name(job.base_folder)} to get the locked files again, "
        "or accept what is there with `edgetune download --update-lock`",
    )


def _files(folder: Path) -> dict[str, LockedFile]:
    return {path.name: LockedFile(size=path.stat().st_size, sha256=sha256(path)) for path in _used_paths(folder)}


def _read_lock(job: Job) -> dict[str, LockEntry]:
    path = job.project.lock
    if not path.is_file():
        return {}
    try:
        return _Lock.validate_json(path.read_bytes())
    except ValidationError:
        name = job.project.name(path)
        hint = "take it from version control again, or delete it and run `edgetune download`"
        raise failure("the lock file is damaged", where=name, hint=hint) from None


def _write_lock(job: Job, lock: dict[str, LockEntry]) -> None:
    write_json(job.project.lock, {model: entry.model_dump() for model, entry in lock.items()})
