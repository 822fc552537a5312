"""Run the steps in order: download → data → train → merge → export, each only when its inputs changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import dataset, download, export, merge, train
from edgetune.errors import EdgetuneError
from edgetune.stages import (
    Job,
    Stage,
    building,
    is_current,
    is_intact,
    key_of,
    partial_folder,
    read_manifest,
    recover,
    run_lock,
)

STAGES: tuple[Stage, ...] = (dataset.STAGE, train.STAGE, merge.STAGE, export.STAGE)
STEPS = ("download", *(stage.name for stage in STAGES))


def run(job: Job, last: str, *, source: Path | None = None, update_lock: bool = False) -> None:
    """Bring every step up to and including ``last`` up to date.

    ``source`` and ``update_lock`` are for the download. Raises EdgetuneError; what earlier runs published
    stays until its successor is complete.
    """
    with run_lock(job.project):
        try:
            _run_download(job, last, source=source, update_lock=update_lock)
            for stage in STAGES[: STEPS.index(last)]:
                _run_stage(job, stage)
                if stage is dataset.STAGE:
                    dataset.check_rejected(job)
        finally:
            job.hashes.save()


def _run_download(job: Job, last: str, *, source: Path | None, update_lock: bool) -> None:
    if source is None and not update_lock and download.is_current(job):
        job.progress.skip("download")
        return
    if last != "download":
        with job.progress.running("data", job.project.log("data")):
            dataset.check_rows(job)  # before gigabytes are fetched
    with job.progress.running("download", job.project.log("download")):
        download.download(job, source=source, update_lock=update_lock)
        job.progress.say(f"{job.base_id} is in {job.project.name(job.base_folder)}")


def _run_stage(job: Job, stage: Stage) -> None:
    folder = job.project.stage_folder(stage.name)
    recover(folder)
    inputs = stage.inputs(job)
    key = job.keys[stage.name] = key_of(stage.name, stage.format, inputs)
    if is_current(folder, key, job.hashes):
        job.progress.skip(stage.name)
        return
    with (
        job.progress.running(stage.name, job.project.log(stage.name)),
        building(folder, stage.name, key, inputs) as build,
    ):
        build.metrics |= stage.build(job, build.folder)


@dataclass(frozen=True)
class StepState:
    """What ``edgetune status`` says of one step."""

    step: str
    state: str
    folder: str
    detail: str = ""


def status(job: Job) -> list[StepState]:
    """Return the state of every step without changing anything."""
    project = job.project
    whole = download.is_current(job)
    state = "up to date" if whole else "incomplete" if job.base_folder.exists() else "missing"
    states = [StepState("download", state, project.name(job.base_folder), job.base_id)]
    states += [_stage_state(job, stage) for stage in STAGES]
    job.hashes.save()
    return states


def stale(job: Job) -> str:
    """Say which published results are older than what they depend on; empty when none is."""
    states = [state for state in status(job) if state.state == "stale"]
    return "; ".join(f"{state.step}: {state.detail}" for state in states)


def _stage_state(job: Job, stage: Stage) -> StepState:
    folder = job.project.stage_folder(stage.name)
    name = job.project.name(folder)
    try:
        inputs = stage.inputs(job)
    except EdgetuneError as error:
        job.keys[stage.name] = ""
        return StepState(stage.name, "blocked", name, error.problems[0].message)
    key = job.keys[stage.name] = key_of(stage.name, stage.format, inputs)
    manifest = read_manifest(folder)
    if manifest is None:
        interrupted = partial_folder(folder).exists()
        return StepState(stage.name, "interrupted" if interrupted else "missing", name)
    if manifest["key"] != key:
        changed = ", ".join(_changed(manifest.get("inputs", {}), inputs))
        return StepState(stage.name, "stale", name, f"changed: {changed or 'edgetune'}")
    if not is_intact(folder, manifest["outputs"], job.hashes):
        return StepState(stage.name, "stale", name, "its files were changed or removed")
    return StepState(stage.name, "up to date", name, _summary(manifest))


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name in new if old.get(name) != new[name]]


def _summary(manifest: dict[str, Any]) -> str:
    return f"{manifest['seconds']:g} s, peak {manifest['peak_rss_mb']:g} MB"
