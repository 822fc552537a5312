"""Set rows aside for evaluation: all rows → ``datasets/train.jsonl`` and ``eval.jsonl``, and the workflow file."""

import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgetune import config
from edgetune.dataset import EVAL, TRAIN, all_rows, inputs
from edgetune.errors import EdgetuneError, Problem, failure
from edgetune.project import Project
from edgetune.row import Row, as_json
from edgetune.source import Edit, JsonSource, Location, write_edits
from edgetune.stages import Job, run_lock, text_digest


def write_split(job: Job, share: float) -> dict[str, int]:
    """Split all rows anew, about ``share`` of them for evaluation; return the rows by role.

    Rows with the same prompt stay together (chats: with the same first question). Slices and ``max_samples`` do not
    count: every row of the files takes part. A file that is written over is kept under another name. Raises
    EdgetuneError when there are more bad rows than ``job.max_bad`` or there is nothing to split; then nothing has
    changed. Killed at any moment, it has changed nothing either, or :func:`finish` completes it.
    """
    project = job.project
    targets = {role: project.split_file(role) for role in (TRAIN, EVAL)}
    new = {role: _new(path) for role, path in targets.items()}
    new_config = _new(project.pending_split)
    with run_lock(project):
        inputs(job)
        if folders := [path for path in targets.values() if path.is_dir()]:
            raise failure(f"{project.name(folders[0])} is a folder", hint="move it away: the rows go into a file")
        try:
            chosen = _choose(job, share)
            project.split_file(TRAIN).parent.mkdir(exist_ok=True)
            counts = _write_rows(job, chosen, new)
            _write_config(job, targets, project.config, new_config)
            config.load(project, new_config)
            with _uninterrupted():
                for path in targets.values():
                    _keep(job, path)
                new_config.replace(project.pending_split)
                _put_in_place(project)
        finally:
            if not project.pending_split.exists():
                for temporary in (*new.values(), new_config):
                    temporary.unlink(missing_ok=True)
    return counts


def finish(project: Project) -> bool:
    """Complete a split that was interrupted when all its files were written; return whether there was one.

    While another run is at work nothing is done: it may be the one that splits.
    """
    with suppress(EdgetuneError), run_lock(project):
        if project.pending_split.exists():
            _put_in_place(project)
            return True
    return False


def _put_in_place(project: Project) -> None:
    """Move the new files to where they belong. The workflow file is the last, and the sign that there is more to do."""
    for path in map(project.split_file, (TRAIN, EVAL)):
        if (new := _new(path)).exists():
            new.replace(path)
    project.pending_split.replace(project.config.resolve())  # a link stays one


def _new(path: Path) -> Path:
    """Return where a file is written before it counts."""
    return path.with_name(path.name + ".tmp")


def _choose(job: Job, share: float) -> set[bytes]:
    """Return the digests of the prompts that go to evaluation: those whose digests are smallest.

    What a row is drawn by depends on nothing but itself, so the same rows are split the same way again.
    """
    sizes, problems, bad = Counter[bytes](), list[Problem](), 0.0
    for row in all_rows(job):
        if faults := row.faults(job.workflow.contract):
            problems += faults
            bad += 1 if not row.fatal else math.inf
        else:
            sizes[_digest(job, row)] += 1
    if bad > (job.max_bad or 0):
        raise EdgetuneError(problems)
    if len(sizes) < 2:  # noqa: PLR2004
        raise failure("there are no two different prompts to split", hint="add rows to the data set")
    wanted, taken, chosen = math.ceil(share * sizes.total()), 0, set[bytes]()
    for digest in sorted(sizes):
        if taken + sizes[digest] <= wanted and len(chosen) < len(sizes) - 1:
            chosen.add(digest)
            taken += sizes[digest]
    return chosen or {min(sizes, key=lambda digest: (sizes[digest], digest))}


def _digest(job: Job, row: Row) -> bytes:
    return text_digest(job.workflow.contract.exchanges(row.values)[0][0])


def _write_rows(job: Job, chosen: set[bytes], paths: dict[str, Path]) -> dict[str, int]:
    counts = Counter[str]()
    with paths[TRAIN].open("w", encoding="utf-8") as train, paths[EVAL].open("w", encoding="utf-8") as evaluation:
        for row in all_rows(job):
            if not row.faults(job.workflow.contract):
                role, file = (EVAL, evaluation) if _digest(job, row) in chosen else (TRAIN, train)
                file.write(as_json(row.values) + "\n")
                counts[role] += 1
    return {role: counts[role] for role in paths}


def _keep(job: Job, path: Path) -> None:
    """Copy a file that is about to be replaced to a name that nothing has."""
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{path.stem}.before-split-{number}{path.suffix}")).exists():
            number += 1
        shutil.copy2(path, kept)
        job.progress.say(f"{job.project.name(path)} is kept as {job.project.name(kept)}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait: between the files of a split, the project would be neither the old one nor the new one."""
    mask = getattr(signal, "pthread_sigmask", None)  # Windows has none
    before = mask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}) if mask else set()
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


def _write_config(job: Job, targets: dict[str, Path], original: Path, new: Path) -> None:
    """Write the workflow file with the new data files; everything else in it stays as it is."""
    project, workflow = job.project, job.workflow
    source = JsonSource(original, project.name(project.config))
    load: dict[str, dict[str, Any]] = {
        role: {
            "data_name": "json",
            "data_files": Path(os.path.relpath(path, project.config_folder)).as_posix(),
            "split": "train",
        }
        for role, path in targets.items()
    }
    train, evaluation = workflow.train_data, workflow.eval_data
    place: Location = ("data_configs", workflow.data_configs.index(train))
    edits = [source.replacing((*place, "load_dataset_config"), load[TRAIN])]
    if evaluation is not None and evaluation is not train:
        other = ("data_configs", workflow.data_configs.index(evaluation), "load_dataset_config")
        edits.append(source.replacing(other, load[EVAL]))
    else:
        edits += _new_data_set(job, source, place, load[EVAL])
    for data in workflow.calibration_data:
        if data not in (train, evaluation) and data.load_dataset_config == train.load_dataset_config:
            other = ("data_configs", workflow.data_configs.index(data), "load_dataset_config")
            edits.append(source.replacing(other, load[TRAIN]))  # or it would look at what the model is evaluated on
    write_edits(source, edits, original, new)


def _new_data_set(job: Job, source: JsonSource, place: Location, load: dict[str, Any]) -> list[Edit]:
    """Return the edits that add a data set like the one at ``place`` and name it for evaluation."""
    names = {data.name for data in job.workflow.data_configs}
    name = next(name for n in range(1, len(names) + 2) if (name := f"eval_data{n if n > 1 else ''}") not in names)
    added = source.data["data_configs"][place[1]] | {"name": name, "load_dataset_config": load}
    edits = [source.adding_after(place, added)]
    step = next((step for step, given in source.data["passes"].items() if "train_data_config" in given), None)
    if step is None:  # then the second data set is the one for evaluation
        return edits
    if "eval_data_config" in source.data["passes"][step]:
        edits.append(source.replacing(("passes", step, "eval_data_config"), name))
    else:
        edits.append(source.adding_after(("passes", step, "train_data_config"), ("eval_data_config", name)))
    return edits
