"""Measure every model on the evaluation data: ``gen-model/evaluation/`` and ``gen-model/report/metrics.json``.

Each backend works in a process of its own, so that the memory it is said to take is its own. Answers are written as
they come: an interrupted run goes on where it was.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from edgetune import config, download, preflight, verify
from edgetune.backends import MADE_BY, backends_of, open_backend
from edgetune.checks.answers import answer_limit
from edgetune.dataset import EVAL, metrics
from edgetune.errors import failure
from edgetune.examples import Example, examples
from edgetune.generation import Backend, Sampling
from edgetune.memory import peak_memory_mb, reset_peak_memory
from edgetune.metrics import summarise
from edgetune.onnx_backend import OnnxBackend
from edgetune.processes import in_process
from edgetune.project import Project
from edgetune.scores import completion_loss
from edgetune.stages import Job, key_of, published, read_json, run_lock, versions, write_json, write_text

_FORMAT = 2
_BATCH = 64
_SPEED_PROMPT = 256
_SPEED_ANSWER = 32
_IMPORTS = ("transformers.generation.utils", "transformers.models.auto.modeling_auto", "peft", "torchmetrics")

Record = dict[str, Any]


def evaluate(job: Job, limit: int | None = None) -> Record:
    """Ask every backend the evaluation data, or ``limit`` rows of them; return what ``metrics.json`` says.

    Raises EdgetuneError when there are no evaluation data.
    """
    check_data(job)
    with run_lock(job.project):
        backends = backends_of(job)
        keys = {name: _key(job, name, limit) for name in backends}
        key = key_of("metrics", _FORMAT, keys)
        known = read_metrics(job)
        if known is not None and known["key"] == key:
            job.progress.skip("evaluate")
            return known
        folders = {name: model_folder(job, name) for name in backends}
        with job.progress.running("evaluate", job.project.log("evaluate")):
            rows = metrics(job)["sets"][EVAL]["rows"]
            job.progress.say(
                f"{min(rows, limit or rows):,} rows for each of {', '.join(backends)}; loading libraries first"
            )
        for name in backends:
            if not _is_complete(_answers_file(job, name, limit), keys[name]):
                # The memory of the exported model is not to have torch in it, which it does not need.
                imports = () if name == "onnx" else _IMPORTS
                in_process(_examine, job.project, name, folders[name], keys[name], limit, imports=imports)
        counted = in_process(_count, job.project, keys, folders, limit, imports=_IMPORTS)
        found = {"key": key, "export_key": job.keys["export"], "limit": limit, **counted, "versions": versions()}
        write_json(job.project.metrics, found)
    return found


def check_data(job: Job) -> None:
    """Raise EdgetuneError when there are no evaluation data."""
    if job.workflow.eval_data is None:
        raise failure(
            "there are no evaluation data",
            where=job.workflow.where_in_tuning() if job.workflow.tuning else job.workflow.where("data_configs"),
            hint="`edgetune data --write-split 0.1` sets a tenth of the rows aside",
        )


def read_metrics(job: Job) -> Record | None:
    """Return what the last evaluation found; None when there is nothing that can be read."""
    return read_json(job.project.metrics)


def last_limit(job: Job) -> int | None:
    """Return how many rows the last evaluation was limited to; None when there was no limit, or no evaluation."""
    limit = (read_metrics(job) or {}).get("limit")
    return None if limit is None else int(limit)


def model_folder(job: Job, name: str) -> Path:
    """Return the folder of a backend's model; the exported one may have been set aside by verify."""
    if name == "base":
        return job.base_folder
    found = verify.exported(job, job.keys["export"]) if name == "onnx" else None
    return found or job.project.stage_folder(MADE_BY[name])


def _key(job: Job, name: str, limit: int | None) -> str:
    model: list[Any] = [] if name == "base" else [published(model_folder(job, name))]
    if name in ("base", "adapter"):
        model.append(download.digests(job, weights=True))
    content = {
        "model": model,
        "data": [job.keys["data"], published(job.project.stage_folder("data"))],
        "limit": limit,
        "max_length": job.workflow.builder.search.get("max_length"),
        "dtype": preflight.trained_dtype(job),
    }
    return key_of("evaluate", _FORMAT, content)


def _answers_file(job: Job, name: str, limit: int | None) -> Path:
    return job.project.evaluation / (f"{name}.jsonl" if limit is None else f"{name}-{limit}.jsonl")


def _read(path: Path, key: str) -> list[Record]:
    """Return the answers in a file with this key, and its last line if it is complete; nothing for another key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = [line for line in map(_parsed, text.splitlines()) if line]  # what was cut off is asked again
    if not lines or lines[0].get("key") != key:
        return []
    answers = {line["number"]: line for line in reversed(lines) if "number" in line}
    return [answers[number] for number in sorted(answers)] + [line for line in lines[-1:] if "speed" in line]


def _parsed(line: str) -> Record | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _is_complete(path: Path, key: str) -> bool:
    lines = _read(path, key)
    return bool(lines) and "speed" in lines[-1]


def _count(project: Project, keys: dict[str, str], folders: dict[str, Path], limit: int | None) -> Record:
    """Count from the answers. Runs in a process of its own, because its imports take seconds."""
    job = _job(project)
    with job.progress.running("evaluate", job.project.log("evaluate")):
        job.progress.advance(0, 1, "counting")
        answered = {name: _read(_answers_file(job, name, limit), keys[name]) for name in keys}
        return summarise(job, examples(job, EVAL, limit), answered, folders)


def _job(project: Project) -> Job:
    return Job.start(project, config.load(project))


def _examine(project: Project, name: str, model: Path, key: str, limit: int | None) -> None:
    """Ask one backend all that it has not answered yet. Runs in a process of its own."""
    reset_peak_memory()
    job = _job(project)
    path = _answers_file(job, name, limit)
    with job.progress.running("evaluate", job.project.log(f"evaluate-{name}")):
        asked = examples(job, EVAL, limit)
        done = [line for line in _read(path, key) if "number" in line]
        write_text(path, "".join(json.dumps(line) + "\n" for line in [{"key": key}, *done]))
        job.progress.advance(0, len(asked), f"loading {name}")
        started = time.monotonic()
        backend = OnnxBackend(model) if name == "onnx" else open_backend(job, name)
        loaded = time.monotonic()
        with path.open("a", encoding="utf-8") as file:
            for count, line in enumerate(_answered(backend, asked, {line["number"] for line in done}), len(done) + 1):
                file.write(json.dumps(line) + "\n")
                file.flush()
                job.progress.advance(count, len(asked), f"asking {name}")
            last = {
                "speed": speed(backend, asked) | {"load_seconds": round(loaded - started, 2)},
                "peak_rss_mb": peak_memory_mb(),
                "seconds": round(time.monotonic() - started, 2),
            }
            file.write(json.dumps(last) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _answered(backend: Backend, asked: list[Example], done: set[int]) -> Iterator[Record]:
    """Yield the answers to what is not done yet, with the loss of the expected one (summed, in nats)."""
    sampling = Sampling(max_new_tokens=answer_limit(asked))
    missing = iter([number for number in range(len(asked)) if number not in done])
    while batch := list(islice(missing, _BATCH)):
        for at, answer in backend.answers([asked[number].prompt_ids for number in batch], sampling):
            example = asked[batch[at]]
            loss = completion_loss(backend, example)
            yield {"number": batch[at], "loss": loss, "learned": example.learned, **asdict(answer)}


def speed(backend: Backend, asked: list[Example]) -> Record:
    """Measure the fastest of three runs: what else the machine does is not the model's.

    Returns nothing where the model takes no more tokens than such an answer has.
    """
    text = [token for example in asked for token in example.prompt_ids]
    room = backend.max_length - _SPEED_ANSWER - 1
    if room < 1:
        return {}
    ids = (text * (_SPEED_PROMPT // len(text) + 1))[: min(_SPEED_PROMPT, room)]
    runs = [backend.speed(ids, _SPEED_ANSWER) for _ in range(3)]
    prefill, decode = min(run.prefill_seconds for run in runs), min(run.decode_seconds for run in runs)
    return {
        "prompt_tokens": len(ids),
        "prefill_tokens_per_second": round(len(ids) / prefill, 1),
        "answer_tokens": _SPEED_ANSWER,
        "decode_tokens_per_second": round(_SPEED_ANSWER / decode, 1),
    }


_COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "ended": ("ended", "{:.1%}"),
}


def table(found: Record) -> Iterator[str]:
    """Yield lines for a person: quality, speed and memory of each backend, and what the differences mean."""
    names = [name for name in _COLUMNS if name in found["backends"]["base"]["metrics"]]
    speeds = ["prefill tok/s", "decode tok/s", "weights MB", "peak MB"]
    yield f"{'':<8}" + "".join(f"{title:>15}" for title in [*(_COLUMNS[name][0] for name in names), *speeds])
    for backend, numbers in found["backends"].items():
        quality = [_COLUMNS[name][1].format(numbers["metrics"][name]) for name in names]
        rates = [numbers["speed"].get(f"{kind}_tokens_per_second") for kind in ("prefill", "decode")]
        rest = [*("" if rate is None else f"{rate:,.0f}" for rate in rates), f"{numbers['bytes'] / 1e6:,.1f}"]
        yield f"{backend:<8}" + "".join(f"{cell:>15}" for cell in [*quality, *rest, f"{numbers['peak_rss_mb']:,.0f}"])
    yield ""
    for entry in found["comparisons"]:
        form = _COLUMNS[entry["metric"]][1]
        change = f"{form.format(entry['before'])} → {form.format(entry['after'])}"
        yield (
            f"{entry['from']} → {entry['to']}: {entry['metric'].replace('_', ' ')} {change}, "
            f"{entry['better']} better, {entry['worse']} worse (p = {entry['p']:.2g}: {entry['verdict']})"
        )
    for row in found["flipped"]:
        before = f"{found['exported_from']} says {row['before']!r}"
        yield f"{row['where']}: {before}, onnx {row['onnx']!r}, expected {row['expected']!r}"
