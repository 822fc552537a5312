"""The template as a folder and as a repository with releases, and what is rendered from it."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import copier
import yaml  # type: ignore[import-untyped]
from jinja2 import Environment

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = Path("src/edgetune/constraints.txt")
RELEASE = "v" + tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
"""The tag of the template that goes with the package's version."""

_compile = Environment.compile
_compiled: dict[tuple[Any, ...], Any] = {}


def _compile_once(environment: Environment, source: Any, *options: Any) -> Any:
    """Compile a template, or an expression of copier.yml, unless copier has compiled the same one before."""
    if not type(environment).__module__.startswith("copier.") or not isinstance(source, str):
        return _compile(environment, source, *options)
    key = (source, environment.undefined, *options)
    if key not in _compiled:
        _compiled[key] = _compile(environment, source, *options)
    return _compiled[key]


# Hundreds of projects are rendered of one template: two thirds of the time would be spent compiling it.
Environment.compile = _compile_once  # type: ignore[assignment, method-assign]
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def copy_template(folder: Path) -> Path:
    """Copy what copier reads of this repository."""
    shutil.copytree(REPOSITORY / "template", folder / "template")
    shutil.copy(REPOSITORY / "copier.yml", folder)
    (folder / CONSTRAINTS).parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / CONSTRAINTS, folder / CONSTRAINTS)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git as nobody in particular, without the developer's own git configuration."""
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.invalid"]
    command = ["git", *identity, *arguments]
    clean = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(command, cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout


def commit(folder: Path, tag: str | None = None) -> None:
    """Commit everything in ``folder``, which becomes a repository if it is none."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")
    if tag:
        git(folder, "tag", tag)


def render(source: Path | str, project: Path, **answers: str) -> Path:
    """Render with defaults for everything that is not in ``answers``."""
    settings = copier.Settings()
    copier.run_copy(str(source), project, answers, defaults=True, quiet=True, settings=settings)
    return project
