"""Bring the base model into ``model-cache/<org>/<name>/`` and pin its bytes in ``setup/model.lock.json``.

Sources: the built-in model, the Hub, a local folder (``--from``), or files that were put there by hand.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, Problem, failure
from edgetune.project import BUILTIN_MODELS
from edgetune.stages import Job, is_intact, list_outputs, partial_folder, publish, write_json

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

_CLIENT_FOLDER = ".cache"  # huggingface_hub keeps its own notes below the local folder


def locked_files(job: Job) -> dict[str, dict[str, Any]] | None:
    """Return size and sha256 of the base model's files by name, or None before the first download."""
    entry = _read_lock(job).get(job.base_id)
    return None if entry is None else entry["files"]


def digests(job: Job, *, weights: bool) -> dict[str, str]:
    """Return the sha256 of the base model's files from the lock, all of them or the tokenizer's only."""
    return {
        name: entry["sha256"]
        for name, entry in (locked_files(job) or {}).items()
        if weights or name in ("tokenizer.json", "generation_config.json", "config.json")
    }


def is_current(job: Job) -> bool:
    """Tell whether the base model is complete and exactly what the lock says."""
    files = locked_files(job)
    return files is not None and is_intact(job.base_folder, files, job.hashes)


def download(job: Job, *, source: Path | None = None, update_lock: bool = False) -> None:
    """Make the base model complete.

    With a lock the result has exactly the locked bytes; without one, or with ``update_lock``, it is written.
    Raises EdgetuneError when that cannot be done; what was there before stays as it was.
    """
    lock = _read_lock(job)
    if update_lock:
        lock.pop(job.base_id, None)
    locked = lock.get(job.base_id)
    folder = job.base_folder
    if locked is not None:
        _refuse_changed_files(job, locked["files"])
    elif _is_model(folder) and source is None and not update_lock:
        job.progress.say(f"found weights in {job.project.name(folder)}, adopting them")
        lock[job.base_id] = {"source": "local", "revision": None, "files": _files(job, folder)}
        write_json(job.project.lock, lock)
        return
    # A folder in which locked files are missing is filled up in place: nothing reads it before it is whole.
    resume = locked is not None and folder.exists()
    target = folder if resume else partial_folder(folder)
    target.mkdir(parents=True, exist_ok=True)
    entry = _fetcher(job, source)(job, target, locked and locked["revision"])
    _check_model(job, target)
    entry["files"] = _files(job, target)
    if locked is not None and entry["files"] != locked["files"]:
        raise _differs(job, "what was fetched differs from")
    if not resume:
        publish(target, folder)
    if locked is None:
        write_json(job.project.lock, lock | {job.base_id: entry})


def _fetcher(job: Job, source: Path | None) -> Callable[[Job, Path, str | None], dict[str, Any]]:
    if source is not None:
        return lambda job, partial, _: _copy(job, source, partial, "local")
    if job.base_id in BUILTIN_MODELS:
        return lambda job, partial, _: _copy(job, BUILTIN_MODELS[job.base_id], partial, "built-in")
    return _fetch_from_hub


def _copy(job: Job, source: Path, target: Path, kind: str) -> dict[str, Any]:
    """Copy the files that are used. Raises EdgetuneError when ``source`` is no model folder."""
    if not source.is_dir():
        raise failure(f"{source} is not a folder", hint="`--from` takes the folder that holds config.json")
    names = sorted({path.name for pattern in USED_FILES for path in source.glob(pattern)})
    for number, name in enumerate(names, start=1):
        shutil.copyfile(source / name, target / name)
        job.progress.advance(number, len(names), name)
    return {"source": kind, "revision": None}


def _fetch_from_hub(job: Job, partial: Path, locked_revision: str | None) -> dict[str, Any]:
    """Fetch one commit of a Hub repository; finished files of an earlier try are kept."""
    _load_dotenv(job.project.root / ".env")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub

    revision = locked_revision or job.workflow.input_model.load_kwargs.revision
    try:
        info = huggingface_hub.HfApi().model_info(job.base_id, revision=revision)
        job.progress.say(f"fetching {job.base_id} at {str(info.sha)[:12]} from the Hub", revision=info.sha)
        huggingface_hub.snapshot_download(
            job.base_id, revision=info.sha, local_dir=partial, allow_patterns=list(USED_FILES)
        )
    except Exception as error:
        raise _hub_problem(job, error) from error
    shutil.rmtree(partial / _CLIENT_FOLDER, ignore_errors=True)
    return {"source": "hub", "revision": info.sha}


def _hub_problem(job: Job, error: Exception) -> Exception:
    """Translate the Hub client's errors into a sentence and a remedy; others stay what they are."""
    import httpx2
    from huggingface_hub import errors

    where, model = job.project.name(job.project.config), job.base_id
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
    if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled | httpx2.HTTPError | OSError):
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
    for line in path.read_text(encoding="utf-8").splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and name.strip().startswith("HF_"):
            os.environ.setdefault(name.strip(), value.strip().strip("'\""))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _check_model(job: Job, folder: Path) -> None:
    """Raise EdgetuneError unless ``folder`` holds all that the later steps need."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("weights as *.safetensors")
    if missing:
        problems = [
            Problem(
                f"{job.base_id} has no {name}",
                job.project.name(job.project.config),
                "choose a model that ships safetensors weights and tokenizer.json (pickle files are never loaded)",
            )
            for name in missing
        ]
        raise EdgetuneError(problems)


def _refuse_changed_files(job: Job, files: dict[str, dict[str, Any]]) -> None:
    """Raise EdgetuneError when a file that is there is not the locked one."""
    present = {name: entry for name, entry in files.items() if (job.base_folder / name).is_file()}
    if not is_intact(job.base_folder, present, job.hashes):
        raise _differs(job, f"files in {job.project.name(job.base_folder)} differ from")


def _differs(job: Job, what: str) -> EdgetuneError:
    lock = job.project.name(job.project.lock)
    return failure(
        f"{what} {lock}: this is not the base model the project was locked to",
        where=lock,
        hint=f"delete {job.project.name(job.base_folder)} to get the locked files again, "
        "or accept a new base with `edgetune download --update-lock`",
    )


def _files(job: Job, folder: Path) -> dict[str, dict[str, Any]]:
    return list_outputs(folder, job.hashes)


def _read_lock(job: Job) -> dict[str, Any]:
    path = job.project.lock
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {model: entry for model, entry in content.items() if isinstance(entry["files"], dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        name = job.project.name(path)
        hint = "take it from version control again, or delete it and run `edgetune download`"
        raise failure("the lock file is damaged", where=name, hint=hint) from None
