"""Examine what a run depends on: the machine, the packages, the Hub, and the state of the project.

Reads them, and changes nothing. Works outside of a project, and with a broken workflow file. Imports nothing heavy.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from edgetune import config, download, installed, surroundings
from edgetune.errors import EdgetuneError
from edgetune.project import Project
from edgetune.stages import partial_folder
from edgetune.surroundings import Finding, Needs, has_size, of_problems

_TEXT_BYTES = 1_000_000  # larger files are data
_NAMED = 3  # of many


def findings(project: Project | None) -> Iterator[Finding]:
    """Examine the machine and, if there is one, the project; a check that fails stops none of the others."""
    needs = Needs(project)
    yield from surroundings.around(needs)
    if project is not None:
        yield _template(project)
        yield _leftovers(project)
        yield _workflow(project)
        yield _base_model(needs)
        yield _runs(needs, project)


def _template(project: Project) -> Finding:
    """Compare the template's version and the pinned runtime with the installed one."""
    here = installed.installed_version("edgetune")
    for what, wanted, remedy in (
        ("setup/requirements.txt asks for", installed.wanted_runtime(project.requirements), surroundings.SETUP),
        ("the template is", installed.template_version(project.answers), "run `copier update`, then `make setup`"),
    ):
        if wanted and installed.is_runtime(wanted) is False:
            return Finding("template", "warn", f"{what} {wanted}, installed is edgetune {here}", remedy)
    template = installed.template_version(project.answers)
    return Finding("template", "ok", f"edgetune {here}" + (f", template {template}" if template else ""))


def _leftovers(project: Project) -> Finding:
    """Look for what `copier update` or `git merge` could not decide."""
    found = []
    for path in project.own_files():
        if path.suffix == ".rej":
            found.append(project.name(path))
            continue
        with suppress(OSError):  # a broken link, or another user's file
            if path.stat().st_size <= _TEXT_BYTES:
                found += [f"{project.name(path)}:{line}" for line in _conflicts(path)]
    if found:
        named = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        return Finding("conflicts", "fail", f"left open in {named}", "decide, and delete the marks and *.rej files")
    return Finding("conflicts", "ok", "none left open")


def _conflicts(path: Path) -> list[int]:
    """Return the lines where conflicts begin that are ended too: a row of marks alone may be a heading."""
    begin, lines = 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if re.match("<{7} ", line):
            begin = number
        elif begin and re.match(">{7} ", line):
            lines.append(begin)
            begin = 0
    return lines


def _workflow(project: Project) -> Finding:
    try:
        workflow = config.load(project)
    except EdgetuneError as error:
        return of_problems("workflow", error.problems)
    passes = ", ".join(step.type for step in workflow.passes.values())
    return Finding("workflow", "ok", f"{project.name(project.config)} is valid: {passes}")


def _base_model(needs: Needs) -> Finding:
    name, job = "base model", needs.job
    if job is None:
        return Finding(name, "warn", "not known: the workflow file names none that can be read", "correct that first")
    try:
        locked = download.locked_sizes(job)
    except EdgetuneError as error:
        return of_problems(name, error.problems)
    folder = job.project.name(job.base_folder)
    lost = [path.name for path, size in locked.items() if not has_size(path, size)]
    if not locked or len(lost) == len(locked):
        return Finding(name, "ok", f"{job.base_id} is not in {folder} yet; the first run gets it")
    if lost:
        remedy = "`edgetune download` completes it; files that were changed must be deleted first"
        return Finding(name, "fail", f"{folder} differs from the lock in {', '.join(lost)}", remedy)
    return Finding(name, "ok", f"{job.base_id}, {decimal(sum(locked.values()))}, as locked (by sizes)")


def _runs(needs: Needs, project: Project) -> Finding:
    if project.run_lock.is_file():
        try:
            FileLock(project.run_lock).acquire(timeout=0).lock.release()
        except Timeout:
            return Finding("runs", "ok", "one is at work in this project now")
        except OSError as error:
            summary = f"{project.name(project.run_lock)}: {error.strerror}"
            return Finding("runs", "fail", summary, "give yourself the right to write into the project")
    folders = [project.results / "any", *([needs.job.base_folder] if needs.job else [])]
    half = [path for folder in folders for path in folder.parent.glob(partial_folder(Path("*")).name)]
    if half:
        names = ", ".join(project.name(path) for path in half)
        remedy = "`edgetune finetune` goes on from there; what it has no use for can be deleted"
        return Finding("runs", "warn", f"one was interrupted: {names}", remedy)
    return Finding("runs", "ok", "none was interrupted")
