"""Bring the base model into ``model-cache/<org>/<name>/`` and pin its bytes in ``setup/model.lock.json``.

Sources: the built-in model, the Hub, a local folder (``--from``), or files that were put there by hand.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from edgetune import base_model, hub, mlflow_folder
from edgetune.errors import EdgetuneError, Problem, failure, refuse
from edgetune.project import BUILTIN_MODELS
from edgetune.source import JsonSource
from edgetune.stages import Job, is_intact, partial_folder, publish, sha256, write_json

_TEXT_FILES = ("tokenizer", "chat_template", "generation_config.json", "config.json")
_CHUNK = 16 * 1024 * 1024  # bytes copied between two reports of progress

_FILE_NAME = r"^[^/\\:\x00]*[^./\\:\x00][^/\\:\x00]*$"  # neither a path nor a drive, nor dots alone

Source = Literal["built-in", "hub", "local"]


class LockedFile(BaseModel):
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


class LockEntry(BaseModel):
    """Where a base model came from and what it consists of."""

    source: Source
    revision: str | None
    """The commit."""
    requested: str | None = None
    """What the workflow file asked for when the commit was looked up: a branch or a tag moves, the lock does not."""
    files: Annotated[dict[Annotated[str, Field(pattern=_FILE_NAME)], LockedFile], Field(min_length=1)]

    def as_outputs(self) -> dict[str, dict[str, Any]]:
        """Return the files as :func:`edgetune.stages.is_intact` takes them."""
        return {name: entry.model_dump() for name, entry in self.files.items()}


_Lock = TypeAdapter(dict[str, LockEntry])


def digests(job: Job, *, weights: bool) -> dict[str, str]:
    """Return the sha256 of the base model's files from the lock: those that decide on results, or on token ids."""
    locked = _read_lock(job).get(job.base_id)
    return {
        name: entry.sha256
        for name, entry in (locked.files if locked else {}).items()
        if (weights and not base_model.matches(name, base_model.DOCUMENTS)) or name.startswith(_TEXT_FILES)
    }


def is_current(job: Job) -> bool:
    """Tell whether the base model is complete and exactly what the lock says."""
    locked = _read_lock(job).get(job.base_id)
    if locked is None or not is_intact(job.base_folder, locked.as_outputs(), job.hashes):
        return False
    _check_revision(job, locked)
    _check_nothing_added(job, locked)
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
        _finish(job, locked)
        if _changed(job, locked):
            raise _differs(job, f"files in {job.project.name(folder)} differ from")
    if source is None and _may_adopt(job, locked, update_lock=update_lock):
        job.progress.say(f"found weights in {job.project.name(folder)}, adopting them")
        refuse(base_model.folder_problems(job, folder))
        _write_lock(job, lock | {job.base_id: LockEntry(source="local", revision=None, files=_files(job, folder))})
    else:
        partial = partial_folder(folder)
        entry = _fetch(job, partial, source, None if update_lock else locked)
        if locked is None or update_lock:
            _write_lock(job, lock | {job.base_id: entry})  # first: being killed here must not lose the revision
        elif entry.files != locked.files:
            shutil.rmtree(partial)
            raise _differs(job, "what was fetched differs from")
        publish(partial, folder)
    _check_nothing_added(job, _read_lock(job)[job.base_id])
    if base_model.unused_code(job, folder):
        job.progress.say("the Python code of its repository is not used: transformers knows this architecture itself")


def _finish(job: Job, locked: LockEntry) -> None:
    """Publish what an ``update_lock`` had fetched and locked when it was killed."""
    partial = partial_folder(job.base_folder)
    if _changed(job, locked) and is_intact(partial, locked.as_outputs(), job.hashes):
        publish(partial, job.base_folder)


def _may_adopt(job: Job, locked: LockEntry | None, *, update_lock: bool) -> bool:
    """Tell whether the files that are there become the base: before any lock, or to replace another one."""
    if not job.base_folder.is_dir() or not base_model.used_files(job, job.base_folder):
        return False
    return locked is None or (update_lock and (locked.source == "local" or bool(_changed(job, locked))))


def _fetch(job: Job, target: Path, source: Path | None, locked: LockEntry | None) -> LockEntry:
    """Fill ``target`` from where the base model comes from, and return what the lock is to say of it."""
    if source is not None:
        with mlflow_folder.flat(source) as folder:
            return _copy(job, folder, target, "local")
    if locked is not None and locked.source == "local":
        raise _gone(job, locked)
    if job.base_id in BUILTIN_MODELS:
        return _copy(job, BUILTIN_MODELS[job.base_id], target, "built-in")
    requested = job.workflow.input_model.load_kwargs.revision
    if locked is None:
        commit, known = hub.fetch(job, target, requested)
        return LockEntry(source="hub", revision=commit, requested=requested, files=_files(job, target, known))
    expected = tuple(hub.HubFile(name, entry.size, entry.sha256) for name, entry in locked.files.items())
    _, known = hub.fetch(job, target, locked.revision, expected)
    return locked.model_copy(update={"files": _files(job, target, known)})


def _copy(job: Job, source: Path, target: Path, kind: Source) -> LockEntry:
    """Copy the files that are used. Raises EdgetuneError when the later steps cannot use them."""
    if not source.is_dir():
        raise failure(f"{source} is not a folder", hint="`--from` takes the folder that holds config.json")
    if source.resolve().is_relative_to(target.resolve()):
        raise failure(f"{source} is where downloads are prepared", hint="move it elsewhere, then use `--from` again")
    paths = base_model.used_files(job, source)
    done, total = 0, sum(path.stat().st_size for path in paths)
    shutil.rmtree(target, ignore_errors=True)
    refuse(base_model.folder_problems(job, source) + base_model.space_problems(job, total))
    target.mkdir(parents=True)
    job.progress.transfer(0, total)
    for path in paths:
        with path.open("rb") as file, (target / path.name).open("wb") as copy:
            while chunk := file.read(_CHUNK):
                copy.write(chunk)
                done += len(chunk)
                job.progress.transfer(done, total)
    return LockEntry(source=kind, revision=None, files=_files(job, target))


def _check_revision(job: Job, locked: LockEntry) -> None:
    """Raise EdgetuneError when the workflow file asks for another commit than the locked one, or for more of it."""
    wanted, hint = job.workflow.input_model.load_kwargs.revision, "move on with `edgetune download --update-lock`"
    if locked.source == "hub" and wanted not in (None, locked.revision, locked.requested):
        raise failure(
            f"the revision {wanted!r} is not the locked one, {locked.revision!r}",
            where=job.workflow.where("input_model", "load_kwargs", "revision"),
            hint=f"{hint}, or write the locked revision",
        )
    has_code = any(name.endswith(".py") for name in locked.files)
    if job.workflow.trusts_code and base_model.read_config(job.base_folder).get("auto_map") and not has_code:
        raise failure(
            f"{job.base_id} was locked without its Python code",
            where=job.workflow.where("input_model", "load_kwargs", "trust_remote_code"),
            hint=f"read that code, then {hint}",
        )


def _check_nothing_added(job: Job, locked: LockEntry) -> None:
    """Raise EdgetuneError when libraries would read more in the folder of the base model than what is locked."""
    unlocked = [path for path in base_model.used_files(job, job.base_folder) if path.name not in locked.files]
    added = [path for path in unlocked if not base_model.matches(path.name, base_model.DOCUMENTS)]
    adapter = job.base_folder / base_model.ADAPTER_CONFIG
    hint = "move it away, or lock it too with `edgetune download --update-lock`"
    problems = [
        Problem("this is no file of the locked base model, and would be read", job.project.name(path), hint)
        for path in added
    ]
    if adapter.exists():
        message = "transformers would load the adapter that this names into the base model"
        problems.append(Problem(message, job.project.name(adapter), "move it away"))
    refuse(problems)


def is_local(job: Job) -> bool:
    """Tell whether the base model is locked to weights that no Hub has. Raises EdgetuneError for a damaged lock."""
    locked = _read_lock(job).get(job.base_id)
    return locked is not None and locked.source == "local"


def locked_sizes(job: Job) -> dict[Path, int]:
    """Return the size in bytes of each file of the base model by the lock; empty without one.

    Raises EdgetuneError when the lock file is damaged.
    """
    locked = _read_lock(job).get(job.base_id)
    return {job.base_folder / name: entry.size for name, entry in locked.files.items()} if locked else {}


def changed_files(job: Job) -> list[Path]:
    """Return the files of the base model that are there with other bytes than the locked ones."""
    locked = _read_lock(job).get(job.base_id)
    return [] if locked is None else _changed(job, locked)


def _changed(job: Job, locked: LockEntry) -> list[Path]:
    paths = {job.base_folder / name: {name: entry} for name, entry in locked.as_outputs().items()}
    return [path for path, entry in paths.items() if path.is_file() and not is_intact(path.parent, entry, job.hashes)]


def _gone(job: Job, locked: LockEntry) -> EdgetuneError:
    missing = ", ".join(name for name in locked.files if not (job.base_folder / name).is_file())
    return failure(
        f"{job.base_id} is locked to weights from a local folder, and of these {missing} is not there any more",
        where=job.project.name(job.project.lock),
        hint=f"put them into {job.project.name(job.base_folder)} again with `edgetune download --from FOLDER`, "
        "or delete that folder and take the published ones with `edgetune download --update-lock`",
    )


def _differs(job: Job, what: str) -> EdgetuneError:
    lock = job.project.name(job.project.lock)
    return failure(
        f"{what} {lock}: this is not the base model the project was locked to",
        where=lock,
        hint=f"delete {job.project.name(job.base_folder)} to get the locked files again, "
        "or accept what is there with `edgetune download --update-lock`",
    )


def _files(job: Job, folder: Path, known: dict[str, str] | None = None) -> dict[str, LockedFile]:
    """Describe the files of a base model; ``known`` are sha256 that need not be computed again."""
    return {
        path.name: LockedFile(size=path.stat().st_size, sha256=(known or {}).get(path.name) or sha256(path))
        for path in base_model.used_files(job, folder)
    }


def _read_lock(job: Job) -> dict[str, LockEntry]:
    path = job.project.lock
    if not path.is_file():
        return {}
    try:
        return _Lock.validate_json(path.read_bytes())
    except ValidationError as error:
        where = name = job.project.name(path)
        with suppress(EdgetuneError):  # it is no JSON
            where = JsonSource(path, name).where(*error.errors()[0]["loc"])
        hint = "take it from version control again, or delete it and run `edgetune download`"
        raise failure("the lock file is damaged", where=where, hint=hint) from None


def _write_lock(job: Job, lock: dict[str, LockEntry]) -> None:
    write_json(job.project.lock, {model: entry.model_dump() for model, entry in lock.items()})
