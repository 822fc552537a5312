"""Ask a model: texts or a JSONL file of rows → answers, in the prompt format it was trained on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgetune.backends import Answer, Backend, OnnxBackend
from edgetune.errors import EdgetuneError, Problem, failure
from edgetune.project import Project
from edgetune.schema import Workflow
from edgetune.stages import read_manifest

Row = dict[str, Any]


def open_backend(project: Project) -> Backend:
    """Load the exported model. Raises EdgetuneError when there is none."""
    folder = project.stage_folder("export")
    if read_manifest(folder) is None:
        hint = "run `make finetune` (or `edgetune finetune`) first"
        raise failure("there is no exported model yet", where=project.name(folder), hint=hint)
    return OnnxBackend(folder)


def rows_from_texts(workflow: Workflow, texts: list[str]) -> list[Row]:
    """Put each text into the prompt column. Raises EdgetuneError when the template has several."""
    columns = workflow.template.prompt_columns
    if len(columns) > 1:
        raise failure(
            f"the prompt is made of the columns {', '.join(columns)}: a text alone cannot fill them",
            hint="use --prompts FILE.jsonl with one object of these columns on each line",
        )
    return [{columns[0]: text} for text in texts]


def rows_from_file(workflow: Workflow, path: Path) -> list[Row]:
    """Read rows with the template's prompt columns. Raises EdgetuneError with every problem of the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise failure(f"{path} cannot be read: {error}") from None
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(f"not valid JSON: {error.msg}", f"{path}:{number}"))
            continue
        missing = [c for c in workflow.template.prompt_columns if not isinstance(row, dict) or c not in row]
        if missing or not all(isinstance(row[c], str) for c in workflow.template.prompt_columns):
            columns = ", ".join(workflow.template.prompt_columns)
            problems.append(Problem(f"the row needs the texts {columns}", f"{path}:{number}"))
        rows.append(row)
    if not rows and not problems:
        problems.append(Problem(f"{path} has no rows"))
    if problems:
        raise EdgetuneError(problems)
    return rows


def answers(
    workflow: Workflow,
    backend: Backend,
    rows: list[Row],
    *,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[tuple[Row, Answer]]:
    """Answer the rows one after the other. Raises EdgetuneError for a prompt that is too long."""
    for row in rows:
        prompt = workflow.template.prompt_text({c: row[c] for c in workflow.template.prompt_columns})
        yield row, backend.answer(prompt, max_new_tokens=max_new_tokens, on_text=on_text)


def as_record(row: Row, answer: Answer) -> Row:
    """Return the row with its answer, as it is written to JSONL."""
    return row | {
        "answer": answer.text,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "seconds": answer.seconds,
    }


def write_records(path: Path, records: list[Row]) -> None:
    """Write answers as JSONL, all or nothing: an interrupted run leaves the earlier file alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


def summary(records: list[Row], seconds: float) -> str:
    """Say how many answers there were and how they ended."""
    tokens = sum(record["answer_tokens"] for record in records)
    ended = sum(record["stop_reason"] == "stop" for record in records)
    return f"{len(records)} answers, {ended} ended by themselves, {tokens / max(seconds, 1e-3):.0f} tokens/s"
