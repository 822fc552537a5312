"""Ask a model: texts or JSONL rows → answers, in the prompt format it was trained on.

Reads any model of the project; ``edgetune infer --prompts`` writes ``inferences/outputs-<backend>.jsonl``.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from edgetune.backends import open_backend
from edgetune.contract import Contract
from edgetune.errors import EdgetuneError, Problem, failure, refuse
from edgetune.generation import GREEDY, Answer, Backend, Sampling
from edgetune.prompt import Encoder
from edgetune.row import Place, Row
from edgetune.stages import Job, write_text
from edgetune.stream import OnText
from edgetune.text_rows import is_decoded, json_rows

Record = dict[str, Any]
"""A row with its answer, as it is written to JSONL."""

STDIN = "-"
"""Stands for the standard input, as a text and as a file of prompts."""

_WINDOW = 256
"""Rows that are sorted by length together: enough for batches without much padding, few enough to be shown soon."""

_MANY = 16
"""More rows than this take long enough for progress to be told."""

_MADE_BY = {"base": "download", "adapter": "train", "merged": "merge", "onnx": "verify"}
"""The last of the steps that each model depends on."""


def given_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Read the ``COLUMN=VALUE`` of ``--set``. Raises EdgetuneError with everything that is wrong with them."""
    given: dict[str, str] = {}
    problems = []
    for pair in pairs:
        column, equals, value = pair.partition("=")
        if not equals or not column:
            problems.append(Problem(f"--set {pair!r} is not COLUMN=VALUE", hint='for example --set "language=French"'))
        elif column in given:
            problems.append(Problem(f"--set gives the column {column!r} twice", hint="leave one out"))
        given[column] = value
    refuse(problems)
    return given


def rows_from_texts(
    contract: Contract, texts: Sequence[str | None], given: Mapping[str, str], name: str = "text"
) -> list[Row]:
    """Make a question of each text; None: the columns that are ``given`` say it all.

    Raises EdgetuneError when that makes no question, or a text says nothing.
    """
    rows = [Row(contract.question(text, given), Place(name, number)) for number, text in enumerate(texts, start=1)]
    problems = [fault for row in rows for fault in row.faults(contract, asking=True)]
    hint = "give it in the encoding of the terminal (from a pipe: in UTF-8)"
    problems += [
        Problem("the text has bytes of another encoding", str(row.place), hint)
        for row, text in zip(rows, texts, strict=True)
        if not is_decoded("".join((text or "", *given.values())))
    ]
    refuse(problems)
    return rows


def text_from(stdin: BinaryIO) -> str:
    """Return all that a pipe or file has, without the line's end. Raises EdgetuneError when it is empty."""
    text = stdin.read().decode("utf-8-sig", errors="surrogateescape").rstrip("\r\n")
    if not text.strip():
        raise failure("there is nothing on the standard input", hint='give a text: edgetune infer "some text"')
    return text


def rows_from_file(contract: Contract, path: Path, stdin: BinaryIO) -> list[Row]:
    """Read rows with the prompt's columns. Raises EdgetuneError with every problem of the file."""
    if str(path) == STDIN:
        with tempfile.TemporaryDirectory() as folder:  # a file is looked through before it is read
            copy = Path(folder) / "stdin.jsonl"
            copy.write_bytes(stdin.read())
            return _checked(contract, list(json_rows(copy, "stdin")), "stdin")
    try:
        rows = list(json_rows(path, str(path)))
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}", hint="--prompts takes a JSONL file") from None
    return _checked(contract, rows, str(path))


def _checked(contract: Contract, rows: list[Row], name: str) -> list[Row]:
    problems = [fault for row in rows for fault in row.faults(contract, asking=True)]
    if not rows:
        problems.append(Problem(f"{name} has no rows", name, "write one JSON object on each line"))
    refuse(problems)
    return rows


@dataclass(frozen=True)
class Asker:
    """A model with the contract it is asked by."""

    backend: Backend
    encoder: Encoder

    @classmethod
    def open(cls, job: Job, name: str, adapter: str | None = None) -> "Asker":
        """Load a model. Raises EdgetuneError when it is not there."""
        with job.progress.running("load", job.project.log("load")):
            job.progress.advance(0, 1, f"loading the {name} model")
            backend = open_backend(job, name, adapter)
            return cls(backend, Encoder(job.workflow.contract, backend.folder))

    def prompt(self, row: Row, hint: str = "") -> list[int]:
        """Return what the model is given. Raises EdgetuneError, with the hint, when it leaves no room for an answer."""
        ids = self.encoder.prompt_ids(row.values)
        if len(ids) < self.backend.max_length:
            return ids
        raise failure(
            f"the prompt has {len(ids)} tokens; with its answer the model takes {self.backend.max_length}",
            where=str(row.place),
            hint=hint
            or "shorten it, or raise search.max_length of the ModelBuilder pass in fine-tuning/olive-config.json",
        )


def answers(
    job: Job, asker: Asker, rows: list[Row], sampling: Sampling = GREEDY, on_text: OnText | None = None
) -> Iterator[Record]:
    """Answer the rows in their order. Raises EdgetuneError first if any prompt is too long."""
    prompts = _prompts(asker, rows)
    is_told, done = on_text is None and len(rows) > _MANY, 0
    for start in range(0, len(rows), _WINDOW):
        waiting: dict[int, Answer] = {}
        due = start
        for number, answer in asker.backend.answers(prompts[start : start + _WINDOW], sampling, on_text):
            waiting[start + number] = answer
            done += 1
            if is_told:
                job.progress.advance(done, len(rows))
            while due in waiting:
                yield as_record(rows[due].values, waiting.pop(due))
                due += 1


def _prompts(asker: Asker, rows: list[Row]) -> list[list[int]]:
    prompts, problems = [], []
    for row in rows:
        try:
            prompts.append(asker.prompt(row))
        except EdgetuneError as error:
            problems += [replace(problem, where=str(row.place)) for problem in error.problems]
    refuse(problems)
    return prompts


def as_record(row: Record, answer: Answer) -> Record:
    """Return the row with its answer; a column of the row that has the name of a field becomes ``given_<name>``."""
    fields = {
        "answer": answer.text,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "seconds": answer.seconds,
    }
    return {f"given_{name}" if name in fields else name: value for name, value in row.items()} | fields


def write_records(path: Path, records: list[Record]) -> None:
    """Write answers as JSONL."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


_ENDS = {"stop": "ended by {themselves}", "length": "cut at the limit of length"}


def summary(records: list[Record]) -> str:
    """Say how many answers there were and how they ended."""
    tokens = sum(record["answer_tokens"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    ends = Counter(record["stop_reason"] for record in records)
    plural = len(records) != 1
    said = [f"{len(records)} answer{'s' if plural else ''}"]
    said += [
        f"{ends[reason]} " + text.format(themselves="themselves" if plural else "itself")
        for reason, text in _ENDS.items()
        if ends[reason] or reason == "stop"
    ]
    return ", ".join([*said, f"{tokens / max(seconds, 1e-3):.0f} tokens/s"])


def stale(job: Job, backend: str) -> str:
    """Say which of the results that a model depends on are older than the project; empty when none is."""
    from edgetune import workflow

    return workflow.stale(job, _MADE_BY[backend])
