"""What the answers of the models are worth, in numbers."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

from edgetune.backends import exported_from
from edgetune.dataset import EVAL, TRAIN
from edgetune.dataset import metrics as data_metrics
from edgetune.examples import Example, has_labels
from edgetune.scores import PairedTest, compare_hits, compare_losses, perplexity
from edgetune.stages import Job

OTHER = "(other)"
"""The column of a confusion matrix for answers that are no label."""

# Chinese, Japanese and Korean characters count as words: these texts have no spaces between them.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")

Record = dict[str, Any]


def summarise(job: Job, asked: list[Example], answered: dict[str, list[Record]], folders: dict[str, Path]) -> Record:
    """Return the part of ``metrics.json`` that is counted from the answers; the last line of each says how fast."""
    labels = _labels(job, asked)
    lines = {name: sorted(records[:-1], key=lambda line: line["number"]) for name, records in answered.items()}
    hits = {name: _hits(asked, of_backend) for name, of_backend in lines.items()}
    before = exported_from(job)
    backends = {}
    for name, of_backend in lines.items():
        confusion = _confusion(labels, asked, of_backend) if labels else None
        backends[name] = {
            "folder": job.project.name(folders[name]),
            "bytes": _weights(folders[name]),
            "metrics": _quality(asked, of_backend, hits[name], confusion),
            "confusion": confusion,
            **answered[name][-1],
        }
    return {
        "data": {**_data(job), "asked": len(asked)},
        "metric": "accuracy" if labels else "exact_match",
        "labels": labels,
        "exported_from": before,
        "backends": backends,
        "comparisons": _comparisons(labels, lines, hits),
        "flipped": _flipped(before, asked, lines, hits),
    }


def _data(job: Job) -> Record:
    data = job.workflow.eval_data
    return {"name": data and data.name, "rows": data_metrics(job)["sets"][EVAL]["rows"]}


def _weights(folder: Path) -> int:
    """Return the size of a model's weights in bytes; an adapter's come on top of the base model's."""
    files = (path for pattern in ("*.safetensors", "*.onnx", "*.onnx.data") for path in folder.glob(pattern))
    return sum(path.stat().st_size for path in files)


def _labels(job: Job, asked: list[Example]) -> list[str]:
    if not has_labels(job):
        return []
    trained = data_metrics(job)["sets"][TRAIN]["labels"]
    return sorted({*map(str.strip, trained), *(example.expected for example in asked)})


def _hits(asked: list[Example], lines: list[Record]) -> list[bool]:
    return [line["text"] == example.expected for example, line in zip(asked, lines, strict=True)]


def _quality(asked: list[Example], lines: list[Record], hits: list[bool], confusion: Record | None) -> Record:
    hit = sum(hits) / len(hits)
    if confusion is not None:
        quality = {"accuracy": hit, "macro_f1": confusion["macro_f1"]}
    else:
        quality = {"exact_match": hit, "rouge_l": _rouge_l(asked, lines)}
    ended = sum(line["stop_reason"] == "stop" for line in lines) / len(lines)
    return quality | {"perplexity": _perplexity(lines), "ended": ended}


def _perplexity(lines: list[Record]) -> float:
    return perplexity(sum(line["loss"] for line in lines), sum(line["learned"] for line in lines))


def _confusion(labels: list[str], asked: list[Example], lines: list[Record]) -> Record:
    """Count expected labels (rows) against answers (columns); macro-F1 is over the labels that occur in either."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score

    number, classes = {label: at for at, label in enumerate(labels)}, len(labels) + 1
    answers = torch.tensor([number.get(line["text"], len(labels)) for line in lines])
    expected = torch.tensor([number[example.expected] for example in asked])
    counts = multiclass_confusion_matrix(answers, expected, classes)
    occurs = (counts.sum(0) + counts.sum(1) > 0)[: len(labels)]
    f1 = multiclass_f1_score(answers, expected, classes, average="none")[: len(labels)][occurs].mean()
    return {"labels": [*labels, OTHER], "counts": counts[: len(labels)].tolist(), "macro_f1": float(f1)}


def _rouge_l(asked: list[Example], lines: list[Record]) -> float:
    """Return the mean F-measure of ROUGE-L (https://aclanthology.org/W04-1013)."""
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(
        [line["text"] for line in lines],
        [example.expected for example in asked],
        rouge_keys="rougeL",
        normalizer=str.casefold,
        tokenizer=_WORD.findall,
    )
    return float(scores["rougeL_fmeasure"])


def _comparisons(labels: list[str], lines: dict[str, list[Record]], hits: dict[str, list[bool]]) -> list[Record]:
    """Compare models on the same examples: right answers, and for free text the losses of the expected ones too."""
    found = []
    # Verification has proved that the merged model is the adapter; where nothing is merged, the adapter is exported.
    names = [name for name in lines if name != "adapter" or "merged" not in lines]
    for before, after in combinations(names, 2):
        shares = [sum(hits[name]) / len(hits[name]) for name in (before, after)]
        test = compare_hits(hits[before], hits[after])
        found.append(_comparison(before, after, "accuracy" if labels else "exact_match", shares, test))
        if not labels:
            losses = [[line["loss"] / line["learned"] for line in lines[name]] for name in (before, after)]
            values = [_perplexity(lines[name]) for name in (before, after)]
            found.append(_comparison(before, after, "perplexity", values, compare_losses(*losses)))
    return found


def _comparison(before: str, after: str, metric: str, values: list[float], test: PairedTest) -> Record:
    return {
        "from": before,
        "to": after,
        "metric": metric,
        "before": values[0],
        "after": values[1],
        "better": test.better,
        "worse": test.worse,
        "p": test.p,
        "verdict": test.verdict,
    }


def _flipped(
    before: str, asked: list[Example], lines: dict[str, list[Record]], hits: dict[str, list[bool]]
) -> list[Record]:
    """Return the examples that only one of the exported model and the one it was made from gets right."""
    return [
        {
            "where": example.where,
            "question": example.question,
            "expected": example.expected,
            "before": lines[before][number]["text"],
            "onnx": lines["onnx"][number]["text"],
        }
        for number, example in enumerate(asked)
        if hits[before][number] != hits["onnx"][number]
    ]
