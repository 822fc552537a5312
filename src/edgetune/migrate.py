"""Turn a workflow file in the style of 2024 into one of today: reads the old file, writes a new one beside it.

What ran on Azure ML becomes ``azureml-job.yml`` beside the new file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgetune import config
from edgetune.errors import EdgetuneError, failure, refuse
from edgetune.migration.cloud import CONDA_FILE, CloudJob, client
from edgetune.migration.data import data_sets
from edgetune.migration.draft import Draft, Note, Part, Section, where_was
from edgetune.migration.machines import machines
from edgetune.migration.model import input_model
from edgetune.migration.passes import Passes
from edgetune.olive_process import is_installed
from edgetune.project import Project
from edgetune.schema import Workflow
from edgetune.source import JsonSource

JOB_NAME = "azureml-job.yml"
_ORDER = ("input_model", "systems", "data_configs", "passes", "workflow_id", "host", "target")


@dataclass(frozen=True)
class Migrated:
    """A new workflow file, the job file if there is one, and what is different."""

    text: str
    job: str
    notes: list[Note]


class _Moved(JsonSource):
    """The new file as the schema sees it: values are the new ones, lines those of the old file."""

    def __init__(self, old: JsonSource, new: Part) -> None:
        self.old, self.new = old, new
        self.data = json.loads(json.dumps(new))
        self.name, self.duplicates = old.name, old.duplicates

    def where(self, *location: str | int) -> str:
        return where_was(self.old, self.new, *location)


def migrated(path: Path) -> Migrated | None:
    """Return what the file becomes; None when it is a file of today already.

    Raises EdgetuneError, with lines of the old file, when it is no workflow file, or when there is something in it
    that only its owner can decide on.
    """
    source = config.read(path, str(path))
    refuse(source.duplicate_problems())
    _check_is_workflow(source)
    here = Project(path.absolute().parent.parent)
    try:
        config.check(source, here)
    except EdgetuneError:
        pass
    else:
        return None
    draft, job = Draft(source), CloudJob()
    new = _convert(draft, job)
    refuse(draft.problems)
    config.check(_Moved(source, new), here)
    notes = sorted(draft.notes, key=lambda note: note.line)
    text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    return Migrated(text, job.text(path.name) if job.wanted else "", notes)


def _check_is_workflow(source: JsonSource) -> None:
    data = source.data
    if not isinstance(data, dict) or not isinstance(data.get("input_model"), dict):
        hint = "an Olive workflow file is a JSON object with input_model, data_configs and passes"
        raise failure("not a workflow file: it has no input_model", where=source.where("input_model"), hint=hint)


def _convert(draft: Draft, job: CloudJob) -> Part:
    top = Section(draft, (), ("engine",))
    if workspace := top.take("azureml_client"):
        client(draft, job, workspace.place)
    top.take("input_model")
    parts = Part(())
    model = input_model(draft, job)
    parts.put("input_model", model, model.place)
    places = machines(draft, job, top)
    for key, value in places.items():
        parts.put(key, value, places.places[key])
    rows = top.places.get("data_configs", top.place)
    data, names = data_sets(draft, job, top, str(model.get("model_path", "")))
    provider = parts["systems"].get(parts["target"], next(iter(parts["systems"].values())))["accelerators"][0]
    passes = Passes(draft, provider["execution_providers"][0], data, names).read(top)
    parts.put("data_configs", data, rows)
    parts.put("passes", passes, passes.place)
    top.leave_rest(Workflow.model_fields, "nothing reads this key today")
    new = Part(())
    for key in (*_ORDER, *(key for key in parts if key not in _ORDER)):
        if key in parts:
            new.put(key, parts[key], parts.places[key])
    return new


def default_output(old: Path) -> Path:
    """Return where the new file goes when nothing else is said."""
    return old.with_name(f"{old.stem}-migrated.json")


def outputs(new: Path, result: Migrated) -> dict[Path, str]:
    """Return the files to write with their content. Raises EdgetuneError when one is there already."""
    files = {new: result.text} | ({new.with_name(JOB_NAME): result.job} if result.job else {})
    if there := [path for path in files if path.exists() or path.is_symlink()]:
        folder = " in another folder" if there[0].name == JOB_NAME else ""
        hint = f"move it away, or name another file{folder} with -o"
        raise failure("the file exists, and nothing is written over", where=str(there[0]), hint=hint)
    if not new.parent.is_dir():
        raise failure("there is no such folder", where=str(new.parent), hint="make it, or name another file with -o")
    return files


def check_with_olive(text: str, old: Path) -> bool:
    """Let Olive read the new file; False when it is not installed.

    Raises EdgetuneError with what Olive says against it.
    """
    if not is_installed():
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fine-tuning" / "olive-config.json"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        done = subprocess.run(  # noqa: S603 - our own interpreter, no shell
            [sys.executable, "-m", "edgetune.migration.with_olive", str(file)],
            cwd=file.parent,
            env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise failure(f"stock Olive does not take the new file: {said[-1]}", where=str(old), hint="nothing was written")
    return True


def write(files: dict[Path, str]) -> None:
    """Write the files, each as a whole."""
    for path, text in files.items():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.rename(path)


def summary(new: Path, result: Migrated, *, by_olive: bool) -> list[str]:
    """Return what is said last: how much is different, who has checked it, and what is next."""
    counts = Counter(note.kind for note in result.notes)
    told = f"{counts['changed']} changed, {counts['left out']} left out, {counts['to do']} to do"
    checked = "edgetune and stock Olive" if by_olive else "edgetune; not by stock Olive, which is not installed"
    lines = [f"{told}; checked by {checked}"]
    if result.job and CONDA_FILE in result.job and not (new.parent / CONDA_FILE).exists():
        lines.append(f"to do: {JOB_NAME} needs setup/conda.yaml, which a project with compute=azureml has")
    return [*lines, "next: put it into a project as fine-tuning/olive-config.json, then run `edgetune data`"]
