"""The stage contract: content keys, atomic publishing, manifests, and the run lock.

A stage's key is the hash of the content it depends on. Its output is built in ``<name>.partial/`` and renamed
into place with ``manifest.json`` as the last file written: no manifest, no stage.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from edgetune.config import base_model_id
from edgetune.errors import EdgetuneError, failure
from edgetune.memory import peak_memory_mb, reset_peak_memory
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.schema import Workflow

if TYPE_CHECKING:
    from edgetune.distributed import Launched
    from edgetune.torchrun import Torchrun

MANIFEST = "manifest.json"
_PACKAGES = ("edgetune", "torch", "transformers", "peft", "onnxruntime", "onnxruntime-genai", "tokenizers")
_ENTRY = ("size", "mtime", "ctime", "inode", "sha256")  # of the hash cache
_SETTLED_SECONDS = 2.0  # a file younger than this may still change within its time stamp's resolution


@dataclass
class Job:
    """One run over one project: what every stage is given."""

    project: Project
    workflow: Workflow
    progress: Progress
    hashes: "Hashes"
    base_id: str
    """The base model on the Hub, ``<org>/<name>``."""
    keys: dict[str, str]
    """The keys of the stages that were looked at so far: a later one's key is made of those before it."""
    max_bad: int | None = None
    """How many rows may be left out because something is wrong with them; None: as many as were before, or none."""
    ahead: tuple[str, ...] = ()
    """The steps that this run comes to after the data, for :mod:`edgetune.preflight`; emptied when it has told them."""
    processes: "Torchrun | Launched | None" = None
    """Who trains; None: this process."""

    @classmethod
    def start(cls, project: Project, workflow: Workflow, progress: Progress | None = None) -> "Job":
        """Make the context of a run; ``workflow`` has passed :func:`edgetune.config.load`."""
        progress = progress or Progress(project.events)
        return cls(project, workflow, progress, Hashes(project.hash_cache), base_model_id(workflow, project), {})

    @property
    def base_folder(self) -> Path:
        """The base model's folder below ``model-cache/``."""
        return self.project.model_cache / self.base_id


@dataclass(frozen=True)
class Stage:
    """A step that turns inputs into one published folder."""

    name: str
    format: int
    inputs: Callable[[Job], dict[str, Any]]
    """What the output depends on, by content; cheap, and free of heavy imports."""
    build: Callable[[Job, Path], dict[str, Any]]
    """Fills the given folder and returns the metrics for the manifest."""


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """Return the name git gives to a file's content; for small files, which are read as a whole."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def text_digest(text: str) -> bytes:
    """Return 8 bytes that stand for a text, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class Hashes:
    """sha256 of files, remembered by size, times and inode so that large weights are read once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.known: dict[str, list[Any]] = {}
        self.written: dict[str, list[Any]] = {}
        self.changed = False
        with suppress(OSError, ValueError, TypeError):
            known = json.loads(cache.read_text(encoding="utf-8"))
            self.known = {k: v for k, v in dict(known).items() if isinstance(v, list) and len(v) == len(_ENTRY)}

    def __getitem__(self, path: Path) -> str:
        """Return the sha256 of ``path``; reads the file unless an unchanged, settled one is known."""
        stat = path.stat()
        mark = _mark(stat)
        for known in (self.known, self.written):
            *known_mark, digest = known.get(str(path), [""])
            if known_mark == mark:
                return str(digest)
        digest = sha256(path)
        if abs(time.time() - max(stat.st_mtime, stat.st_ctime)) > _SETTLED_SECONDS:
            self.known[str(path)] = [*mark, digest]
            self.changed = True
        return digest

    def wrote(self, path: Path, digest: str) -> None:
        """Take the sha256 of what was just written to a file; it is known until something changes the file."""
        self.written[str(path)] = [*_mark(path.stat()), digest]

    def forget(self) -> None:
        """Read every file again from now on."""
        self.known, self.written, self.changed = {}, {}, True

    def save(self) -> None:
        """Write what was learned; a cache that cannot be written only costs time."""
        if self.changed and self.cache.parent.is_dir():
            with suppress(OSError):
                write_json(self.cache, {k: v for k, v in self.known.items() if Path(k).exists()}, indent=None)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it: interrupted, it leaves the earlier one alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
    temporary.replace(path)


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return an object from a JSON file, or None when there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def key_of(stage: str, format_number: int, inputs: Mapping[str, Any]) -> str:
    """Return the key of a stage: raise ``format_number`` when the same inputs give another result."""
    return content_digest([stage, format_number, inputs])


def content_digest(content: Any) -> str:
    """Return the sha256 of what JSON can say; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a published folder's manifest, or None when there is none that can be read, or that can be trusted."""
    content = read_json(folder / MANIFEST)
    if content is None or not {"key", "outputs"} <= content.keys():
        return None
    return content if all(map(_is_inside, content["outputs"])) else None


def _is_inside(name: str) -> bool:
    """Tell whether the name of an output leads to a file below its folder: others may have written the manifest."""
    return not ({"", ".", ".."} & set(re.split(r"[/\\]", name)) or re.search(r"[:\0]", name))


def list_outputs(folder: Path, hashes: Hashes | None = None) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file below ``folder``, its manifest excepted."""
    digest = sha256 if hashes is None else hashes.__getitem__
    return {name: {"size": path.stat().st_size, "sha256": digest(path)} for name, path in _files(folder)}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix(), path


def additions(folder: Path, outputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of files that are not listed; hidden ones, which desktops leave everywhere, excepted."""
    return (name for name, path in _files(folder) if name not in outputs and not path.name.startswith("."))


def changes(folder: Path, outputs: Mapping[str, Mapping[str, Any]], hashes: Hashes) -> Iterator[str]:
    """Yield the names of listed files that are not there with the listed bytes."""
    for name, entry in outputs.items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == entry["size"] and hashes[path] == entry["sha256"]
        if not whole:
            yield name


def is_intact(folder: Path, outputs: Mapping[str, Mapping[str, Any]], hashes: Hashes) -> bool:
    """Tell whether every listed file is there with the listed bytes."""
    return next(changes(folder, outputs, hashes), None) is None


def is_current(folder: Path, key: str, hashes: Hashes) -> bool:
    """Tell whether ``folder`` holds the untouched output of the stage with this key."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest["key"] == key and is_intact(folder, manifest["outputs"], hashes)


def published(folder: Path) -> dict[str, str]:
    """Return the sha256 of a stage's published files from its manifest; nothing when there is none."""
    manifest = read_manifest(folder)
    return {} if manifest is None else {name: entry["sha256"] for name, entry in manifest["outputs"].items()}


def partial_folder(folder: Path) -> Path:
    """Return where the output of ``folder`` is built."""
    return folder.with_name(folder.name + ".partial")


@dataclass
class Build:
    """An output under construction."""

    folder: Path
    metrics: dict[str, Any]


@contextmanager
def building(
    folder: Path, stage: str, key: str, inputs: Mapping[str, Any], hashes: Hashes | None = None
) -> Iterator[Build]:
    """Give a folder to build in and publish it as ``folder`` when the block ends without an error.

    What an interrupted run with the same key left behind is still there; anything else was removed. ``hashes`` may
    know what was written.
    """
    partial = partial_folder(folder)
    key_file = partial / "key"
    if not (key_file.is_file() and key_file.read_text(encoding="utf-8") == key):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        key_file.write_text(key, encoding="utf-8")
    started, build = time.monotonic(), Build(partial, {})
    reset_peak_memory()
    yield build
    key_file.unlink()
    manifest = {
        "stage": stage,
        "key": key,
        "inputs": inputs,
        "outputs": list_outputs(partial, hashes),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": build.metrics.pop("peak_rss_mb", 0) or peak_memory_mb(),  # of all processes, or of this one
        "metrics": build.metrics,
    }
    write_json(partial / MANIFEST, manifest)
    publish(partial, folder)


def publish(partial: Path, folder: Path) -> None:
    """Rename into place. Killed between the two renames, :func:`recover` finishes the job."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a publication that was interrupted."""
    partial, old = partial_folder(folder), folder.with_name(folder.name + ".old")
    if read_manifest(partial) is not None:
        publish(partial, folder)
    if not folder.exists() and old.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_at_rest(project: Project, folder: Path) -> None:
    """Finish or undo an interrupted publication, unless a run is at work, which may be publishing right now."""
    if folder.with_name(folder.name + ".old").exists() or read_manifest(partial_folder(folder)) is not None:
        with suppress(EdgetuneError), run_lock(project):
            recover(folder)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide on results."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class HashedFile:
    """A file that a thread of its own writes and hashes, while what comes next is made."""

    def __init__(self, path: Path) -> None:
        self._file, self._sha256 = path.open("wb"), hashlib.sha256()
        self._thread, self._last = ThreadPoolExecutor(1), Future[None]()
        self._last.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._file.close()
        if kind is None:
            self._last.result()

    def write(self, data: memoryview) -> None:
        """Append bytes, which must not change any more. Raises what went wrong with those before."""
        self._last.result()
        self._last = self._thread.submit(self._put, data)

    @property
    def sha256(self) -> str:
        """The sha256 of all that was written."""
        return self._sha256.hexdigest()

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)


@contextmanager
def run_lock(project: Project) -> Iterator[None]:
    """Hold the project for this process. Raises EdgetuneError naming the process that holds it."""
    project.results.mkdir(parents=True, exist_ok=True)
    holder = project.run_lock.with_suffix(".pid")
    lock = FileLock(project.run_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = holder.read_text(encoding="ascii").strip() if holder.is_file() else "unknown"
        raise failure(
            f"another edgetune run (process {pid}) is working in this project",
            hint="wait for it to end, or stop it; what it has finished is kept",
        ) from None
    try:
        holder.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
