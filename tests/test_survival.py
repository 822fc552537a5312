"""What a run outlives: a machine that does not play along."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import Sandbox
from edgetune.stages import Hashes


def unlike_before(project: Sandbox) -> None:
    """Change what every step depends on: one row less, other steps, another export."""
    rows = project.root / "datasets/train.jsonl"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=20, save_steps=4, eval_strategy="no"))
    project.edit(lambda c: c["passes"]["builder"].update(int4_block_size=64))


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount something at a folder, where that is allowed."""
    mount = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"nothing can be mounted here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def told(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a user is told who can do something about it."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert "hint: " in result.stderr
    return result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
@pytest.mark.parametrize("megabytes", [1, 14, 24])
def test_disk_full(project: Sandbox, megabytes: int) -> None:
    """Wherever the space ends, that is what is said, and the results that were there stay."""
    unlike_before(project)
    before, results = project.results(), project.root / "gen-model"
    used = sum(path.stat().st_size for path in results.rglob("*") if path.is_file())
    kept = results.rename(project.root / "kept")
    results.mkdir()
    with mounted(results, "-t", "tmpfs", "-o", f"size={used + megabytes * 1_000_000}", "tmpfs"):
        shutil.copytree(kept, results, dirs_exist_ok=True)
        result = project.run("finetune")
        after = project.results()

    assert "space" in told(result)
    assert all(after[name] == content for name, content in before.items() if name.startswith("gen-model/onnx"))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_a_folder_that_cannot_be_written(project: Sandbox) -> None:
    """A project on a read-only file system is told of by the file that could not be written."""
    unlike_before(project)
    with mounted(project.root, "--bind", str(project.root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(project.root)], check=True)
        result = project.run("finetune")

    assert "gen-model" in told(result)


def test_a_model_cache_elsewhere(project: Sandbox, tmp_path: Path) -> None:
    """model-cache may be a link to a folder on another disk."""
    cache = project.root / "model-cache"
    shutil.move(cache, tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere", target_is_directory=True)

    assert set(project.steps().values()) == {"up to date"}
    assert project.run("merge").returncode == 0


def test_a_clock_that_went_backwards(project: Sandbox) -> None:
    """Files from the future are read, not believed: a changed row of the same length is noticed."""
    rows = project.root / "datasets/train.jsonl"
    later = time.time() + 86_400
    os.utime(rows, (later, later))
    assert set(project.steps().values()) == {"up to date"}
    hashes = Hashes(project.root / "gen-model/cache.json")
    assert str(rows) not in hashes.known

    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace("a", "e", 1), encoding="utf-8")
    os.utime(rows, (later, later))

    assert project.steps()["train"] == "stale"
