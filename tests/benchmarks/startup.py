"""Time of commands that have nothing to do, against other command lines of the same environment, in one run.

The project is the default one, fine-tuned, with ballast in its base model: a file of random bytes as one
more tensor. So base, merged and exported model are hashed, locked and checked as those of a large model are. What is
timed are whole processes, with their bytecode in place as pip leaves it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BUILT_IN, REPOSITORY, save
from copier import run_copy

BIN = Path(sys.executable).parent
EDGETUNE = [sys.executable, "-m", "edgetune"]
COPY = [BIN / "copier", "copy", "--quiet", "--defaults", "--vcs-ref", "HEAD"]
PEERS: dict[str, list[Any]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "hf --help": [BIN / "hf", "--help"],
    "copier --version": [BIN / "copier", "--version"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of ballast; merged, it takes as much again")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--scratch", type=Path, help="where the project is made for the time being")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        project, copy, template = (Path(scratch) / name for name in ("my-slm", "copy", "template"))
        prepare(project, round(arguments.gigabytes * 1e9))
        write_template(template)
        commands: dict[str, list[Any]] = {
            "edgetune --help": [*EDGETUNE, "--help"],
            "edgetune status": [*EDGETUNE, "status"],
            "make finetune, up to date": ["make", f"VENV={sys.prefix}", "finetune"],
            "copier copy": [*COPY, REPOSITORY, copy],
            "copier copy, a template of one file": [*COPY, template, copy],
            **PEERS,
        }
        times = {
            name: timed(command, project, arguments.runs, lambda: shutil.rmtree(copy, ignore_errors=True))
            for name, command in commands.items()
        }
    numbers = {"gigabytes": arguments.gigabytes, "runs": arguments.runs, "times": times}
    print(table(numbers))
    if arguments.save:
        save("startup", numbers, "copier", "huggingface_hub", "torch")


def prepare(project: Path, ballast: int) -> None:
    """Make a project that is up to date."""
    run_copy(str(REPOSITORY), project, defaults=True, quiet=True, vcs_ref="HEAD")
    base = project / "model-cache/edgetune/tiny-phi3"
    shutil.copytree(BUILT_IN, base)
    entry = {"ballast": {"dtype": "U8", "shape": [ballast], "data_offsets": [0, ballast]}}
    header = json.dumps(entry).encode()
    with (base / "model-ballast.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while left := ballast - (file.tell() - 8 - len(header)):
            file.write(os.urandom(min(left, 1 << 24)))
    subprocess.run([*EDGETUNE, "finetune"], cwd=project, capture_output=True, check=True)
    time.sleep(3)  # files younger than two seconds are read anew
    subprocess.run([*EDGETUNE, "status"], cwd=project, capture_output=True, check=True)


def write_template(folder: Path) -> None:
    """Make the least that copier can copy: a repository with one file."""
    folder.mkdir()
    (folder / "README.md").write_text("a file\n", encoding="utf-8")
    author = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for arguments in (["init", "--quiet"], ["add", "README.md"], [*author, "commit", "--quiet", "--message", "a file"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)


def timed(command: list[Any], folder: Path, runs: int, before: Callable[[], object]) -> dict[str, float]:
    """Return the fastest and the median wall seconds of a command."""
    seconds = []
    for _ in range(runs + 1):
        before()
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return {"least": min(seconds[1:]), "median": statistics.median(seconds[1:])}  # the first run may write bytecode


def table(numbers: dict[str, Any]) -> str:
    """Return the numbers as Markdown."""
    plain = numbers["times"]["python -c pass"]["median"]
    lines = ["| command | fastest | median | ratio to python -c pass |", "|---|---|---|---|"]
    for name, one in numbers["times"].items():
        lines.append(f"| `{name}` | {one['least']:.2f} s | {one['median']:.2f} s | {one['median'] / plain:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
