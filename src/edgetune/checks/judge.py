"""Judge what the checks found: whether it passes, a sentence with the numbers, and the likely cause where it fails.

Nothing is examined here. ``edgetune export --auto`` goes by the same judgements as ``edgetune verify``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetune.backends import exported_from
from edgetune.checks.answers import ExportFindings, Losses
from edgetune.checks.conversion import ConversionFindings
from edgetune.checks.merge import MergeFindings
from edgetune.examples import has_labels
from edgetune.scores import SIGNIFICANT, compare_hits, compare_losses, perplexity
from edgetune.stages import Job, read_manifest

MAX_RISE = 5.0  # per cent of perplexity
_LOGIT_TOLERANCE = 1e-3
_ENDED = 0.99
_ROWS_FOR_A_TEST = 6  # with fewer, the paired tests never come below 0.05, whatever the models say
_NAMED = 3  # tensors
_FEW_STEPS = 10
_LEARNED, _MERGED = "the adapter learned", "the merge is exact"


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


def files(damage: Sequence[str]) -> Check:
    """Judge files that are not what a step wrote."""
    cause = (
        "something else wrote or deleted files: move away what was added; `edgetune finetune` makes again what can be "
        "made again"
    )
    return Check("files", "the files are unchanged", passed=False, summary="; ".join(damage), cause=cause)


def not_tuned() -> Iterator[Check]:
    """Yield the checks that need an adapter, for a workflow without one."""
    for name, title in (("adapter", _LEARNED), ("merge", _MERGED)):
        yield Check(name, title, None, "the workflow has no fine-tuning pass")


def learned(job: Job, merge: MergeFindings, losses: Losses, role: str) -> Check:
    """Judge whether training changed the adapter, and for the better; ``role``: of the data the losses are of."""
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
    passed = merge.matrices > 0 and not merge.zero and losses.adapter < losses.base
    numbers = {"base_loss": losses.base, "adapter_loss": losses.adapter, "zero_matrices": merge.zero}
    return Check("adapter", _LEARNED, passed, summary, "" if passed else cause, numbers)


def merged(job: Job, merge: MergeFindings, losses: Losses, found: ExportFindings) -> Check:
    """Judge the weights, and whether the merged model knows what the adapter knows on the 4-bit base of QLoRA."""
    loss = found.merged_total / found.tokens
    summary = (
        f"{merge.matrices} matrices are as the adapter makes them to {merge.largest_ulps:.2f} units in the last place, "
        f"{merge.others} tensors are the base model's; "
        f"logits differ from the adapter's by up to {found.adapter_distance:.2%}, "
        f"loss {losses.adapter:.4f} → {loss:.4f}"
    )
    cause = ""
    if not 100 * math.expm1(loss - losses.adapter) <= MAX_RISE:
        cause = "the merged model is worse than its adapter: its weights are rounded to the base model's type"
        if job.workflow.tuning and job.workflow.tuning.type == "QLoRA":
            cause += "; train with LoRA instead of QLoRA"
    if merge.wrong:
        summary = _some(merge.wrong)
        cause = (
            "another base model or adapter was merged, or the merged weights were changed: "
            "delete gen-model/merged and run `edgetune finetune`"
        )
    numbers = {
        "matrices": merge.matrices,
        "other_tensors": merge.others,
        "wrong": len(merge.wrong),
        "largest_ulps": merge.largest_ulps,
        "adapter_logit_distance": found.adapter_distance,
        "merged_loss": loss,
    }
    return Check("merge", _MERGED, not cause, summary, cause, numbers)


def _some(wrong: Sequence[str]) -> str:
    more = len(wrong) - _NAMED
    return "; ".join(wrong[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def beside(found: MergeFindings) -> Check:
    """Judge the file of the adapter."""
    summary = f"{found.matrices} pairs of matrices are the trained ones, scaled, to the last bit"
    cause = ""
    if found.wrong:
        summary = _some(found.wrong)
        cause = "the file beside the model was made of another adapter: run `edgetune export` again"
    numbers = {"matrices": found.matrices, "wrong": len(found.wrong)}
    return Check("merge", "the adapter beside the model is exact", not cause, summary, cause, numbers)


def converted(found: ConversionFindings) -> Check:
    """Judge what the builder made of the architecture."""
    passed = found.difference <= _LOGIT_TOLERANCE
    summary = (
        f"the first {found.layers} of {found.of_layers} layers in fp32: "
        f"logits differ by {found.difference:.1e} of the largest, "
        f"{found.same_top:.1%} of {found.positions:,} positions agree (texts of up to {found.longest:,} tokens)"
    )
    cause = "onnxruntime-genai's builder does not translate this architecture faithfully: choose another base model"
    return Check("conversion", "the conversion is exact", passed, summary, "" if passed else cause, asdict(found))


def quantised(job: Job, found: ExportFindings, allowed: float) -> Check:
    """Judge what the export costs: ``allowed`` are points of accuracy for labels, per cent of perplexity otherwise."""
    before = exported_from(job)
    drop, sentence, p, numbers = _cost(found, labels=has_labels(job))
    agreement, divergence = found.same_top / found.tokens, found.divergence / found.tokens
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


def stopping(job: Job, found: ExportFindings, faults: Sequence[str]) -> Check:
    """Judge how answers end, and token ids, of which ``faults`` are known."""
    total = len(found.asked)
    before, after = (
        [answer.stop_reason == "stop" for answer in answers] for answers in (found.merged_answers, found.onnx_answers)
    )
    ended_before, ended, cause = sum(before), sum(after), ""
    if job.workflow.tuning is None:  # nobody taught it to end within so many tokens
        run_on = ended < ended_before and compare_hits(before, after).p < SIGNIFICANT
    else:
        run_on = ended < max(ended_before, _ENDED * total)
    if run_on:
        longer = "train for longer, or " if job.workflow.tuning else ""
        cause = f"answers run on: {longer}export with less loss (`edgetune export --auto`)"
    if faults:
        cause = (
            "applications would give the model other ids than it was trained with, or run past its answers: "
            "check generation_config.json of the base model, or choose another one"
        )
    ends = f"{ended} of {total} answers end with an end token ({exported_from(job)}: {ended_before})"
    summary = "; ".join([*faults, ends])
    numbers = {"asked": total, "ended": ended, "merged_ended": ended_before, "faults": list(faults)}
    return Check("tokens", "tokens and stopping", not cause, summary, cause, numbers)
