"""Prove that the exported model is the one that was trained, then publish it.

Reads the base model, ``gen-model/adapter/``, ``merged/`` and ``onnx.candidate/``; a model that passes becomes
``onnx/``, another one ``onnx.rejected/``. What was found is in ``gen-model/verify.json``.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgetune import adapters, download
from edgetune.backends import exported_from
from edgetune.checks.adapter import compare_adapter
from edgetune.checks.answers import ExportFindings, Losses, adapter_losses, compare_export
from edgetune.checks.conversion import ConversionFindings, compare_conversion
from edgetune.checks.merge import MergeFindings, compare_weights
from edgetune.checks.tokens import token_faults
from edgetune.errors import GateError, Problem
from edgetune.examples import Example, examined_set, examples, has_labels
from edgetune.export import source_folder
from edgetune.scores import SIGNIFICANT, compare_hits, compare_losses, perplexity
from edgetune.stages import (
    Job,
    changes,
    key_of,
    partial_folder,
    peak_memory_mb,
    publish,
    published,
    read_json,
    read_manifest,
    reset_peak_memory,
    versions,
    write_json,
)

_FORMAT = 1
_ROWS = 256
_MAX_DROP = 2.0  # points of accuracy
_MAX_RISE = 5.0  # per cent of perplexity
_LOGIT_TOLERANCE = 1e-3
_ENDED = 0.99
_ROWS_FOR_A_TEST = 6  # with fewer, the paired tests never come below 0.05, whatever the models say
_NAMED = 3  # tensors
_WORDS = {True: "passed", False: "FAILED", None: "n/a"}
_FEW_STEPS = 10
_LEARNED, _MERGED = "the adapter learned", "the merge is exact"
_NO_TUNING = "the workflow has no fine-tuning pass"


@dataclass(frozen=True)
class Limits:
    """How much is examined and what is let through; None: as when this model was verified last, or the default."""

    rows: int | None = None
    """Most rows of the evaluation data."""
    max_drop: float | None = None
    """What int4 may cost: points of accuracy for labels, per cent of perplexity otherwise."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    title: str
    passed: bool | None
    """None: it does not apply."""
    summary: str
    cause: str = ""
    """The likely cause of a failure, and what to do."""
    numbers: dict[str, Any] = field(default_factory=dict)


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
    job: Job, model: Path, limits: Limits, damage: Sequence[str] = (), judge: Callable[[Check], Check] | None = None
) -> dict[str, Any]:
    """Return the verdict on the model in ``model``, and put it where the verdict wants it.

    ``judge`` has the last word on each check.
    """
    reset_peak_memory()
    started, checks = time.monotonic(), []
    job.hashes.forget()
    steps = [job.project.stage_folder(stage) for stage in _tuning_stages(job)]
    damage = damage or changed_files(job, [*steps, model])
    for found in [_files(damage)] if damage else _checks(job, model, limits):
        check = judge(found) if judge else found
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
    default = _MAX_DROP if has_labels(job) else _MAX_RISE
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
    """Return the files in these folders that are not what a step wrote, and those of the base that are not locked."""
    name = job.project.name
    found = [f"{name(path)} is not the locked one" for path in download.changed_files(job)]
    for folder in folders:
        outputs = (read_manifest(folder) or {"outputs": {}})["outputs"]
        found += [f"{name(folder / file)} was changed or removed" for file in changes(folder, outputs, job.hashes)]
    return found


def _files(damage: Sequence[str]) -> Check:
    cause = "something else wrote or deleted files; `edgetune finetune` makes again what can be made again"
    return Check("files", "the files are unchanged", bool(not damage), "; ".join(damage), cause)


def _checks(job: Job, model: Path, limits: Limits) -> Iterator[Check]:
    role = examined_set(job)
    rows = examples(job, role, limits.rows)
    if job.workflow.tuning is None:
        yield Check("adapter", _LEARNED, None, _NO_TUNING)
        yield Check("merge", _MERGED, None, _NO_TUNING)
        found = compare_export(job, model, rows)
    elif not job.workflow.merges:
        files = compare_adapter(job.project.stage_folder("train"), adapters.own(model))
        yield _learned(job, files, adapter_losses(job, rows), role)
        yield _beside(files)
        found = compare_export(job, model, rows)
    else:
        merge = compare_weights(job.base_folder, *map(job.project.stage_folder, ("train", "merge")))
        losses = adapter_losses(job, rows)
        yield _learned(job, merge, losses, role)
        found = compare_export(job, model, rows, losses.logits)
        yield _merged(job, merge, losses, found)
    work = partial_folder(job.project.results / "verify")
    yield _converted(compare_conversion(job, source_folder(job), work))
    yield quantised(job, found, limits)
    yield stopping(job, model, found, rows)


def _learned(job: Job, merge: MergeFindings, losses: Losses, role: str) -> Check:
    summary = (
        f"loss on completions of the {role} data {losses.base:.4f} → {losses.adapter:.4f}; "
        f"{merge.matrices - merge.zero} of {merge.matrices} matrices hold values"
    )
    cause = "the adapter holds next to nothing: raise learning_rate or num_train_epochs"
    if not merge.zero:
        cause = "training made it worse: lower learning_rate, and look at the loss in gen-model/adapter/loss.json"
    steps = (read_manifest(job.project.stage_folder("train")) or {"metrics": {}})["metrics"].get("steps")
    if steps is not None and steps < _FEW_STEPS:
        cause = f"there were {steps} steps of training: raise num_train_epochs, or lower the rows of a step"
    passed = merge.matrices > 0 == merge.zero and losses.adapter < losses.base
    numbers = {"base_loss": losses.base, "adapter_loss": losses.adapter, "zero_matrices": merge.zero}
    return Check("adapter", _LEARNED, passed, summary, "" if passed else cause, numbers)


def _merged(job: Job, merge: MergeFindings, losses: Losses, found: ExportFindings) -> Check:
    """Judge the weights, and whether the merged model knows what the adapter knows on the 4-bit base of QLoRA."""
    loss = found.merged_total / found.tokens
    summary = (
        f"{merge.matrices} matrices are as the adapter makes them to {merge.largest_ulps:.2f} units in the last place, "
        f"{merge.others} tensors are the base model's; "
        f"logits differ from the adapter's by up to {found.adapter_distance:.2%}, "
        f"loss {losses.adapter:.4f} → {loss:.4f}"
    )
    cause = ""
    if not 100 * math.expm1(loss - losses.adapter) <= _MAX_RISE:
        cause = "the merged model is worse than its adapter: its weights are rounded to the base model's type"
        if job.workflow.tuning and job.workflow.tuning.type == "QLoRA":
            cause += "; train with LoRA instead of QLoRA"
    if merge.wrong:
        more = len(merge.wrong) - _NAMED
        summary = "; ".join(merge.wrong[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        cause = (
            "another base model or adapter was merged, or the merged weights were changed: "
            "delete gen-model/merged and run `edgetune finetune`"
        )
    numbers = {
        "matrices": merge.matrices,
        "other_tensors": merge.others,
        "wrong": len(merge.wrong or ()),
        "largest_ulps": merge.largest_ulps,
        "adapter_logit_distance": found.adapter_distance,
        "merged_loss": loss,
    }
    return Check("merge", _MERGED, not cause, summary, cause, numbers)


def _beside(found: MergeFindings) -> Check:
    """Judge the file of the adapter."""
    more = len(found.wrong or ()) - _NAMED
    summary = f"{found.matrices} pairs of matrices are the trained ones, scaled, to the last bit"
    cause = ""
    if found.wrong:
        summary = "; ".join(found.wrong[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        cause = "the file beside the model was made of another adapter: run `edgetune export` again"
    numbers = {"matrices": found.matrices, "wrong": len(found.wrong or ())}
    return Check("merge", "the adapter beside the model is exact", not cause, summary, cause, numbers)


def _converted(found: ConversionFindings) -> Check:
    passed = found.difference <= _LOGIT_TOLERANCE
    summary = (
        f"the first {found.layers} of {found.of_layers} layers in fp32: "
        f"logits differ by {found.difference:.1e} of the largest, "
        f"{found.same_top:.1%} of {found.positions:,} positions agree (texts of up to {found.longest:,} tokens)"
    )
    cause = "onnxruntime-genai's builder does not translate this architecture faithfully: choose another base model"
    return Check("conversion", "the conversion is exact", passed, summary, "" if passed else cause, asdict(found))


def quantised(job: Job, found: ExportFindings, limits: Limits) -> Check:
    """Judge what the export costs."""
    before = exported_from(job)
    drop, sentence, p, numbers = _cost(found, labels=has_labels(job))
    agreement, divergence = found.same_top / found.tokens, found.divergence / found.tokens
    allowed = limits.max_drop or 0.0
    too_few = len(found.onnx_loss) < _ROWS_FOR_A_TEST
    passed = found.is_finite and not (drop > allowed and (p < SIGNIFICANT or too_few))
    verdict = "too few rows to tell from noise" if too_few else "more than noise" if p < SIGNIFICANT else "noise"
    summary = (
        f"{agreement:.1%} of {found.tokens:,} tokens agree with {before}, mean KL {divergence:.4f}; "
        f"{sentence} (p = {p:.2g}: {verdict}; a loss of {allowed:g} is let through)"
    )
    cause = (
        "the export costs too much: `edgetune export --auto` looks for settings that do not; or let it pass with "
        "`edgetune verify --max-drop`"
    )
    if not found.is_finite:
        summary, cause = "the logits are not all numbers", "the exported model is damaged: run `edgetune export` again"
    numbers |= {"top1_agreement": agreement, "mean_kl": divergence, "drop": drop, "p": p, "rows": len(found.onnx_loss)}
    title = "quantisation is harmless"
    return Check("quantisation", title, passed, summary, "" if passed else cause, numbers)


def _cost(found: ExportFindings, *, labels: bool) -> tuple[float, str, float, dict[str, Any]]:
    """Return what the export costs in the task's metric: the drop, a sentence, the p-value, and the numbers."""
    if labels:
        before, after = found.hits(found.merged_answers), found.hits(found.onnx_answers)
        one, other = (sum(hits) / len(hits) for hits in (before, after))
        drop, p = 100 * (one - other), compare_hits(before, after).p
        sentence = f"accuracy {one:.1%} → {other:.1%}"
        return drop, sentence, p, {"merged_accuracy": one, "onnx_accuracy": other}
    losses = found.merged_loss, found.onnx_loss
    one, other = (perplexity(total, found.tokens) for total in (found.merged_total, found.onnx_total))
    sentence = f"perplexity {one:.3f} → {other:.3f}"
    numbers = {"merged_perplexity": one, "onnx_perplexity": other}
    return 100 * (other / one - 1), sentence, compare_losses(*losses).p, numbers


def stopping(job: Job, model: Path, found: ExportFindings, rows: list[Example]) -> Check:
    """Judge token ids, and how answers end."""
    faults = token_faults(job, source_folder(job), model, rows)
    total = len(found.asked)
    before, after = (
        [answer.stop_reason == "stop" for answer in answers] for answers in (found.merged_answers, found.onnx_answers)
    )
    merged, onnx, cause = sum(before), sum(after), ""
    if job.workflow.tuning is None:  # nobody taught it to end within so many tokens
        run_on = onnx < merged and compare_hits(before, after).p < SIGNIFICANT
    else:
        run_on = onnx < max(merged, _ENDED * total)
    if run_on:
        longer = "train for longer, or " if job.workflow.tuning else ""
        cause = f"answers run on: {longer}export with less loss (`edgetune export --auto`)"
    if faults:
        cause = (
            "applications would give the model other ids than it was trained with, or run past its answers: "
            "check generation_config.json of the base model, or choose another one"
        )
    summary = "; ".join([*faults, f"{onnx} of {total} answers end with an end token ({exported_from(job)}: {merged})"])
    numbers = {"asked": total, "ended": onnx, "merged_ended": merged, "faults": faults}
    return Check("tokens", "tokens and stopping", not cause, summary, cause, numbers)
