"""What is installed, against what edgetune needs and was tested with: package metadata only, nothing is imported."""

import json
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

_TESTED = Path(__file__).parent / "constraints.txt"

FLAVOURS = {
    "onnxruntime": {
        "onnxruntime": "cpu",
        "onnxruntime-gpu": "cuda",
        "onnxruntime-directml": "directml",
        "onnxruntime-openvino": "openvino",
        "onnxruntime-qnn": "qnn",
        "onnxruntime-training": "training",
    },
    "onnxruntime-genai": {
        "onnxruntime-genai": "cpu",
        "onnxruntime-genai-cuda": "cuda",
        "onnxruntime-genai-directml": "directml",
        "onnxruntime-genai-winml": "winml",
    },
}
"""Packages that install into the same folder, and what each is for: of these, the last one installed wins."""

DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "directml"}
"""What an execution provider is for."""


@dataclass
class Packages:
    """How the installed packages compare with those needed."""

    missing: list[str] = field(default_factory=list)
    """Requirements of packages that are not there."""
    wrong: list[str] = field(default_factory=list)
    """Packages outside of the versions edgetune works with."""
    untested: list[str] = field(default_factory=list)
    """Packages in other versions than the tested ones."""
    right: list[str] = field(default_factory=list)


def packages(extras: Iterable[str]) -> Packages:
    """Compare what edgetune needs, with these extras, with what is installed."""
    found, tested = Packages(), tested_versions()
    for requirement in _requirements({"", *extras}):
        name = canonicalize_name(requirement.name)
        have = installed_version(name)
        if have is None and _has_another_flavour(name):
            continue  # that is told by itself
        if have is None:
            found.missing.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(have, prereleases=True):
            found.wrong.append(f"{name} {have} (needed: {requirement.specifier})")
        elif name in tested and Version(have).public != tested[name]:
            found.untested.append(f"{name} {have} (tested: {tested[name]})")
        else:
            found.right.append(name)
    return found


def _requirements(extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements for these extras ("" are those of every install), each package once."""
    wanted: dict[str, Requirement] = {}
    left, done = set(extras), set()
    while left:
        done.add(extra := left.pop())
        for requirement in map(Requirement, requires("edgetune") or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.name == "edgetune":  # an extra that takes in others
                left |= requirement.extras - done
            else:
                wanted.setdefault(canonicalize_name(requirement.name), requirement)
    return list(wanted.values())


def _has_another_flavour(name: str) -> bool:
    families = (members for members in FLAVOURS.values() if name in members)
    return any(installed_version(flavour) for members in families for flavour in members)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package."""
    with suppress(PackageNotFoundError):
        return version(name)
    return None


@cache
def tested_versions() -> dict[str, str]:
    """Return the versions of the tested set by package."""
    lines = _TESTED.read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): wanted for name, _, wanted in pins}


def python_problem() -> str:
    """Return why this Python is not one edgetune works with; empty when it is."""
    needed = distribution("edgetune").metadata["Requires-Python"] or ""
    here = ".".join(map(str, sys.version_info[:3]))
    return "" if SpecifierSet(needed).contains(here, prereleases=True) else f"Python {here} (needed: {needed})"


def flavours() -> dict[str, dict[str, str]]:
    """Return the installed flavours of each family, and what each is for."""
    return {
        family: {name: purpose for name, purpose in members.items() if installed_version(name)}
        for family, members in FLAVOURS.items()
    }


def wanted_runtime(requirements: Path) -> str:
    """Return the version or commit of edgetune that a requirements file asks for; empty when it names neither."""
    with suppress(OSError):
        for line in requirements.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := re.match(r"edgetune\s*(?:\[[^]]*\])?\s*(?:==\s*|@\s*git\+\S*@)([^\s@;#]+)", line):
                return match[1]
    return ""


def template_version(answers: Path) -> str:
    """Return git's description of the template that copier rendered last; empty when it is not told."""
    with suppress(OSError):
        if match := re.search(
            r"^_commit:\s*['\"]?([^\s'\"]+)", answers.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        ):
            return match[1]
    return ""


def is_runtime(wanted: str) -> bool | None:
    """Tell whether a version, tag or commit is the installed edgetune; None when that cannot be told."""
    if re.fullmatch(r"v?\d+(\.\d+)+\S*", wanted) and not re.search(r"-\d+-g[0-9a-f]+$", wanted):
        with suppress(InvalidVersion):  # a branch may be called like one
            return Version(wanted) == Version(version("edgetune"))
    origin = json.loads(distribution("edgetune").read_text("direct_url.json") or "{}")
    here = origin.get("vcs_info", {}).get("commit_id")
    commit = wanted.rpartition("-g")[2]
    return str(here).startswith(commit) if here and re.fullmatch("[0-9a-f]{7,40}", commit) else None


def olive_passes() -> dict[str, str] | None:
    """Return the modules of Olive's passes by their names; None without Olive, which is not imported."""
    found = find_spec("olive")
    if found is None or found.origin is None:
        return None
    # The list that Olive itself goes by; importing Olive to ask for it takes seconds.
    text = Path(found.origin).with_name("olive_config.json").read_text(encoding="utf-8")
    return {name: entry["module_path"] for name, entry in json.loads(text)["passes"].items()}
