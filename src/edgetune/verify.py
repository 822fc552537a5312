"""Prove that the exported model is the one that was trained, then publish it.

Reads the base model, ``gen-model/adapter/``, ``merged/`` and ``onnx.candidate/``; a model that passes becomes
``onnx/``, another one ``onnx.rejected/``. What was found is in ``gen-model/verify.json``.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune import adapters, download
from edgetune.backends import exported_from
from edgetune.checks import judge
from edgetune.checks.adapter import compare_adapter
from edgetune.checks.answers import adapter_losses, compare_export
from edgetune.checks.conversion import compare_conversion
from edgetune.checks.judge import MAX_RISE, Check
from edgetune.checks.merge import compare_weights
from edgetune.checks.tokens import token_faults
from edgetune.errors import GateError, Problem
from edgetune.examples import examined_set, examples, has_labels
from edgetune.export import source_folder
from edgetune.memory import peak_memory_mb, reset_peak_memory
from edgetune.stages import (
    Job,
    additions,
    changes,
    key_of,
    partial_folder,
    publish,
    published,
    read_json,
    read_manifest,
    versions,
    write_json,
)

_FORMAT = 1
_ROWS = 256
_MAX_DROP = 2.0  # points of accuracy
_WORDS = {True: "passed", False: "FAILED", None: "n/a"}


@dataclass(frozen=True)
class Limits:
    """How much is examined and what is let through; None: as when this model was verified last, or the default."""

    rows: int | None = None
    """Most rows of the evaluation data."""
    max_drop: float | None = None
    """What int4 may cost: points of accuracy for labels, per cent of perplexity otherwise."""


def model_folders(job: Job) -> list[Path]:
    """Return where an exported model may be: not verified yet, passed, or set aside."""
    return [job.project.stage_folder("export"), job.project.stage_folder("verify"), job.project.refused_model]


def exported(job: Job, key: str | None = None) -> Path | None:
    """Return the folder of the exported model, of the one with this key if given; None when there is none."""
    for folder in model_folders(job):
        manifest = read_manifest(folder)
        if manifest is not None and key in (None, manifest["key"]):
            return folder
    return None


def read_verdict(job: Job) -> dict[str, Any] | None:
    """Return what the last verification found; None when there is nothing that can be read."""
    content = read_json(job.project.verdict)
    needed = {"key", "export_key", "passed", "checks", "limits", "limits_of"}
    return content if content is not None and needed <= content.keys() else None


def current_verdict(job: Job, model: Path, limits: Limits, damage: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the verdict on the model in ``model`` if it is still true."""
    verdict = read_verdict(job)
    if verdict is None or verdict["key"] != _key(job, model, limits, damage):
        return None
    return verdict if model == _destination(job, passed=verdict["passed"]) else None


def verify(job: Job, model: Path, limits: Limits, damage: Sequence[str] = (), *, repeat: bool = False) -> None:
    """Examine the exported model in ``model`` and publish it or set it aside.

    ``damage``: what is known to be changed already; then nothing else is examined. ``repeat``: say what was found
    earlier if that is still true. Raises GateError when it fails.
    """
    limits = settled(job, model, limits)
    verdict = current_verdict(job, model, limits, damage)
    if verdict is None:
        with job.progress.running("verify", job.project.log("verify")):
            verdict = examine(job, model, limits, damage)
    elif verdict["passed"]:
        job.progress.skip("verify")
        for check in verdict["checks"] if repeat else ():
            job.progress.say(f"{'verify':<9} {_WORDS[check['passed']]}: {check['title']}: {check['summary']}")
    if not verdict["passed"]:
        raise _refusal(job, verdict)


def examine(
    job: Job, model: Path, limits: Limits, damage: Sequence[str] = (), revised: Callable[[Check], Check] | None = None
) -> dict[str, Any]:
    """Return the verdict on the model in ``model``, and put it where the verdict wants it.

    ``revised`` has the last word on each check.
    """
    reset_peak_memory()
    started, checks = time.monotonic(), []
    job.hashes.forget()
    steps = [job.project.stage_folder(stage) for stage in _tuning_stages(job)]
    damage = damage or changed_files(job, [*steps, model])
    for found in [judge.files(damage)] if damage else _checks(job, model, limits):
        check = revised(found) if revised else found
        job.progress.say(f"{_WORDS[check.passed]}: {check.title}: {check.summary}")
        checks.append(check)
    passed = all(check.passed is not False for check in checks)
    export_key = str((read_manifest(model) or {}).get("key"))
    verdict = {
        "key": _key(job, model, limits, damage),
        "export_key": export_key,
        "passed": passed,
        "model": job.project.name(_destination(job, passed=passed)),
        "limits": asdict(limits),
        "limits_of": ((read_verdict(job) or {}).get("limits_of") or {}) | {export_key: asdict(limits)},
        "checks": [asdict(check) for check in checks],
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": peak_memory_mb(),
        "versions": versions(),
    }
    _move(job, model, passed=passed)
    write_json(job.project.verdict, verdict)
    return verdict


def _destination(job: Job, *, passed: bool) -> Path:
    return job.project.stage_folder("verify") if passed else job.project.refused_model


def _move(job: Job, model: Path, *, passed: bool) -> None:
    """Put the model where the verdict wants it. An earlier model that passed stays until another one does."""
    destination = _destination(job, passed=passed)
    if model != destination:
        publish(model, destination)
    if passed:
        for older in model_folders(job):
            if older != destination:
                shutil.rmtree(older, ignore_errors=True)


def _key(job: Job, model: Path, limits: Limits, damage: Sequence[str]) -> str:
    folders = {stage: published(job.project.stage_folder(stage)) for stage in ("data", *_tuning_stages(job))}
    content = {
        "base": download.digests(job, weights=True),
        **folders,
        "export": [(read_manifest(model) or {}).get("key"), published(model)],
        "limits": asdict(settled(job, model, limits)),
        "damage": list(damage),
    }
    return key_of("verify", _FORMAT, content)


def _tuning_stages(job: Job) -> tuple[str, ...]:
    return ("train",) * (job.workflow.tuning is not None) + ("merge",) * job.workflow.merges


def settled(job: Job, model: Path, limits: Limits) -> Limits:
    """Fill in what was not given: as in the last verdict on the same model, or the defaults."""
    known = (read_verdict(job) or {}).get("limits_of") or {}
    last = Limits(**known.get((read_manifest(model) or {}).get("key"), {}))
    default = _MAX_DROP if has_labels(job) else MAX_RISE
    return Limits(
        rows=limits.rows or last.rows or _ROWS,
        max_drop=next(drop for drop in (limits.max_drop, last.max_drop, default) if drop is not None),
    )


def _refusal(job: Job, verdict: dict[str, Any]) -> GateError:
    where = job.project.name(job.project.verdict)
    failed = [check for check in verdict["checks"] if check["passed"] is False]
    problems = [Problem(f"failed: {check['title']}: {check['summary']}", where, check["cause"]) for check in failed]
    before = exported_from(job)
    aside = f"the model is set aside in {verdict['model']}"
    ask = f"edgetune infer --backend {before}" + (" --engine olive" if job.project.olive else "")
    return GateError([*problems, Problem(aside, hint=f"`{ask}` asks the model before the export")])


def changed_files(job: Job, folders: Sequence[Path]) -> list[str]:
    """Return what of these folders is not what a step wrote, and the files of the base that are not locked."""
    name = job.project.name
    found = [f"{name(path)} is not the locked one" for path in download.changed_files(job)]
    for folder in folders:
        outputs = (read_manifest(folder) or {"outputs": {}})["outputs"]
        found += [f"{name(folder / file)} was changed or removed" for file in changes(folder, outputs, job.hashes)]
        found += [f"{name(folder / file)} was added" for file in additions(folder, outputs)]
    return found


def _checks(job: Job, model: Path, limits: Limits) -> Iterator[Check]:
    role = examined_set(job)
    rows = examples(job, role, limits.rows)
    if job.workflow.tuning is None:
        yield from judge.not_tuned()
        found = compare_export(job, model, rows)
    elif not job.workflow.merges:
        files = compare_adapter(job.project.stage_folder("train"), adapters.own(model))
        yield judge.learned(job, files, adapter_losses(job, rows), role)
        yield judge.beside(files)
        found = compare_export(job, model, rows)
    else:
        merge = compare_weights(job.base_folder, *map(job.project.stage_folder, ("train", "merge")))
        losses = adapter_losses(job, rows)
        yield judge.learned(job, merge, losses, role)
        found = compare_export(job, model, rows, losses.logits)
        yield judge.merged(job, merge, losses, found)
    work = partial_folder(job.project.results / "verify")
    yield judge.converted(compare_conversion(job, source_folder(job), work))
    yield judge.quantised(job, found, limits.max_drop or 0.0)
    yield judge.stopping(job, found, token_faults(job, source_folder(job), model, rows))
