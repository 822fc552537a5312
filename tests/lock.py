"""template/setup/requirements.lock.jinja, made of edgetune's extras and constraints.txt; `make lock` writes it anew.

All extras are resolved together, for every platform and Python: no version depends on a project's answers.
Which project needs which package comes from resolving each extra again within those versions.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "template/setup/requirements.lock.jinja"
CONSTRAINTS = ROOT / "src/edgetune/constraints.txt"
PROJECT = ROOT / "pyproject.toml"
EVERY_PROJECT = ("train", "olive")
WHEN = {
    "export": "device == 'cpu'",
    "export-cuda": "device == 'cuda'",
    "export-directml": "device == 'directml'",
    "qlora": "method == 'qlora'",
    "azureml": "compute == 'azureml'",
}
"""The answers that add an extra to a project."""
TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
"""torch, of which each index has other builds, and what only those for CUDA need."""
HEAD = """\
# All packages that edgetune needs, on Linux, macOS and Windows, with the hashes of their files: pip refuses any other.
# Not torch, of which PyTorch's index has builds of its own, and not the CUDA libraries that come with some of them.
# The template's `make lock` makes it, `copier update` keeps it current.
"""


def resolve(constraints: Path, *options: str) -> dict[str, str]:
    """Return the lines of each package that edgetune needs with some extras, by the package's name."""
    python = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["requires-python"].removeprefix(">=")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--fork-strategy=fewest"]
    command += [f"--python-version={python}", "--no-header", "--no-annotate", f"--constraint={constraints}", *options]
    text = subprocess.run([*command, str(PROJECT)], check=True, stdout=subprocess.PIPE, text=True).stdout
    packages = re.split(r"(?m)^(?=[a-z0-9])", text)[1:]
    return {package.partition("==")[0]: package for package in packages}


def lock() -> Iterator[str]:
    """Yield the template of the lock file in parts."""
    packages = resolve(CONSTRAINTS, "--all-extras", "--generate-hashes")
    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder) / "versions.txt"
        versions.write_text("".join(packages.values()), encoding="utf-8")
        always = resolve(versions, *(f"--extra={extra}" for extra in EVERY_PROJECT)).keys()
        needed = {answer: resolve(versions, f"--extra={extra}").keys() for extra, answer in WHEN.items()}

    def condition(name: str) -> str:
        answers = [answer for answer, names in needed.items() if name in names]
        whatever_the_device = all(needed[answer] >= {name} for answer in needed if answer.startswith("device"))
        return "" if name in always or whatever_the_device else " or ".join(answers)

    yield HEAD
    for answers, names in groupby((name for name in packages if not TORCH.match(name)), condition):
        text = "".join(packages[name] for name in names)
        yield f"{{% if {answers} -%}}\n{text}{{% endif -%}}\n" if answers else text


if __name__ == "__main__":
    LOCK.write_text("".join(lock()), encoding="utf-8")
