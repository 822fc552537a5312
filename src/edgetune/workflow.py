"""Run the steps in order: download → data → train → merge → export → verify, each only when its inputs changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import dataset, download, export, merge, preflight, train, verify
from edgetune.errors import EdgetuneError, failure
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

STEPS = ("download", dataset.STAGE.name, train.STAGE.name, merge.STAGE.name, export.NAME, "verify")
"""What can be asked for. Other passes of the workflow file belong to the export."""


def run(job: Job, last: str, *, source: Path | None = None, update_lock: bool = False) -> None:
    """Bring every step up to and including ``last`` up to date.

    ``source`` and ``update_lock`` are for the download. Raises EdgetuneError; what earlier runs published
    stays until its successor is complete.
    """
    with _writing(job):
        _run_steps(job, last, source=source, update_lock=update_lock)
        if last == "verify":
            _run_verify(job, verify.Limits())


def check(job: Job, limits: verify.Limits) -> None:
    """Verify what is there, reading every byte; only what is missing or out of date is made before.

    Unlike :func:`run`, this does not replace files that were changed behind the steps' back: it reports them.
    Raises GateError when the exported model does not pass.
    """
    with _writing(job):
        job.hashes.forget()
        for stage in stages_of(job):
            for folder in _places(job, stage):
                recover(folder)
        model = verify.exported(job)
        damage = _damage(job, model) if model else []
        if model and damage:
            verify.verify(job, model, limits, damage)
        _run_steps(job, "export")
        _run_verify(job, limits, repeat=True)


def stages_of(job: Job) -> list[Stage]:
    """Return the stages that the job's workflow has."""
    workflow = job.workflow
    tuned = [train.STAGE] * (workflow.tuning is not None) + [merge.STAGE] * workflow.merges
    return [dataset.STAGE, *tuned, *export.stages(job)]


@contextmanager
def _writing(job: Job) -> Iterator[None]:
    with run_lock(job.project):
        try:
            yield
        finally:
            job.hashes.save()


def _run_steps(job: Job, last: str, *, source: Path | None = None, update_lock: bool = False) -> None:
    if last in ("train", "merge") and job.workflow.tuning is None:
        where, hint = job.workflow.where("passes"), "`edgetune finetune` exports the base model as it is"
        raise failure(f"there is nothing to {last}: the workflow has no fine-tuning pass", where=where, hint=hint)
    if last == "merge" and not job.workflow.merges:
        where, hint = job.workflow.where("passes"), "`edgetune export` leaves the adapter beside the exported model"
        raise failure("there is nothing to merge: the workflow has no MergeAdapterWeights pass", where=where, hint=hint)
    stages = [stage for stage in stages_of(job) if STEPS.index(_step(stage)) <= STEPS.index(last)]
    steps = [stage.name for stage in stages if stage is not dataset.STAGE]
    job.ahead = (*steps, "verify") if last == "verify" else tuple(steps)
    _run_download(job, last, source=source, update_lock=update_lock)
    for stage in stages:
        _run_stage(job, stage)
        if stage is dataset.STAGE:
            dataset.check_rejected(job)


def _step(stage: Stage) -> str:
    return stage.name if stage.name in STEPS else export.NAME


def _run_verify(job: Job, limits: verify.Limits, *, repeat: bool = False) -> None:
    if model := verify.exported(job, job.keys["export"]):
        verify.verify(job, model, limits, repeat=repeat)


def _damage(job: Job, model: Path) -> list[str]:
    """Return what was changed behind the steps' back, of the results that would not be made again anyway.

    A missing adapter counts: nothing else can show that the model was trained. Other missing results are soon made.
    """
    current = []
    for stage in stages_of(job):
        key = job.keys[stage.name] = key_of(stage.name, stage.format, stage.inputs(job))
        folder = verify.exported(job, key) if stage.name == export.NAME else job.project.stage_folder(stage.name)
        manifest = read_manifest(folder) if folder else None
        if folder and manifest and manifest["key"] == key and stage is not dataset.STAGE:
            current.append(folder)
        elif folder and manifest is None and stage is train.STAGE:
            return [f"{job.project.name(folder)} is gone, which {job.project.name(model)} was made from"]
    return verify.changed_files(job, current)


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
    for place in _places(job, stage):
        recover(place)
    inputs = stage.inputs(job)
    key = job.keys[stage.name] = key_of(stage.name, stage.format, inputs)
    if any(is_current(place, key, job.hashes) for place in _places(job, stage)):
        job.progress.skip(stage.name)
        return
    if stage.name in job.ahead:
        preflight.check(job, job.ahead[job.ahead.index(stage.name) :])
        job.ahead = ()
    with (
        job.progress.running(stage.name, job.project.log(stage.name)),
        building(folder, stage.name, key, inputs, job.hashes) as build,
    ):
        build.metrics |= stage.build(job, build.folder)


def training_key(job: Job) -> str:
    """Return the key of the training with the base model and the data that are there; empty when they are not."""
    stage = dataset.STAGE
    if not download.is_current(job):
        return ""
    job.keys[stage.name] = key_of(stage.name, stage.format, stage.inputs(job))
    if not is_current(job.project.stage_folder(stage.name), job.keys[stage.name], job.hashes):
        return ""
    return key_of(train.STAGE.name, train.STAGE.format, train.STAGE.inputs(job))


def _places(job: Job, stage: Stage) -> list[Path]:
    """Return where a stage's output may be: verify moves the exported model on."""
    return verify.model_folders(job) if stage.name == export.NAME else [job.project.stage_folder(stage.name)]


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
    states += [_stage_state(job, stage) for stage in stages_of(job)]
    changed = next((state.step for state in states[1:] if state.state != "up to date"), "")
    states.append(_verify_state(job, changed))
    job.hashes.save()
    return states


def stale(job: Job, last: str = export.NAME) -> str:
    """Say which results of the steps up to ``last`` are older than what they depend on; empty when none is."""
    found = []
    for state in status(job):
        if state.state == "stale":
            found.append(f"{state.step}: {state.detail}")
        if state.step == last:
            break
    return "; ".join(found)


def _verify_state(job: Job, changed: str) -> StepState:
    model, verdict = verify.exported(job, job.keys["export"]), verify.read_verdict(job)
    refused = job.project.refused_model
    key = (read_manifest(refused) or {}).get("key")
    if verdict and key == verdict["export_key"] and not verdict["passed"] and model in (None, refused):
        failed = [check["title"] for check in verdict["checks"] if check["passed"] is False]
        return StepState("verify", "failed", job.project.name(refused), "failed: " + ", ".join(failed))
    name = job.project.name(model or job.project.stage_folder("verify"))
    if verdict is None:
        return StepState("verify", "missing", name)
    if changed or model is None or verify.current_verdict(job, model, verify.Limits()) is None:
        return StepState("verify", "stale", name, f"changed: {changed or 'edgetune'}")
    return StepState("verify", "up to date", name, _summary(verdict))


def _stage_state(job: Job, stage: Stage) -> StepState:
    folder = job.project.stage_folder(stage.name)
    try:
        inputs = stage.inputs(job)
    except EdgetuneError as error:
        job.keys[stage.name] = ""
        return StepState(stage.name, "blocked", job.project.name(folder), error.problems[0].message)
    key = job.keys[stage.name] = key_of(stage.name, stage.format, inputs)
    if stage.name == export.NAME:
        folder = verify.exported(job, key) or verify.exported(job) or folder
    name, manifest = job.project.name(folder), read_manifest(folder)
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
