"""Find the smallest int4 model that is good and fast enough: ``edgetune export --auto``.

Reads the data and ``gen-model/merged/``; writes the settings of the first rung that holds into the workflow file.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune import adapters, config, export, olive_process, verify
from edgetune.architectures import BUILDERS_BLOCK
from edgetune.checks import judge
from edgetune.checks.answers import compare_export
from edgetune.checks.tokens import token_faults
from edgetune.errors import GateError, Problem, failure
from edgetune.evaluate import speed
from edgetune.examples import Example, examined_set, examples, has_labels
from edgetune.generation import Answer
from edgetune.memory import release_memory
from edgetune.onnx_backend import OnnxBackend
from edgetune.project import Project
from edgetune.schema import Workflow
from edgetune.source import Edit, JsonSource, write_edits
from edgetune.stages import Job, partial_folder, read_json, run_lock

_CALIBRATION, _CALIBRATION_ROWS = "calibration_data", 128


@dataclass(frozen=True)
class Rung:
    """A way to export, and the keys of the ModelBuilder pass that ask for it."""

    name: str
    settings: dict[str, Any]
    gptq: bool = False
    """Whether a Gptq pass goes before that pass."""


@dataclass(frozen=True)
class Wanted:
    """What a rung must hold."""

    max_drop: float | None = None
    """Points of accuracy for labels, per cent of perplexity otherwise; None: what ``edgetune verify`` lets through."""
    max_ms_per_token: float | None = None
    """Milliseconds for each token of an answer; None: any."""


@dataclass(frozen=True)
class Measured:
    """What a rung turned out to be."""

    rung: str
    settings: dict[str, Any]
    bytes: int
    ms_per_token: float
    """Milliseconds for each token of an answer."""
    numbers: dict[str, Any]
    """What verification's quantisation check counted: accuracy or perplexity, agreement, divergence."""
    faults: list[str]
    """Why it does not hold; empty when it does."""


def rungs(job: Job) -> Iterator[Rung]:
    """Yield what is tried: smallest first, and at last what takes long to make and more than the builder."""
    given = job.workflow.builder.int4_algo_config
    plain = "default" if given else None
    shape = read_json(export.source_folder(job) / "config.json") or {}
    if shape.get("tie_word_embeddings"):
        plain = "rtn"  # the one of the two that keeps embeddings which are the head's weights in 4 bits as well
    int4: dict[str, Any] = {"precision": "int4"}
    if job.workflow.builder.int4_is_symmetric is False:  # of an earlier climb, or larger than need be
        int4 |= {"int4_is_symmetric": True}
    block = job.workflow.builder.int4_block_size or BUILDERS_BLOCK
    if any(size % block for size in (shape.get("hidden_size", 0), shape.get("intermediate_size", 0))):
        int4 |= {"int4_block_size": BUILDERS_BLOCK}  # neither shared embeddings nor Gptq can end with a part of a block
    settings = int4 | ({"int4_algo_config": plain} if plain else {})
    yield Rung("int4", settings)
    yield Rung("int4, last layer int8", int4 | {"int4_algo_config": "rtn_last"})
    yield Rung("k_quant_mixed", int4 | {"int4_algo_config": "k_quant_mixed", "int4_is_symmetric": False})
    if olive_process.is_installed() and not adapters.is_beside(job):
        yield Rung("Gptq", settings, gptq=True)


def check(job: Job) -> None:
    """Raise EdgetuneError when the file has passes that no rung goes with."""
    if job.workflow.gptq:
        where, hint = job.workflow.where_in_pass("Gptq"), "remove the pass to start from the first rung again"
        raise failure("the workflow has a Gptq pass, which is the last rung of the ladder", where=where, hint=hint)
    if len(job.workflow.exporting) > 1:
        other = next(step.type for step in job.workflow.exporting.values() if step.type != "ModelBuilder")
        where, hint = job.workflow.where_in_pass(other), "remove the pass to climb, or export without --auto"
        raise failure(f"the ladder has no rungs with a {other} pass", where=where, hint=hint)


def climb(job: Job, wanted: Wanted) -> list[Measured]:
    """Build and measure rungs until one holds; then the workflow file has its settings.

    The merged model must be up to date. Without a rung that holds, the last one measured has faults and nothing has
    changed. Raises EdgetuneError when a rung cannot be built.
    """
    work, found = partial_folder(job.project.results / "ladder"), list[Measured]()
    file = job.project.config.resolve()  # a link stays one
    candidate = file.with_name(file.name + ".tmp")
    with run_lock(job.project), job.progress.running("ladder", job.project.log("ladder")):
        try:
            if not olive_process.is_installed():
                job.progress.say("Gptq is not tried: Olive is not installed (edgetune's extra olive)")
            rows = examples(job, examined_set(job), verify.settled(job, work, verify.Limits()).rows)
            trials = _Trials(rows, work, wanted)
            for rung in rungs(job):
                with_settings(job.project, rung, file, candidate)  # before any of them takes its time
            for rung in rungs(job):
                trial = replace(job, workflow=with_settings(job.project, rung, file, candidate))
                found.append(one := trials.measure(trial, rung))
                job.progress.say(f"{rung.name}: {'; '.join(one.faults) or 'holds'}")
                if not one.faults:
                    if candidate.read_bytes() != file.read_bytes():
                        candidate.replace(file)
                    break
        finally:
            candidate.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
    return found


def with_settings(project: Project, rung: Rung, file: Path, candidate: Path) -> Workflow:
    """Write the workflow file with the rung's settings, and read it; all else in it stays as it is."""
    source = JsonSource(file, project.name(project.config))
    name, step = next((name, step) for name, step in source.data["passes"].items() if step["type"] == "ModelBuilder")
    edits = []
    for key, value in rung.settings.items():
        if key not in step:
            edits.append(source.adding_after(("passes", name, "precision"), (key, value)))
        elif step[key] != value:
            edits.append(source.replacing(("passes", name, key), value))
    if rung.gptq:
        workflow = config.load(project)
        block = rung.settings.get("int4_block_size") or workflow.builder.int4_block_size or BUILDERS_BLOCK
        edits += _with_gptq(workflow, source, name, block)
    write_edits(source, edits, file, candidate)
    return config.load(project, candidate)


def _with_gptq(workflow: Workflow, source: JsonSource, builder: str, block: int) -> list[Edit]:
    """Return the edits that put a Gptq pass before the builder's, and the data it looks at behind the others."""
    step = {"type": "Gptq", "group_size": block, "data_config": _CALIBRATION}
    edits = [source.adding_before(("passes", builder), ("gptq", step))]
    if _CALIBRATION not in (data.name for data in workflow.data_configs):
        given = source.data["data_configs"][workflow.data_configs.index(workflow.train_data)]
        rows = min(workflow.train_data.pre_process_data_config.max_samples or _CALIBRATION_ROWS, _CALIBRATION_ROWS)
        some = given["pre_process_data_config"] | {"max_samples": rows}
        last = ("data_configs", len(workflow.data_configs) - 1)
        edits.append(source.adding_after(last, given | {"name": _CALIBRATION, "pre_process_data_config": some}))
    return edits


@dataclass
class _Trials:
    """What every rung is examined with."""

    rows: list[Example]
    work: Path
    wanted: Wanted
    merged_answers: list[Answer] | None = None
    """What the model before the export says, which is the same for every rung."""

    def measure(self, job: Job, rung: Rung) -> Measured:
        """Export as the job's workflow says, and examine the model."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        made = export.run_passes(job, self.work)
        ms = self._ms_per_token()
        found = compare_export(job, self.work, self.rows, [], self.merged_answers)
        self.merged_answers = found.merged_answers
        limits = verify.settled(job, self.work, verify.Limits(max_drop=self.wanted.max_drop))
        quality = judge.quantised(job, found, limits.max_drop or 0.0)
        stopping = judge.stopping(job, found, token_faults(job, export.source_folder(job), self.work, self.rows))
        faults = [] if quality.passed else [_cost(job, quality.numbers["drop"], limits)]
        faults += [] if stopping.passed else [stopping.summary]
        if self.wanted.max_ms_per_token is not None and ms > self.wanted.max_ms_per_token:
            faults.append(f"{ms:.3g} ms a token, {self.wanted.max_ms_per_token:g} are let through")
        return Measured(rung.name, rung.settings, made["bytes"], round(ms, 3), quality.numbers, faults)

    def _ms_per_token(self) -> float:
        backend = OnnxBackend(self.work)
        rate = speed(backend, self.rows).get("decode_tokens_per_second")
        del backend
        release_memory()  # the next model needs it
        return 1000 / rate if rate else 0.0


def _cost(job: Job, drop: float, limits: verify.Limits) -> str:
    what = "points of accuracy" if has_labels(job) else "% of perplexity"
    return f"costs {drop:.2f} {what}, {limits.max_drop:g} are let through"


def table(found: Sequence[Measured]) -> Iterator[str]:
    """Yield lines for a person."""
    metric = "accuracy" if "onnx_accuracy" in found[0].numbers else "perplexity"
    form = "{:.1%}" if metric == "accuracy" else "{:.3f}"
    yield f"{'rung':<22}{'MB':>10}{'ms/token':>10}{metric:>12}{'agreement':>11}{'mean KL':>9}  holds"
    for one in found:
        numbers = one.numbers
        yield (
            f"{one.rung:<22}{one.bytes / 1e6:>10,.2f}{one.ms_per_token:>10.2f}"
            f"{form.format(numbers[f'onnx_{metric}']):>12}{numbers['top1_agreement']:>11.1%}{numbers['mean_kl']:>9.4f}"
            f"  {'no: ' + '; '.join(one.faults) if one.faults else 'yes'}"
        )
    yield f"{'(before the export)':<22}{'':>20}{form.format(found[0].numbers[f'merged_{metric}']):>12}"


def refusal(job: Job, found: Sequence[Measured]) -> GateError | None:
    """Return the error that no rung holds; None when one does."""
    if not found[-1].faults:
        return None
    where = job.workflow.where_in_pass("ModelBuilder")
    hint = "allow more with --max-drop or --max-ms-per-token, or choose another precision in the ModelBuilder pass"
    return GateError([Problem("no rung holds; nothing was changed", where, hint)])
