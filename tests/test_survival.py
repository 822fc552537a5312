"""What a run outlives: being killed anywhere, and a machine that does not play along."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import Sandbox
from edgetune.stages import Hashes, is_intact, read_manifest


def unlike_before(project: Sandbox) -> None:
    """Change what every step depends on: one row less, other steps, another export."""
    rows = project.root / "datasets/train.jsonl"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    project.edit(lambda c: c["passes"]["lora"]["training_args"].update(max_steps=20, save_steps=4, eval_strategy="no"))
    project.edit(lambda c: c["passes"]["builder"].update(int4_block_size=64))


STEPS = {
    "download": r"tiny-phi3\.partial",
    "data": r"gen-model/data\.partial",
    "train": r"gen-model/adapter\.partial",
    "merge": r"gen-model/merged\.partial",
    "export": r"gen-model/onnx\.candidate\.partial",
    "verify": r"verify\.json\.tmp$|gen-model/onnx(\.candidate)?$",
}
"""What each step opens to write, renames or removes on its way to a result."""
WATCHED = """
import json, os, re, sys
from edgetune import cli

steps, counts, (step, count, event) = json.loads(sys.argv[1]), {}, sys.argv[2:5]

def fill(path):
    try:
        with open(path, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass

def watch(what, arguments):
    writes = what == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or what in ("os.rename", "os.remove", "os.mkdir"):
        for name in (name for name, pattern in steps.items() if re.search(pattern, str(arguments[0]))):
            counts[name] = counts.get(name, 0) + 1
            if (name, counts[name]) == (step, int(count)):
                os.kill(os.getpid(), int(event)) if event.isdigit() else fill(event)

sys.addaudithook(watch)
code = cli.main(["finetune"])
print(json.dumps(counts))
sys.exit(code)
"""


def watched(
    project: Sandbox, step: str = "", count: int = 0, event: signal.Signals | Path = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """Run ``edgetune finetune``; just before a step touches its files for the n-th time, something happens.

    The process gets a signal, or a file takes all the space that is left. The last line that is printed tells how
    often each step touched its files.
    """
    what = str(event) if isinstance(event, Path) else str(int(event))
    return project.command(sys.executable, "-c", WATCHED, json.dumps(STEPS), step, str(count), what)


def has_result(project: Sandbox, name: str) -> bool:
    """Tell whether a whole result is there, in its place or where the next run takes it from."""
    for folder in (project.root / "gen-model" / (name + ending) for ending in ("", ".old")):
        if manifest := read_manifest(folder):
            return is_intact(folder, manifest["outputs"], Hashes(project.root / "none.json"))
    return False


@pytest.fixture(scope="module")
def undisturbed(tuned: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sandbox, dict[str, int]]:
    """Run all steps anew in a project that has results; return it and how often each step touched its files."""
    project = Sandbox(shutil.copytree(tuned.root, tmp_path_factory.mktemp("undisturbed") / "my slm"))
    unlike_before(project)
    shutil.rmtree(project.root / "model-cache/edgetune")
    result = watched(project)
    assert result.returncode == 0, result.stderr
    return project, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(3))
def test_killed_anywhere(project: Sandbox, undisturbed: tuple[Sandbox, dict[str, int]], shift: int) -> None:
    """Every step ended at its first, a middle or its last change of a file, by each way to end it, and run again.

    No half of a result is taken for one, no earlier result is lost, and what comes out is what comes out undisturbed.
    """
    from safetensors.numpy import load_file

    wanted, counts = undisturbed
    unlike_before(project)
    shutil.rmtree(project.root / "model-cache/edgetune")
    for number, (step, count) in enumerate((step, counts[step]) for step in STEPS):
        point = (1, count // 2 + 1, count)[(number + shift) % 3]
        end, code = ((signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130))[(number // 3 + shift) % 3]

        result = watched(project, step, point, end)

        assert result.returncode == code, f"{step}, {point} of {count}: {result.stderr}"
        assert "Traceback" not in result.stderr
        assert project.steps()[step] != "up to date"
        assert all(has_result(project, name) for name in ("data", "adapter", "merged", "onnx")), (step, point)

    result = project.run("finetune")

    assert result.returncode == 0, result.stderr
    assert set(project.steps().values()) == {"up to date"}
    assert not [path.name for path in (project.root / "gen-model").iterdir() if path.suffix in (".partial", ".old")]
    ours, theirs = project.results(), wanted.results()
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if "/data/" in name and not name.endswith("manifest.json"))
    weights = "gen-model/adapter/adapter_model.safetensors"
    for name, tensor in load_file(wanted.root / weights).items():
        assert abs(tensor - load_file(project.root / weights)[name]).max() <= 1e-6


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_disk_full_in_the_middle(project: Sandbox, undisturbed: tuple[Sandbox, dict[str, int]]) -> None:
    """The space that was there when a step began is taken by something else: told, and the next run goes on."""
    unlike_before(project)
    _, counts = undisturbed
    results = project.root / "gen-model"
    kept = results.rename(project.root / "kept")
    results.mkdir()
    with mounted(results, "-t", "tmpfs", "-o", "size=1g", "tmpfs"):
        shutil.copytree(kept, results, dirs_exist_ok=True)
        for step in ("data", "train", "merge", "export", "verify"):
            result = watched(project, step, counts[step] // 2 + 1, results / "filler")
            (results / "filler").unlink()

            assert "space" in told(result).lower(), step
            assert project.steps()[step] != "up to date"
            assert all(has_result(project, name) for name in ("data", "adapter", "merged", "onnx")), step

        result = project.run("finetune")

        assert result.returncode == 0, result.stderr
        assert set(project.steps().values()) == {"up to date"}


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
