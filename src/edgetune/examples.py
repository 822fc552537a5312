"""What the models are examined on: prompts of a data set with the completions they ought to have."""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edgetune.dataset import EVAL, TRAIN, data_sets, metrics, rows_of
from edgetune.errors import Problem, refuse
from edgetune.prompt import Encoder
from edgetune.row import Row
from edgetune.stages import Job

_SEED = 0


@dataclass(frozen=True)
class Example:
    """A prompt and the completion it ought to have, as token ids and as texts."""

    where: str
    question: str
    ids: list[int]
    """Prompt and completion together, end token included."""
    start: int
    """Where the completion begins."""
    expected: str

    @property
    def prompt_ids(self) -> list[int]:
        """What a model is given."""
        return self.ids[: self.start]

    @property
    def learned(self) -> int:
        """How many tokens the completion has."""
        return len(self.ids) - self.start


def examined_set(job: Job) -> str:
    """Return the role of the data that models are examined on: the evaluation data where there are any."""
    return EVAL if job.workflow.eval_data else TRAIN


def has_labels(job: Job) -> bool:
    """Tell whether the completions are labels: few words that come again and again."""
    return bool(metrics(job)["sets"].get(TRAIN, {}).get("labels"))


def examples(job: Job, role: str, limit: int | None = None) -> list[Example]:
    """Return the examples of a data set, in their order; of more than ``limit`` rows, a choice that is always the same.

    An answer of a chat is an example of its own. Raises EdgetuneError for those too long for the exported model.
    """
    total = metrics(job)["sets"][role]["rows"]
    chosen = None
    if limit is not None and limit < total:
        chosen = set(random.Random(_SEED).sample(range(total), limit))  # noqa: S311 - no secret hangs on it
    numbered = enumerate(good_rows(job, role))
    return of_rows(job, (row for number, row in numbered if chosen is None or number in chosen))


def of_rows(job: Job, rows: Iterable[Row]) -> list[Example]:
    """Return the examples that rows make. Raises EdgetuneError for those too long for the exported model."""
    encoder = Encoder(job.workflow.contract, job.base_folder)
    found = [example for row in rows for example in _of_row(encoder, row)]
    refuse(_without_room(job, found))
    return found


def _without_room(job: Job, found: list[Example]) -> Iterator[Problem]:
    """Yield the examples whose prompts leave the exported model no room for the expected answer."""
    longest = job.workflow.builder.search.get("max_length")
    where = job.workflow.where_in_pass("ModelBuilder", "search")
    for example in found:
        if longest is not None and len(example.ids) > longest:
            yield Problem(
                f"prompt and answer have {len(example.ids)} tokens, the exported model takes {longest}",
                example.where,
                f"raise search.max_length in {where}, or shorten the row",
            )


def good_rows(job: Job, role: str) -> Iterator[Row]:
    """Yield the rows of a data set that were not rejected."""
    with job.project.rejected.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    rejected = {entry["where"] for entry in entries if entry["set"] == role}
    return (row for row in rows_of(job, data_sets(job)[role]) if str(row.place) not in rejected)


def _of_row(encoder: Encoder, row: Row) -> Iterator[Example]:
    questions = iter(encoder.contract.exchanges(row.values))
    for sample in encoder.encode([row.values])[0]:
        at = 0
        while (start := sample.learned.find(1, at)) != -1:
            end = sample.learned.find(0, start)
            at = len(sample.ids) if end == -1 else end
            ids = list(sample.ids[:at])
            # Of samples that hold one answer each, every one also holds the answers before it as given text.
            expected = encoder.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
            yield Example(str(row.place), next(questions)[0], ids, start, expected)
