"""Ask a model: texts or a JSONL file of rows → answers, in the prompt format it was trained on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgetune.backends import Answer, Backend, OnnxBackend
from edgetune.errors import Problem, failure, refuse
from edgetune.project import Project
from edgetune.prompt import Encoder
from edgetune.row import Place, Row
from edgetune.schema import Workflow
from edgetune.stages import read_manifest, recover
from edgetune.text_rows import is_decoded, json_rows

Record = dict[str, Any]


def open_backend(project: Project) -> Backend:
    """Load the exported model. Raises EdgetuneError when there is none."""
    folder = project.stage_folder("export")
    recover(folder)
    if read_manifest(folder) is None:
        hint = "run `make finetune` (or `edgetune finetune`) first"
        raise failure("there is no exported model yet", where=project.name(folder), hint=hint)
    return OnnxBackend(folder)


def rows_from_texts(workflow: Workflow, texts: list[str]) -> list[Row]:
    """Make a question of each text. Raises EdgetuneError when the template needs more, or a text says nothing."""
    rows = [Row(workflow.contract.question(text), Place("text", number)) for number, text in enumerate(texts, start=1)]
    problems = [fault for row in rows for fault in row.faults(workflow.contract, asking=True)]
    hint = "give it in the encoding of the terminal, or use --prompts with a UTF-8 file"
    problems += [
        Problem("the text has bytes of another encoding", str(row.place), hint)
        for row, text in zip(rows, texts, strict=True)
        if not is_decoded(text)
    ]
    refuse(problems)
    return rows


def rows_from_file(workflow: Workflow, path: Path) -> list[Row]:
    """Read rows with the template's prompt columns. Raises EdgetuneError with every problem of the file."""
    try:
        rows = list(json_rows(path, str(path)))
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}", hint="--prompts takes a JSONL file") from None
    problems = [fault for row in rows for fault in row.faults(workflow.contract, asking=True)]
    if not rows:
        problems.append(Problem(f"{path} has no rows", str(path), "write one JSON object on each line"))
    refuse(problems)
    return rows


def answers(
    encoder: Encoder,
    backend: Backend,
    rows: list[Row],
    *,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[tuple[Record, Answer]]:
    """Answer the rows one after the other. Raises EdgetuneError first if any prompt is too long."""
    prompts = [encoder.prompt_ids(row.values) for row in rows]
    problems = [
        Problem(
            f"the prompt has {len(prompt)} tokens; with its answer the model takes {backend.max_length}",
            str(row.place),
            "shorten it, or raise search.max_length of the ModelBuilder pass in fine-tuning/olive-config.json",
        )
        for row, prompt in zip(rows, prompts, strict=True)
        if len(prompt) >= backend.max_length
    ]
    refuse(problems)
    for row, prompt in zip(rows, prompts, strict=True):
        yield row.values, backend.answer(prompt, max_new_tokens=max_new_tokens, on_text=on_text)


def as_record(row: Record, answer: Answer) -> Record:
    """Return the row with its answer, as it is written to JSONL."""
    return row | {
        "answer": answer.text,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "seconds": answer.seconds,
    }


def write_records(path: Path, records: list[Record]) -> None:
    """Write answers as JSONL, all or nothing: an interrupted run leaves the earlier file alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


def summary(records: list[Record], seconds: float) -> str:
    """Say how many answers there were and how they ended."""
    tokens = sum(record["answer_tokens"] for record in records)
    ended = sum(record["stop_reason"] == "stop" for record in records)
    return f"{len(records)} answers, {ended} ended by themselves, {tokens / max(seconds, 1e-3):.0f} tokens/s"
