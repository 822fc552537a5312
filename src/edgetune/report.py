"""One page about all that was made and measured: manifests, losses, verdict and metrics → ``gen-model/report/``.

It comes as ``report.html``, which needs no other file, and as ``report.md``. What has not been done yet is said,
with the command that does it. No dates: the same results give the same bytes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import dataset, workflow
from edgetune.pages import charts, render
from edgetune.rows import files_of
from edgetune.stages import Job, read_json, read_manifest, sha256, write_text

Facts = dict[str, Any]

BACKENDS = {"base": "base model", "adapter": "with adapter", "merged": "merged", "onnx": "ONNX"}
_LABELS_SHOWN = 24
_FLIPS_SHOWN = 50
_Z = 1.96  # two-sided 95 %


def write(job: Job) -> Path:
    """Write the report in both forms and return the HTML file."""
    facts = collect(job)
    facts["charts"] = _charts(facts)
    for kind, environment in (("html", render.html()), ("md", render.markdown())):
        page = environment.get_template(f"report.{kind}.jinja").render(facts)
        write_text(job.project.report(kind), page)
    return job.project.report("html")


def _charts(facts: Facts) -> dict[str, list[str]]:
    drawn: dict[str, list[str]] = {"loss": [], "quality": []}
    if training := facts["training"]:
        drawn["loss"] = charts.losses("loss", training["log"])
    if measured := facts["quality"]:
        name, rows = measured["main"], measured["data"]["asked"]
        bars = [
            charts.Bar(model["title"], score := model["metrics"][name], model["interval"], render.metric(score, name))
            for model in measured["models"]
            if model["interval"] is not None
        ]
        what = f"{render.capital(render.title(name))} on {rows:,} evaluation rows"
        drawn["quality"] = charts.bars("quality", what, bars) if bars else []
    return drawn


def collect(job: Job) -> Facts:
    """Return everything the pages tell, as far as it is known."""
    found = Results.read(job)
    return {
        "project": job.project.root.name,
        "base": base_model(job),
        "precision": found.precision,
        "stale": workflow.stale(job),
        "measure": "evaluate" if job.workflow.eval_data else "data --write-split 0.1",
        "headline": headline(found),
        "tiles": list(tiles(found)),
        "verdict": found.verdict,
        "state": found.state,
        "quality": quality(found),
        "size": found.size,
        "speeds": list(_speeds(found)),
        "tuned": job.workflow.tuning is not None,
        "training": _training(job, found),
        "data": list(_data(job, found)),
        "labels": _labels(found),
        "stages": list(_stages(found)),
        "versions": list(_versions(found)),
        "config": {"name": job.project.name(job.project.config), "sha256": sha256(job.project.config)},
        "export_key": (found.manifests["export"] or {}).get("key"),
    }


@dataclass(frozen=True)
class Results:
    """What the steps left behind; None where one has not run."""

    manifests: dict[str, Facts | None]
    verdict: Facts | None
    metrics: Facts | None

    @classmethod
    def read(cls, job: Job) -> "Results":
        """Read the manifests, and what ``verify`` and ``evaluate`` wrote."""
        project, verdict = job.project, read_json(job.project.verdict)
        made = [stage.name for stage in workflow.stages_of(job) if stage.name != "export"]
        manifests = {stage: read_manifest(project.stage_folder(stage)) for stage in made}
        judged = [project.root / verdict["model"]] if verdict else []
        folders = (*judged, project.stage_folder("verify"), project.stage_folder("export"))
        exported = next((manifest for folder in folders if (manifest := read_manifest(folder))), None)
        metrics, key = read_json(project.metrics), (exported or {}).get("key")
        # A file of an earlier version may say less.
        is_current = metrics is not None and metrics.get("export_key", key) == key and "exported_from" in metrics
        return cls(manifests | {"export": exported}, verdict, metrics if is_current else None)

    @property
    def state(self) -> str:
        """What is known of the exported model: ``passed``, ``failed``, ``outdated`` or ``unknown``."""
        if self.verdict is None:
            return "unknown"
        if (self.manifests["export"] or {}).get("key") != self.verdict["export_key"]:
            return "outdated"
        return "passed" if self.verdict["passed"] else "failed"

    @property
    def precision(self) -> str:
        """The precision of the exported model."""
        made = [manifest for manifest in self.manifests.values() if manifest]  # passes behind the builder have none
        found = [(manifest.get("inputs") or {}).get("pass", {}).get("precision") for manifest in reversed(made)]
        return str(next(filter(None, found), ""))

    @property
    def size(self) -> int | None:
        """Bytes of the exported model's weights."""
        if measured := self.backends.get("onnx", {}).get("bytes"):
            return int(measured)
        files = (self.manifests["export"] or {"outputs": {}})["outputs"]
        return sum(entry["size"] for name, entry in files.items() if name.endswith((".onnx", ".onnx.data"))) or None

    def title(self, backend: str) -> str:
        """Return what a backend is called."""
        title = BACKENDS.get(backend, backend)
        return f"{self.precision} {title}".strip() if backend == "onnx" else title

    @property
    def backends(self) -> dict[str, Facts]:
        """What was measured of each model, the base model first."""
        measured = (self.metrics or {}).get("backends", {})
        return {name: measured[name] for name in BACKENDS if name in measured}

    def score(self, backend: str) -> float | None:
        """Return the main metric of a backend."""
        if self.metrics is None or backend not in self.backends:
            return None
        return self.backends[backend]["metrics"].get(self.metrics["metric"])  # type: ignore[no-any-return]


def headline(found: Results) -> str:
    """Say in a few words how good the exported model is, how large, and whether it was verified."""
    if found.manifests["export"] is None:
        return "There is no exported model yet."
    failed = [check["title"] for check in (found.verdict or {}).get("checks", ()) if check["passed"] is False]
    judged = {
        "passed": "It passed every check.",
        "failed": f"It failed {render.counted(len(failed), 'check')}: {'; '.join(failed)}.",
        "outdated": "It has not been verified since it was made.",
        "unknown": "It has not been verified yet.",
    }
    return f"{_measured(found)} {judged[found.state]}"


def _measured(found: Results) -> str:
    model = f"the {found.title('onnx')} model"
    before, after = found.score("base"), found.score("onnx")
    if found.metrics is None or after is None:
        return f"{render.capital(model)} takes {render.size(found.size)}. Its quality has not been measured yet."
    name, rows = found.metrics["metric"], found.metrics["data"]["asked"]
    base = "" if before is None else f"{render.metric(before, name)} with the base model, "
    return (
        f"{render.capital(render.title(name))} on {rows:,} evaluation rows: {base}"
        f"{render.metric(after, name)} with {model}, which takes {render.size(found.size)}."
    )


def tiles(found: Results) -> Iterator[Facts]:
    """Yield the few numbers that count most."""
    if found.metrics is not None and (after := found.score("onnx")) is not None:
        name, before = found.metrics["metric"], found.score("base")
        note = "" if before is None else f"from {render.metric(before, name)}, the base model"
        yield {"label": render.title(name), "value": render.metric(after, name), "note": note, "tone": ""}
    if found.verdict is not None:
        states = [check["passed"] for check in found.verdict["checks"]]
        note = f"{states.count(True)} of {len(states) - states.count(None)} checks passed"  # n/a ones do not count
        tone = {"passed": "good", "failed": "bad"}.get(found.state, "")
        yield {"label": "verification", "value": found.state, "note": note, "tone": tone}
    if found.size:
        base = (found.backends.get("base") or {}).get("bytes")
        note = f"the base model: {render.size(base)}" if base else ""
        yield {"label": "size", "value": render.size(found.size), "note": note, "tone": ""}
    if speed := ((found.backends.get("onnx") or {}).get("speed") or {}).get("decode_tokens_per_second"):
        yield {"label": "decode speed", "value": f"{render.number(speed)}", "note": "tokens/s", "tone": ""}


def quality(found: Results) -> Facts | None:
    """Return the measured quality of every backend, compared, and the rows that changed."""
    if found.metrics is None:
        return None
    metrics, main, rows = found.metrics, found.metrics["metric"], found.metrics["data"]["asked"]
    models = [
        {
            "name": name,
            "title": found.title(name),
            "metrics": backend["metrics"],
            "interval": interval(backend["metrics"].get(main), rows),
            "confusion": _confusion(backend.get("confusion")),
        }
        for name, backend in found.backends.items()
    ]
    return {
        "data": metrics["data"],
        "main": main,
        "names": list(dict.fromkeys(name for model in models for name in model["metrics"])),
        "meanings": {name: known.meaning for name, known in render.METRICS.items()},
        "models": models,
        "comparisons": [
            {**entry, "from": found.title(entry["from"]), "to": found.title(entry["to"])}
            for entry in metrics.get("comparisons", ())
        ],
        "exported_from": found.title(metrics["exported_from"]),
        "flipped": metrics.get("flipped", [])[:_FLIPS_SHOWN],
        "more_flipped": max(0, len(metrics.get("flipped", [])) - _FLIPS_SHOWN),
    }


def interval(share: float | None, rows: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a share of ``rows`` (Wilson, 1927)."""
    if share is None or not 0 <= share <= 1 or not rows:
        return None
    scale = 1 + _Z**2 / rows
    centre = (share + _Z**2 / (2 * rows)) / scale
    reach = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2)) / scale
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _confusion(content: Facts | None) -> Facts | None:
    """Return the matrix with each count's share of its row, without labels that neither occur nor were answered."""
    if content is None:
        return None
    labels = content["labels"]
    rows = [(label, row) for label, row in zip(labels, content["counts"], strict=False) if sum(row)]
    expected = {label for label, _ in rows}
    columns = [at for at, label in enumerate(labels) if label in expected or any(row[at] for _, row in rows)]
    return {
        "columns": [labels[at] for at in columns],
        "rows": [
            {
                "label": label,
                "cells": [
                    {"count": row[at], "share": row[at] / sum(row), "right": labels[at] == label} for at in columns
                ],
            }
            for label, row in rows
        ],
    }


def _speeds(found: Results) -> Iterator[Facts]:
    for name, backend in found.backends.items():
        speed = backend.get("speed") or {}
        yield {
            "title": found.title(name),
            "bytes": backend.get("bytes"),
            "memory": backend.get("peak_rss_mb"),
            "load": speed.get("load_seconds"),
            "prefill": speed.get("prefill_tokens_per_second"),
            "decode": speed.get("decode_tokens_per_second"),
            "prompt_tokens": speed.get("prompt_tokens"),
            "answer_tokens": speed.get("answer_tokens"),
        }


def base_model(job: Job) -> Facts:
    """Return where the base model came from and which bytes it has."""
    locked = (read_json(job.project.lock) or {}).get(job.base_id) or {}
    files = locked.get("files", {})
    return {
        "id": job.base_id,
        "source": locked.get("source"),
        "revision": locked.get("revision"),
        "bytes": sum(entry["size"] for entry in files.values()) or None,
        "weights": {name: entry for name, entry in files.items() if name.endswith(".safetensors")},
    }


def _training(job: Job, found: Results) -> Facts | None:
    manifest = found.manifests.get("train")
    if manifest is None:
        return None
    path = job.project.stage_folder("train") / "loss.json"
    log = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    options = manifest["inputs"]["pass"]
    return {
        "method": options["type"],
        "log": log,
        "evaluations": [(entry["step"], entry["epoch"], entry["eval_loss"]) for entry in log if "eval_loss" in entry],
        "metrics": manifest["metrics"],
        "options": dict(_flat({key: value for key, value in options.items() if key != "type"})),
    }


def _flat(options: Facts) -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif isinstance(value, list):
            yield key, ", ".join(map(str, value))
        else:
            yield key, f"{value:g}" if isinstance(value, float) else str(value)


def _data(job: Job, found: Results) -> Iterator[Facts]:
    """Yield each data set with its files, as they were when they were read."""
    manifest = found.manifests["data"]
    sets = dataset.data_sets(job) if manifest else {}
    for role, numbers in (manifest or {"metrics": {"sets": {}}})["metrics"]["sets"].items():
        load = sets[role].load_dataset_config if role in sets else None
        digests = (manifest or {})["inputs"]["files"].get(role, [])
        paths = files_of(load, job.project.config_folder) if load else []
        names = [job.project.name(path) for path in paths]
        yield {
            "role": role,
            "hub": load and load.is_hub and {"id": load.data_name, "subset": load.subset, "revision": load.revision},
            "split": load.split if load else "",
            "files": list(zip(names if len(names) == len(digests) else [""] * len(digests), digests, strict=True)),
            **numbers,
        }


def _labels(found: Results) -> Facts | None:
    """Return how often each label occurs in each data set."""
    manifest = found.manifests["data"]
    sets = {role: numbers["labels"] for role, numbers in manifest["metrics"]["sets"].items()} if manifest else {}
    labels = sorted({label for counts in sets.values() for label in counts})
    if not labels:
        return None
    total = {role: sum(counts.values()) or 1 for role, counts in sets.items()}

    def counts(label: str) -> list[Facts]:
        found = {role: sets[role].get(label, 0) for role in sets}
        return [{"count": count, "share": count / total[role]} for role, count in found.items()]

    rows = [{"label": label, "counts": counts(label)} for label in labels[:_LABELS_SHOWN]]
    return {"roles": list(sets), "rows": rows, "more": max(0, len(labels) - _LABELS_SHOWN)}


def _stages(found: Results) -> Iterator[Facts]:
    for stage, entry in {**found.manifests, "verify": found.verdict}.items():
        yield {"stage": stage, "seconds": (entry or {}).get("seconds"), "memory": (entry or {}).get("peak_rss_mb")}
    for name, backend in found.backends.items():
        yield {
            "stage": f"evaluate, {found.title(name)}",
            "seconds": backend.get("seconds"),
            "memory": backend.get("peak_rss_mb"),
        }
    if not found.backends:
        yield {"stage": "evaluate", "seconds": None, "memory": None}


def _versions(found: Results) -> Iterator[tuple[str, str]]:
    """Yield packages with their version, or with the steps of each version where these differ."""
    entries = {**found.manifests, "verify": found.verdict, "evaluate": found.metrics}
    seen: dict[str, dict[str, list[str]]] = {}
    for stage, entry in entries.items():
        for package, version in ((entry or {}).get("versions") or {}).items():
            seen.setdefault(package, {}).setdefault(version, []).append(stage)
    for package, versions in seen.items():
        if len(versions) == 1:
            yield package, next(iter(versions))
        else:
            yield package, "; ".join(f"{version} ({', '.join(stages)})" for version, stages in versions.items())
