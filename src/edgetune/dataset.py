"""Read, check and tokenise the data sets: ``datasets/`` → ``gen-model/data/``.

Rows are read here rather than by ``datasets`` because a reader that stops at the first bad row cannot tell
all that is wrong. Token ids are kept as flat binary arrays, which training maps into memory.
"""

import csv
import io
import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgetune.download import digests
from edgetune.errors import EdgetuneError, Problem
from edgetune.prompt import Encoder, Sample, load_tokenizer
from edgetune.schema import DataConfig
from edgetune.source import JsonSource, parse
from edgetune.stages import Job, Stage, read_manifest

_BATCH_ROWS = 4096

_IDS: Literal["I"] = "I"  # uint32 token ids
_MARKS: Literal["Q"] = "Q"  # uint64 positions in them


@dataclass(frozen=True)
class Row:
    """A row and where it stands."""

    values: Any
    where: str


class Tokens(Sequence[Sample]):
    """Tokenised rows in two flat files: all ids, and per row where its completion starts and where it ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ids = _map(folder / f"{name}.ids", _IDS)
        self.marks = _map(folder / f"{name}.marks", _MARKS)

    def __len__(self) -> int:
        return len(self.marks) // 2

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.marks[2 * index - 1] if index else 0
        completion, end = self.marks[2 * index], self.marks[2 * index + 1]
        return Sample(self.ids[start:end].tolist(), completion - start)


def _map(path: Path, code: Literal["I", "Q"]) -> "memoryview[int]":
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(code)


def data_sets(job: Job) -> dict[str, DataConfig]:
    """Return the data sets of the workflow by their role."""
    workflow = job.workflow
    return {"train": workflow.train_data} | ({"eval": workflow.eval_data} if workflow.eval_data else {})


def data_files(job: Job, config: DataConfig) -> list[Path]:
    """Return the files of a data set, which paths relative to the workflow file name."""
    folder = job.project.config_folder
    return [Path(os.path.normpath(folder / name)) for name in config.load_dataset_config.data_files]


def inputs(job: Job) -> dict[str, Any]:
    """Return what the token ids depend on. Raises EdgetuneError when a data file is missing."""
    problems = [
        Problem(
            f"the data file {job.project.name(path)} does not exist",
            job.workflow.where_in_data(config, "load_dataset_config", "data_files"),
            f"put it there, or correct data_files of {config.name!r}",
        )
        for config in data_sets(job).values()
        for path in data_files(job, config)
        if not path.is_file()
    ]
    if problems:
        raise EdgetuneError(problems)
    return {
        "files": {
            role: [job.hashes[path] for path in data_files(job, config)] for role, config in data_sets(job).items()
        },
        "config": {
            role: config.model_dump(
                exclude={
                    "name": True,
                    "load_dataset_config": {"data_files"},
                    "pre_process_data_config": {"pad_to_max_len", "use_attention_mask"},
                }
            )
            for role, config in data_sets(job).items()
        },
        "tokenizer": digests(job, weights=False),
    }


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Check and tokenise every data set. Raises EdgetuneError with all problems of all files."""
    encoder = Encoder(job.workflow.template, job.base_folder)
    problems: list[Problem] = []
    metrics: dict[str, Any] = {}
    for role, config in data_sets(job).items():
        rows, found = _checked_rows(job, config)
        problems += found
        if found:
            continue
        totals, found = _tokenise(job, rows, config, encoder, folder / role)
        problems += found
        metrics[role] = totals
        job.progress.say("{role}: {rows:,} rows, {tokens:,} tokens, longest {longest}".format(role=role, **totals))
    if problems:
        raise EdgetuneError(problems)
    return metrics


STAGE = Stage("data", 1, inputs, build)


def counts(job: Job) -> dict[str, dict[str, int]]:
    """Return the rows and tokens of the tokenised data sets by role."""
    manifest = read_manifest(job.project.stage_folder("data"))
    return {} if manifest is None else manifest["metrics"]


def first_sample(job: Job) -> dict[str, str]:
    """Return prompt and completion of the first training row, decoded from the ids that are trained on."""
    sample = Tokens(job.project.stage_folder("data"), "train")[0]
    tokenizer = load_tokenizer(job.base_folder)
    parts = {"prompt": sample.ids[: sample.prompt_length], "completion": sample.ids[sample.prompt_length :]}
    return {name: tokenizer.decode(ids, skip_special_tokens=False) for name, ids in parts.items()}


def check_rows(job: Job) -> None:
    """Check every row without a tokenizer. Raises EdgetuneError with all problems of all files."""
    inputs(job)
    problems = [problem for config in data_sets(job).values() for problem in _checked_rows(job, config)[1]]
    if problems:
        raise EdgetuneError(problems)


def _checked_rows(job: Job, config: DataConfig) -> tuple[list[dict[str, str]], list[Problem]]:
    """Read the rows of a data set; with problems, the rows are not to be used."""
    problems: list[Problem] = []
    rows: list[Row] = []
    for path in data_files(job, config):
        rows += _read(path, job.project.name(path), config.load_dataset_config.data_name, problems)
    rows = take_split(rows, config.load_dataset_config.split)[: config.pre_process_data_config.max_samples]
    if not rows and not problems:
        where = job.project.name(data_files(job, config)[0])
        problems.append(Problem(f"the data set {config.name!r} has no rows", where, "add rows, or widen its split"))
    template = job.workflow.where_in_data(config, "pre_process_data_config", "text_template")
    problems += row_problems(rows, config.template.columns, template)
    given = config.pre_process_data_config
    unused = set(given.text_cols) - set(config.template.columns) if "text_cols" in given.model_fields_set else ()
    for column in sorted(unused):
        where = job.workflow.where_in_data(config, "pre_process_data_config", "text_cols")
        hint = f"the template has: {', '.join(config.template.columns)}"
        problems.append(Problem(f"text_cols names {column!r}, which text_template does not use", where, hint))
    return [row.values for row in rows], problems


def take_split(rows: list[Row], split: str) -> list[Row]:
    """Return the rows of a slice such as ``train[90%:]``."""
    bounds = re.search(r"\[(.*):(.*)\]", split)
    return rows[slice(*(_boundary(text, len(rows)) for text in bounds.groups()))] if bounds else rows


def _boundary(text: str, count: int) -> int | None:
    """Return where a slice starts or ends; percentages round as ``datasets`` does."""
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def _read(path: Path, name: str, kind: str, problems: list[Problem]) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        problems.append(Problem("not UTF-8 text", f"{name}:{line}", "save the file as UTF-8"))
        return iter(())
    if kind == "csv":
        return _csv_rows(text, name, problems)
    return _array_rows(path, name, problems) if text.lstrip().startswith("[") else json_lines(text, name, problems)


def json_lines(text: str, name: str, problems: list[Problem]) -> Iterator[Row]:
    """Yield the rows of JSON lines; lines that are no JSON are added to ``problems``."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Row(parse(line), f"{name}:{number}")
            except ValueError as error:
                hint = "every line must be one JSON object"
                problems.append(Problem(f"not valid JSON: {error}", f"{name}:{number}", hint))


def _array_rows(path: Path, name: str, problems: list[Problem]) -> Iterator[Row]:
    try:
        source = JsonSource(path, name)
    except EdgetuneError as error:
        problems += error.problems
        return iter(())
    return (Row(values, source.where(index)) for index, values in enumerate(source.data))


def _csv_rows(text: str, name: str, problems: list[Problem]) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    end = 1
    try:
        for values in reader:
            where, end = f"{name}:{end + 1}", reader.line_num
            if None in values or None in values.values():
                message = f"the row does not have {len(reader.fieldnames or ())} fields like the header"
                problems.append(Problem(message, where, 'put a field with commas into "quotes"'))
            else:
                yield Row(values, where)
    except csv.Error as error:
        problems.append(Problem(f"not valid CSV: {error}", f"{name}:{reader.line_num}", "check its quotes"))


def row_problems(rows: list[Row], columns: Iterable[str], template: str) -> list[Problem]:
    """Check that every row has a text in every column of the template."""
    problems = [
        Problem("the row is not a JSON object", row.where, 'write it as {"column": "text", …}')
        for row in rows
        if not isinstance(row.values, dict)
    ]
    rows = [row for row in rows if isinstance(row.values, dict)]
    for column in columns:
        bad = [row for row in rows if not _is_text(row.values.get(column))]
        if rows and all(column not in row.values for row in rows):
            there = ", ".join(map(repr, rows[0].values)) or "none"
            hint = f"its columns are: {there}; change text_template or the data"
            message = f"the template names the column {column!r}, which {rows[0].where.rpartition(':')[0]} lacks"
            problems.append(Problem(message, template, hint))
            continue
        for row in bad:
            value = row.values.get(column)
            state = "is missing" if value is None else "is empty" if isinstance(value, str) else "is not a text"
            problems.append(Problem(f"the column {column!r} {state}", row.where, "complete the row or remove it"))
    return problems


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _tokenise(
    job: Job, rows: list[dict[str, str]], config: DataConfig, encoder: Encoder, target: Path
) -> tuple[dict[str, int], list[Problem]]:
    """Write the token ids of ``rows`` to ``target.ids`` and ``target.marks``."""
    lengths, marks, endless, position = array(_MARKS), array(_MARKS), 0, 0
    with target.with_suffix(".ids").open("wb") as file:
        for start in range(0, len(rows), _BATCH_ROWS):
            for sample in encoder.encode(rows[start : start + _BATCH_ROWS]):
                array(_IDS, sample.ids).tofile(file)
                marks.extend((position + sample.prompt_length, position + len(sample.ids)))
                lengths.append(len(sample.ids))
                position += len(sample.ids)
                endless += not encoder.ends(sample)
    target.with_suffix(".marks").write_bytes(marks.tobytes())
    problems = []
    allowed, longest = config.pre_process_data_config.max_seq_len, max(lengths)
    if longest > allowed:
        too_long = sum(length > allowed for length in lengths)
        message = f"{too_long} rows of {config.name!r} are longer than max_seq_len {allowed} (longest: {longest})"
        where = job.workflow.where_in_data(config, "pre_process_data_config", "max_seq_len")
        hint = f"set max_seq_len to {longest} or shorten the rows; completions are never cut"
        problems.append(Problem(message, where, hint))
    if endless:
        ends = " or ".join(encoder.end_tokens()) or "an end token (this model defines none)"
        message = f"{endless} completions of {config.name!r} do not end with a token that stops the model"
        where = job.workflow.where_in_data(config, "pre_process_data_config", "text_template")
        problems.append(Problem(message, where, f"let text_template end with {ends}"))
    return {"rows": len(rows), "tokens": position, "longest": longest}, problems
