"""The stage contract: what a killed run leaves behind is continued, finished or thrown away, never used."""

import json
import os
import time
from pathlib import Path

import pytest

from edgetune.stages import Hashes, building, is_current, partial_folder, publish, read_manifest, recover


def names(folder: Path) -> list[str]:
    """Return what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def build_once(folder: Path, key: str, text: str) -> None:
    """Publish a stage with one file."""
    with building(folder, "stage", key, {"of": key}) as build:
        (build.folder / "file").write_text(text)
        build.metrics["length"] = len(text)


def test_published_folder_describes_itself(tmp_path: Path) -> None:
    """The manifest has key, inputs, outputs with hash and size, versions, time, memory and metrics."""
    folder = tmp_path / "out"

    build_once(folder, "k", "hello")

    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.keys() == {
        "stage", "key", "inputs", "outputs", "versions", "seconds", "peak_rss_mb", "metrics",
    }  # fmt: skip
    assert manifest["outputs"]["file"]["size"] == 5
    assert manifest["metrics"] == {"length": 5}
    assert is_current(folder, "k", Hashes(tmp_path / "cache"))
    assert not is_current(folder, "other", Hashes(tmp_path / "cache"))
    assert names(tmp_path) == ["out"]


def test_failed_build_leaves_the_earlier_result(tmp_path: Path) -> None:
    """An error while building keeps what was published before."""
    folder = tmp_path / "out"
    build_once(folder, "old", "old")

    with pytest.raises(RuntimeError), building(folder, "stage", "new", {}) as build:
        (build.folder / "file").write_text("half")
        raise RuntimeError

    assert (folder / "file").read_text() == "old"
    assert is_current(folder, "old", Hashes(tmp_path / "cache"))


def test_interrupted_build_is_continued_only_with_the_same_key(tmp_path: Path) -> None:
    """The next build with the same key finds the half-built files; one with another key does not."""
    folder = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), building(folder, "stage", "k", {}) as build:
            (build.folder / "checkpoint").write_text("x")
            raise KeyboardInterrupt

    with building(folder, "stage", "k", {}) as build:
        assert (build.folder / "checkpoint").exists()
        raised = partial_folder(folder)
    assert not raised.exists()
    with pytest.raises(KeyboardInterrupt), building(folder, "stage", "k2", {}):
        raise KeyboardInterrupt
    with building(folder, "stage", "k3", {}) as build:
        assert list(build.folder.iterdir()) == [build.folder / "key"]


def test_killed_between_the_renames(tmp_path: Path) -> None:
    """Killed while publishing, the next run finds the new result, or the old one, but always a whole one."""
    folder = tmp_path / "out"
    build_once(folder, "old", "old")
    build_once(tmp_path / "new", "new", "new")
    folder.rename(tmp_path / "out.old")
    (tmp_path / "new").rename(partial_folder(folder))

    recover(folder)

    assert (folder / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_old_result_comes_back_when_the_new_one_is_not_whole(tmp_path: Path) -> None:
    """Without a manifest the half-built folder is not taken; the earlier result is restored."""
    folder = tmp_path / "out"
    build_once(folder, "old", "old")
    folder.rename(tmp_path / "out.old")
    partial_folder(folder).mkdir()

    recover(folder)

    assert (folder / "file").read_text() == "old"


def test_publishing_replaces_everything(tmp_path: Path) -> None:
    """No file of the earlier result survives in the new one."""
    folder = tmp_path / "out"
    build_once(folder, "old", "old")
    (folder / "extra").write_text("x")
    build_once(tmp_path / "next", "new", "new")

    publish(tmp_path / "next", folder)

    assert names(folder) == ["file", "manifest.json"]


def test_hash_cache_notices_an_edit_that_keeps_size_and_time(tmp_path: Path) -> None:
    """A young file is always read, so an edit within the clock's resolution is never missed."""
    path, cache = tmp_path / "file", tmp_path / "cache.json"
    path.write_text("aaaa")
    stat = path.stat()
    hashes = Hashes(cache)
    first = hashes[path]
    hashes.save()

    path.write_text("bbbb")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert Hashes(cache)[path] != first


def test_hash_cache_spares_reading_settled_files(tmp_path: Path) -> None:
    """The hash of a settled, unchanged file is taken from the cache; any change of its mark reads it again."""
    path, cache = tmp_path / "file", tmp_path / "cache.json"
    path.write_text("aaaa")
    time.sleep(2.1)
    hashes = Hashes(cache)
    digest = hashes[path]
    hashes.save()
    known = json.loads(cache.read_text())
    known[str(path)][4] = "from the cache"
    cache.write_text(json.dumps(known))

    assert Hashes(cache)[path] == "from the cache"
    os.utime(path)
    assert Hashes(cache)[path] == digest
