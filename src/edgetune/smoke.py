"""Try everything in little before hours are spent: two optimiser steps on the longest rows, through all steps.

Reads what a full run reads; works in ``gen-model/smoke/`` and leaves ``smoke.json`` there: what was found, and what
a full run would take. Base model and data are brought up to date as a full run would; its results stay as they are.
"""

import heapq
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.filesize import decimal

from edgetune import dataset, download, examples, verify, workflow
from edgetune.checks.judge import Check
from edgetune.data_schema import DataConfig, LoadDataset
from edgetune.dataset import EVAL, TRAIN
from edgetune.errors import GateError, Problem
from edgetune.passes import named_files
from edgetune.progress import Progress
from edgetune.prompt import Encoder
from edgetune.row import Row, as_json
from edgetune.schema import Workflow
from edgetune.stages import Job, key_of, published, read_json, read_manifest, run_lock, versions, write_json

STEPS = 2
_FORMAT = 2
_ROWS_VERIFIED = 2  # an untrained model's answers run on to their limit
_CANDIDATES = 4  # times as many rows as are taken have their tokens counted
_UNTRAINED = "nothing to tell after two steps"


def run(job: Job) -> dict[str, Any]:
    """Run everything once in little, unless nothing has changed; return the record.

    Raises EdgetuneError as the steps do, and GateError when the exported model is not the one that was trained.
    """
    workflow.run(job, "data")  # what is wrong with any row is found here
    key = _key(job)
    record = read_json(job.project.smoke_record)
    if record is not None and record.get("key") == key:
        job.progress.skip("smoke")
        return record
    trial = _trial(job)
    workflow.run(trial, "export")
    with run_lock(job.project):
        _verify(trial)
        found = _found(trial)
        full = _full_run(job, trial, found["seconds"])
        record = {"key": key, **found, "full": full, "versions": versions()}
        write_json(job.project.smoke_record, record)
        _remove_results(trial)
    return record


def _key(job: Job) -> str:
    inputs = {
        "base": download.digests(job, weights=True),
        "data": [job.keys["data"], published(job.project.stage_folder("data"))],
        "workflow": job.workflow.model_dump(include={"passes", "systems"}, exclude_none=True),
        "versions": versions(),
        "calibration": dataset.content(job, {data.name: data for data in job.workflow.calibration_data}),
        "files": named_files(job, [step.model_dump(exclude_none=True) for step in job.workflow.exporting.values()]),
        "processes": job.processes.here if job.processes else 1,
    }
    return key_of("smoke", _FORMAT, inputs)


class _Timed(Progress):
    """Keeps the times of the training steps: the first one also pays for what libraries prepare."""

    def __init__(self, events: Path, stream: TextIO) -> None:
        super().__init__(events, stream)
        self.steps: dict[float, float] = {}

    def advance(self, done: float, total: float, text: str = "") -> None:
        if self.stage == "train" and total == STEPS:
            self.steps[done] = time.monotonic()
        super().advance(done, total, text)

    def last_step(self) -> float | None:
        """Return the seconds of the last step; None when an earlier run made it."""
        before, last = self.steps.get(STEPS - 1), self.steps.get(STEPS)
        return None if before is None or last is None else last - before


def _trial(job: Job) -> Job:
    """Return the job in little: its rows are written, its passes are the same but for the number of steps."""
    project = replace(job.project, smoke=True)
    progress = _Timed(project.events, job.progress.stream)
    files: dict[str, Path] = {}
    for role, config in dataset.data_sets(job).items():
        if config.name in files:  # one data set for both
            continue
        rows, files[config.name] = _longest(job, role), project.smoke_rows(config.name)
        _write(files[config.name], rows)
        progress.say(f"{'smoke':<9} {role}: the {len(rows)} longest of {_sets(job)[role]['rows']:,} rows")
    trial = Job.start(project, _in_little(job.workflow, files, project.config_folder), progress)
    return replace(trial, processes=job.processes)


def _longest(job: Job, role: str) -> list[Row]:
    """Return the rows with the most tokens: they set the peak of memory.

    Raises EdgetuneError when one of those that the exported model is asked does not fit into it.
    """
    arguments, count = _training_arguments(job.workflow), _ROWS_VERIFIED
    if arguments is not None and role == EVAL:
        count = max(arguments.per_device_eval_batch_size, _ROWS_VERIFIED)
    elif arguments is not None:
        count = STEPS * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    long = heapq.nlargest(_CANDIDATES * count, examples.good_rows(job, role), key=_bytes)
    samples = Encoder(job.workflow.contract, job.base_folder).encode([row.values for row in long])
    lengths = [max(len(sample.ids) for sample in of_row) for of_row in samples]
    order = sorted(range(len(long)), key=lambda number: -lengths[number])
    chosen = [long[number] for number in order[:count]]
    if role == examples.examined_set(job):
        examples.of_rows(job, chosen)
    return chosen


def _bytes(row: Row) -> int:
    return len(as_json(row.values).encode("utf-8", errors="replace"))


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_json(row.values) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")


def _in_little(whole: Workflow, files: dict[str, Path], start: Path) -> Workflow:
    """Return the workflow with its data taken from ``files`` and its training ended after two steps."""
    data = [_from_file(config, files, start) for config in whole.data_configs]
    passes = {name: _two_steps(step) if step is whole.tuning else step for name, step in whole.passes.items()}
    return whole.model_copy(update={"data_configs": data, "passes": passes})


def _from_file(config: DataConfig, files: dict[str, Path], start: Path) -> DataConfig:
    if config.name not in files:
        return config
    path = os.path.relpath(files[config.name], start)  # the project's own folder may have a name with [ or *
    return config.model_copy(
        update={"load_dataset_config": LoadDataset(data_name="json", data_files=(path,), split="train")}
    )


def _training_arguments(workflow: Workflow) -> Any:
    """Return the arguments of the training pass; None when nothing is trained."""
    return workflow.tuning.training_args if workflow.tuning else None


def _two_steps(tuning: Any) -> Any:
    given = tuning.training_args
    little = {
        "max_steps": STEPS,
        "warmup_steps": 0,  # or the first step would change nothing
        "eval_strategy": "no" if given.eval_strategy == "no" else "steps",
        "eval_steps": STEPS,
        "eval_delay": 0,
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    return tuning.model_copy(update={"training_args": given.model_copy(update=little)})


def _verify(trial: Job) -> None:
    model = verify.exported(trial, trial.keys["export"])
    assert model is not None  # noqa: S101 - it was exported just now
    limits = verify.settled(trial, model, verify.Limits(rows=_ROWS_VERIFIED))
    with trial.progress.running("verify", trial.project.log("verify")):
        verdict = verify.examine(trial, model, limits, revised=_excused)
    failed = [check for check in verdict["checks"] if check["passed"] is False]
    if failed:
        where = trial.project.name(trial.project.verdict)
        hint = f"what it made is in {trial.project.name(trial.project.results)}"
        found = [Problem(f"failed: {check['title']}: {check['summary']}", where, check["cause"]) for check in failed]
        raise GateError([*found, Problem("the smoke run did not pass", hint=hint)])


def _excused(check: Check) -> Check:
    """Let through what two steps cannot achieve: a lower loss, a task that int4 keeps, and answers that end."""
    if check.passed is not False:
        return check
    numbers, excused = check.numbers, False
    match check.name:
        case "adapter":
            excused = not numbers["zero_matrices"]
        case "quantisation":
            excused = math.isfinite(numbers.get("mean_kl", math.nan))
        case "tokens":
            excused = not numbers["faults"]
    return replace(check, passed=None, summary=f"{_UNTRAINED}: {check.summary}", cause="") if excused else check


def _found(trial: Job) -> dict[str, Any]:
    """Return seconds and peak memory of each step, the size of the results, and the checks."""
    verdict = verify.read_verdict(trial) or {}
    took = {stage.name: read_manifest(_folder(trial, stage.name)) or {} for stage in workflow.stages_of(trial)} | {
        "verify": verdict
    }
    return {
        "seconds": {name: entry["seconds"] for name, entry in took.items() if entry},
        "peak_rss_mb": {name: entry["peak_rss_mb"] for name, entry in took.items() if entry},
        "bytes": sum(
            path.stat().st_size
            for stage in ("train", "merge", "verify")
            for path in trial.project.stage_folder(stage).rglob("*")
        ),
        "checks": verdict["checks"],
    }


def _folder(trial: Job, stage: str) -> Path:
    return trial.project.stage_folder("verify" if stage == "export" else stage)  # verify has moved it on


def _full_run(job: Job, trial: Job, seconds: dict[str, float]) -> dict[str, Any]:
    """Return what a full run would take: each step of training as long as here for each token of its rows."""
    arguments = _training_arguments(job.workflow)
    rest = sum(took for stage, took in seconds.items() if stage not in ("data", "verify"))
    if arguments is None:
        return {
            "steps": 0,
            "train_seconds": 0.0,
            "evaluations": 0,
            "evaluation_seconds": 0.0,
            "other_seconds": round(rest, 1),
        }
    history = json.loads((trial.project.stage_folder("train") / "loss.json").read_text(encoding="utf-8"))
    evaluating = sum(entry.get("eval_runtime", 0.0) for entry in history)
    training = sum(entry.get("train_runtime", 0.0) for entry in history) - evaluating
    steps = _steps(arguments, _sets(job)[TRAIN]["samples"])
    per_epoch = _steps_of_epoch(arguments, _sets(job)[TRAIN]["samples"])
    evaluations = _evaluations(arguments, steps, per_epoch) if evaluating else 0
    little = _sets(trial)
    step = trial.progress.last_step() if isinstance(trial.progress, _Timed) else None
    of_steps = (step or training / STEPS) * steps * _mean(job, TRAIN) / _mean(trial, TRAIN)
    of_evaluations = evaluating * evaluations
    if evaluations:
        of_evaluations *= _sets(job)[EVAL]["tokens"] / little[EVAL]["tokens"]
    return {
        "steps": steps,
        "train_seconds": round(of_steps, 1),
        "evaluations": evaluations,
        "evaluation_seconds": round(of_evaluations, 1),
        "other_seconds": round(rest - training - evaluating, 1),
    }


def _sets(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = dataset.metrics(job)["sets"]
    return found


def _mean(job: Job, role: str) -> float:
    """Return the mean number of tokens of a sample."""
    numbers = _sets(job)[role]
    return float(numbers["tokens"] / numbers["samples"])


def _steps(arguments: Any, samples: int) -> int:
    """Return the optimiser steps of a full run, counted as transformers' Trainer does."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return math.ceil(float(arguments.num_train_epochs) * _steps_of_epoch(arguments, samples))


def _steps_of_epoch(arguments: Any, samples: int) -> int:
    """Return the optimiser steps that read every sample once."""
    batches = math.ceil(samples / int(arguments.per_device_train_batch_size))
    return math.ceil(batches / int(arguments.gradient_accumulation_steps))


def _evaluations(arguments: Any, steps: int, per_epoch: int) -> int:
    """Return how often a full run evaluates."""
    if arguments.eval_strategy == "epoch":
        return math.ceil(steps / per_epoch)
    interval = float(arguments.eval_steps or arguments.logging_steps or 500)  # transformers' default
    return math.floor(steps / (math.ceil(interval * steps) if interval < 1 else interval))


def _remove_results(trial: Job) -> None:
    """Delete what was made of the rows: a base model's copies fill a disk, and no one asks an untrained model."""
    made = [trial.project.stage_folder(stage) for stage in (*workflow.STEPS, "passes")]
    for folder in (*made, trial.project.refused_model, trial.project.smoke_rows("").parent):
        shutil.rmtree(folder, ignore_errors=True)
    trial.project.verdict.unlink(missing_ok=True)


def summary(record: dict[str, Any]) -> list[str]:
    """Return what a record says, as lines for people."""
    full, peaks = record["full"], record["peak_rss_mb"]
    parts = []
    if full["steps"]:
        parts.append(f"{full['steps']:,} training steps {_time(full['train_seconds'])}")
    if full["evaluations"]:
        parts.append(f"{full['evaluations']:,} evaluations {_time(full['evaluation_seconds'])}")
    parts.append(f"loading, merge and export {_time(full['other_seconds'])}")
    total = full["train_seconds"] + full["evaluation_seconds"] + full["other_seconds"]
    verification = f"{_time(record['seconds']['verify'])} for {_ROWS_VERIFIED} rows"
    of_each = ", ".join(f"{stage} {peak:,.0f}" for stage, peak in peaks.items())
    return [
        "every step works with this base model, configuration and data",
        f"a full run: about {_time(total)} ({', '.join(parts)}), and the verification ({verification})",
        f"memory: {max(peaks.values()):,.0f} MB at most ({of_each})",
        f"disk: {decimal(record['bytes'])} for the results",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))  # noqa: PLR2004 - a minute
