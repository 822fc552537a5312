"""Check and tokenise the data sets: ``datasets/`` → ``gen-model/data/``.

Rows are read twice: once to check them, which needs no base model, and once to tokenise those that can be
learned from. Neither holds more than a batch of them. Token ids are kept as flat binary arrays, which training
maps into memory.
"""

import mmap
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from edgetune.contract import Conversation
from edgetune.data_schema import DataConfig, LoadDataset
from edgetune.download import digests
from edgetune.errors import EdgetuneError, Problem, failure, refuse
from edgetune.hub import load_dotenv
from edgetune.prompt import Encoder, Sample
from edgetune.row import Row, as_json
from edgetune.rows import files_of, hub_commit, read, read_all
from edgetune.stages import Job, Stage, read_manifest
from edgetune.survey import Survey, survey, together

Batch = list[tuple[int, Row]]
"""Rows with their numbers in the data set."""

_BATCH_ROWS = 4096
_BINS = 10

_IDS: Literal["I"] = "I"  # uint32 token ids
_ENDS: Literal["Q"] = "Q"  # uint64, one for each sample: where the next one starts

TRAIN, EVAL = "train", "eval"


class Tokens(Sequence[Sample]):
    """Tokenised samples in flat files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ids = _map(folder / f"{name}.ids").cast(_IDS)
        self.learned = _map(folder / f"{name}.learned")  # a byte for each token: 1 in completions
        self.ends = _map(folder / f"{name}.ends").cast(_ENDS)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return Sample(self.ids[part].tolist(), self.learned[part].tobytes())


def _map(path: Path) -> "memoryview[int]":
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def data_sets(job: Job) -> dict[str, DataConfig]:
    """Return the data sets of the workflow by their role."""
    workflow = job.workflow
    return {TRAIN: workflow.train_data} | ({EVAL: workflow.eval_data} if workflow.eval_data else {})


def rows_of(job: Job, config: DataConfig) -> Iterator[Row]:
    """Yield the rows of a data set. Raises EdgetuneError when the Hub does not give them."""
    return _from_hub(job, config, lambda: read(config, job.project.config_folder, job.project.name))


def all_rows(job: Job) -> Iterator[Row]:
    """Yield every row of the files that the data sets take from. Raises EdgetuneError as :func:`rows_of`."""
    configs = data_sets(job).values()
    rows = read_all(configs, job.project.config_folder, job.project.name)
    return _from_hub(job, job.workflow.train_data, lambda: rows)


def _from_hub(job: Job, config: DataConfig, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    load_dotenv(job.project.dotenv)
    try:
        yield from rows()
    except EdgetuneError as error:
        where = job.workflow.where_in_data(config, "load_dataset_config", "data_name")
        raise EdgetuneError(replace(problem, where=problem.where or where) for problem in error.problems) from error


def inputs(job: Job) -> dict[str, Any]:
    """Return what the token ids depend on.

    Raises EdgetuneError when a data file is missing, also one that only a later step looks at: it would have to wait
    for the training to say so.
    """
    workflow = job.workflow
    used = [*data_sets(job).values(), *workflow.calibration_data]
    _check_files(job, [config for config in workflow.data_configs if config in used])
    return content(job, data_sets(job)) | {"tokenizer": digests(job, weights=False)}


def content(job: Job, configs: dict[str, DataConfig]) -> dict[str, Any]:
    """Return what the rows of data sets and their text depend on. Raises EdgetuneError when a data file is missing."""
    _check_files(job, configs.values())
    return {
        "files": {
            role: []
            if config.load_dataset_config.is_hub
            else [job.hashes[path] for path in files_of(config.load_dataset_config, job.project.config_folder)]
            for role, config in configs.items()
        },
        "config": {role: _dump(config) for role, config in configs.items()},
    }


def _check_files(job: Job, configs: Iterable[DataConfig]) -> None:
    """Raise EdgetuneError when a data file is missing."""
    refuse(
        Problem(
            f"the data file {job.project.name(path)} {'is a folder' if path.is_dir() else 'does not exist'}",
            job.workflow.where_in_data(config, "load_dataset_config", "data_files"),
            "name its files, or a pattern such as folder/*.jsonl"
            if path.is_dir()
            else f"put it there, or correct data_files of {config.name!r}",
        )
        for config in configs
        if not config.load_dataset_config.is_hub
        for path in files_of(config.load_dataset_config, job.project.config_folder)
        if not path.is_file()
    )


def _dump(config: DataConfig) -> dict[str, Any]:
    """Return the keys that decide on the rows; the files of local data count by their content instead."""
    unimportant: dict[str, Any] = {"name": True, "pre_process_data_config": {"pad_to_max_len", "use_attention_mask"}}
    if not config.load_dataset_config.is_hub:
        unimportant["load_dataset_config"] = {"data_files"}
    return config.model_dump(exclude=unimportant)


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Check and tokenise every data set. Raises EdgetuneError with all problems of all of them."""
    try:
        return _build(job, folder)
    except EdgetuneError:
        shutil.rmtree(folder)  # the rows have to change first: there is nothing to continue
        raise


def _build(job: Job, folder: Path) -> dict[str, Any]:
    surveys = _survey_all(job)
    if isinstance(job.workflow.contract, Conversation):
        _refuse(job, surveys, [])  # before transformers is loaded for its chat templates
    encoder = Encoder(job.workflow.contract, job.base_folder)
    problems, warnings = _format_problems(job, encoder)
    sets = {}
    if not problems:
        with (folder / job.project.rejected.name).open("w", encoding="utf-8", errors="backslashreplace") as rejected:
            for role, found in surveys.items():
                if not found.problems:
                    sets[role] = _Writer(job, role, found, encoder, rejected).write(folder / role)
    _refuse(job, surveys, problems)
    for found in surveys.values():
        warnings += found.warnings
    for warning in warnings:
        job.progress.say(f"warning: {warning.where}: {warning.message}")
    for role, totals in sets.items():
        _say_commit(job, data_sets(job)[role].load_dataset_config)
        job.progress.say("{role}: {rows:,} rows, {tokens:,} tokens, longest {longest}".format(role=role, **totals))
    return {"sets": sets, "warnings": [vars(warning) for warning in warnings]}


def _say_commit(job: Job, load: LoadDataset) -> None:
    if load.is_hub and load.revision is None and (commit := hub_commit(load)):
        job.progress.say(f'{load.data_name} is at {commit}; "revision" in load_dataset_config keeps it there')


STAGE = Stage("data", 2, inputs, build)


def metrics(job: Job) -> dict[str, Any]:
    """Return what the last check found: ``sets`` by role, and ``warnings``."""
    manifest = read_manifest(job.project.stage_folder("data"))
    return {"sets": {}, "warnings": []} if manifest is None else manifest["metrics"]


def check_rejected(job: Job) -> None:
    """Raise EdgetuneError when an earlier run left out more rows than this one allows."""
    count = sum(numbers["rejected"] for numbers in metrics(job)["sets"].values())
    if job.max_bad is not None and count > job.max_bad:
        raise failure(
            f"{count:,} rows are left out, listed in {job.project.name(job.project.rejected)}; "
            f"--max-bad allows {job.max_bad:,}",
            hint=f"correct them, or go on without them with `--max-bad {count}`",
        )


def check_rows(job: Job) -> None:
    """Check every row without a tokenizer. Raises EdgetuneError with all problems of all data sets."""
    inputs(job)
    _refuse(job, _survey_all(job), [])


def _survey_all(job: Job) -> dict[str, Survey]:
    surveys: dict[str, Survey] = {}
    for role, config in data_sets(job).items():
        job.progress.advance(0, 1, f"checking {config.name}")
        place = job.workflow.where_contract(config)
        trained = surveys[TRAIN].prompts if surveys else {}
        found = surveys[role] = survey(config.contract, place, rows_of(job, config), trained)
        found.problems += _unused_columns(job, config)
    return surveys


def _unused_columns(job: Job, config: DataConfig) -> list[Problem]:
    given = config.pre_process_data_config
    unused = set(given.text_cols) - set(config.contract.columns) if "text_cols" in given.model_fields_set else ()
    where = job.workflow.where_in_data(config, "pre_process_data_config", "text_cols")
    hint = f"the template has: {', '.join(config.contract.columns)}"
    return [
        Problem(f"text_cols names {column!r}, which text_template does not use", where, hint)
        for column in sorted(unused)
    ]


def _format_problems(job: Job, encoder: Encoder) -> tuple[list[Problem], list[Problem]]:
    """Return what is wrong, and what may be wrong, with the template for this base model."""
    where = job.workflow.where_contract(job.workflow.train_data)
    foreign = encoder.foreign_tokens()
    problems = [
        Problem(f"{job.base_id} does not know the special token {token}", where, encoder.prompt_format())
        for token in foreign
    ]
    fault, hint = encoder.format_fault()
    if fault and not foreign:
        problems.append(Problem(fault, where, hint))
    warnings = []
    if begin := encoder.lacks_begin():
        message = f"{job.base_id} was trained on texts that begin with {begin}, and the template does not"
        warnings.append(Problem(message, where, f"begin text_template with {begin}, for all data sets"))
    return problems, warnings


def _refuse(job: Job, surveys: dict[str, Survey], problems: list[Problem]) -> None:
    """Raise EdgetuneError for what is wrong with whole data sets, and for more bad rows than are allowed."""
    problems = problems + [problem for found in surveys.values() for problem in found.problems]
    problems += [_no_rows(job, role, found) for role, found in surveys.items() if not found.rows and not found.problems]
    bad = [problem for found in surveys.values() for faults in found.bad.values() for problem in faults]
    count = sum(len(found.bad) for found in surveys.values())
    if count > (job.max_bad or 0):
        total = sum(found.rows for found in surveys.values())
        if not problems and count < total:
            hint = f"correct them, or go on without them with `--max-bad {count}`"
            problems.append(Problem(f"{count:,} of {total:,} rows cannot be learned from", hint=hint))
        problems += [problem for found in surveys.values() for problem in found.summaries] + bad
    elif empty := [_no_rows(job, role, found) for role, found in surveys.items() if found.rows == len(found.bad) > 0]:
        problems += empty + bad
    if problems:
        raise EdgetuneError(problems)


def _no_rows(job: Job, role: str, found: Survey) -> Problem:
    config = data_sets(job)[role]
    load = config.load_dataset_config
    where = load.data_name if load.is_hub else job.project.name(files_of(load, job.project.config_folder)[0])
    if found.rows:
        return Problem(f"no row of the data set {config.name!r} can be learned from", where, "correct the rows")
    return Problem(f"the data set {config.name!r} has no rows", where, "add rows, or widen its split")


class _Writer:
    """Writes the samples of one data set, and the rows that make none to ``rejected.jsonl``."""

    def __init__(self, job: Job, role: str, found: Survey, encoder: Encoder, rejected: IO[str]) -> None:
        self.job, self.role, self.found, self.encoder, self.rejected = job, role, found, encoder, rejected
        self.config = data_sets(job)[role]
        self.allowed = self.config.pre_process_data_config.max_seq_len
        self.ends, self.lengths, self.learned = array(_ENDS), array(_IDS), 0
        self.labels, self.too_long, self.with_special = Counter[str](), list[int](), list[str]()

    def write(self, target: Path) -> dict[str, Any]:
        """Write ``target.ids``, ``.learned`` and ``.ends``; return the data set's numbers.

        What is found wrong is added to the survey.
        """
        done = 0
        with target.with_suffix(".ids").open("wb") as ids, target.with_suffix(".learned").open("wb") as learned:
            for batch, encoded in self._encoded():
                for sample in self._samples(batch, encoded):
                    ids.write(array(_IDS, sample.ids))
                    learned.write(sample.learned)
                    self.lengths.append(len(sample.ids))
                    self.ends.append(len(sample.ids) + (self.ends[-1] if self.ends else 0))
                    self.learned += sample.learned.count(1)
                done += len(batch)
                self.job.progress.advance(done, self.found.rows, f"tokenising {self.config.name}")
        target.with_suffix(".ends").write_bytes(self.ends.tobytes())
        self._tell()
        return {
            "rows": self.found.rows - len(self.found.bad),
            "rejected": len(self.found.bad),
            "samples": len(self.ends),
            "tokens": self.ends[-1] if self.ends else 0,
            "learned_tokens": self.learned,
            "longest": max(self.lengths, default=0),
            "histogram": histogram(self.lengths),
            "labels": dict(self.labels.most_common()),
        }

    def _encoded(self) -> Iterator[tuple[Batch, list[list[Sample]]]]:
        """Yield batches of numbered rows with the samples of the good ones; the next batch is tokenised meanwhile."""
        rows = enumerate(rows_of(self.job, self.config))
        with ThreadPoolExecutor(1) as pool:
            before: tuple[Batch, Future[list[list[Sample]]]] | None = None
            while batch := list(islice(rows, _BATCH_ROWS)):
                good = [row.values for number, row in batch if number not in self.found.bad]
                task = pool.submit(self.encoder.encode, good)
                if before:
                    yield before[0], before[1].result()
                before = batch, task
            if before:
                yield before[0], before[1].result()

    def _samples(self, batch: Batch, encoded: list[list[Sample]]) -> Iterator[Sample]:
        """Yield the samples of a batch that can be learned from; reject the other rows."""
        samples_of_good = iter(encoded)
        for number, row in batch:
            samples = [] if number in self.found.bad else next(samples_of_good)
            if samples and (fault := self._fault(row, samples)):
                self.found.bad[number] = [Problem(fault, str(row.place), "shorten or correct the row")]
            if number in self.found.bad:
                self._reject(row, self.found.bad[number])
                continue
            if self.found.has_labels:
                for _, completion in self.config.contract.exchanges(row.values):
                    self.labels[completion] += 1
            yield from samples

    def _fault(self, row: Row, samples: list[Sample]) -> str:
        """Return what is wrong with a row's ids, and note what may be."""
        given, answers = self.config.contract.texts(row.values)
        if token := self.encoder.special_token(answers):
            return f"the answer contains the special token {token}"
        longest = max(len(sample.ids) for sample in samples)
        if longest > (context := self.encoder.context or longest):
            return f"the row has {longest} tokens, the base model reads {context}"
        if longest > self.allowed:
            self.too_long.append(longest)
            return f"the row has {longest} tokens, max_seq_len is {self.allowed}"
        if self.encoder.special_token(given):
            self.with_special.append(str(row.place))
        return ""

    def _reject(self, row: Row, reasons: list[Problem]) -> None:
        why = "; ".join(reason.message for reason in reasons)
        entry = {"set": self.role, "where": str(row.place), "problem": why, "row": row.values}
        self.rejected.write(as_json(entry) + "\n")

    def _tell(self) -> None:
        """Add what concerns many rows to the survey, once."""
        if self.with_special:
            hint = "it acts as that token, not as text; fine if it was meant to"
            self.found.warnings.append(together("with a special token in its prompt", self.with_special, hint))
        if self.too_long:
            count, longest = len(self.too_long), max(self.too_long)
            rows = f"{count:,} {'row' if count == 1 else 'rows'} of {self.config.name!r}"
            place = self.job.workflow.where_in_data(self.config, "pre_process_data_config", "max_seq_len")
            message = f"max_seq_len {self.allowed} is too short for {rows} (longest: {longest} tokens)"
            hint = f"set max_seq_len to {longest} or shorten the rows; completions are never cut"
            self.found.summaries.append(Problem(message, place, hint))


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return at most ten ranges of equal width as (lowest, highest, how many)."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    counts = [0] * _BINS
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        (low + i * width, min(low + (i + 1) * width - 1, high), count)
        for i, count in enumerate(counts)
        if low + i * width <= high
    ]
