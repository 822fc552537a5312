"""Check the rows of a data set as far as that goes without a tokenizer, and remember what they are like."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from edgetune.contract import Contract, lacks
from edgetune.errors import Problem
from edgetune.row import Place, Row

_MOST_LABELS = 50
_ROWS_PER_LABEL = 3
_PLACES_SHOWN = 8
_EVERY_ROW = 3  # from so many readable rows on, a fault that all of them have is told once

Prompts = dict[int, tuple[int, Place]]
"""Where each prompt occurred first, by its hash, with the hash of its completion.

Hashes (64 bits) instead of texts keep a million rows in some 300 MB; the odds that two different ones among
them meet are one in 37 million.
"""


@dataclass
class Survey:
    """What was found in a data set; rows are counted from 0."""

    rows: int = 0
    bad: dict[int, list[Problem]] = field(default_factory=dict)
    """Rows that cannot be learned from, with the reasons."""
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with the data set as a whole, or with all that follows in a file."""
    summaries: list[Problem] = field(default_factory=list)
    """What many of the bad rows have in common."""
    warnings: list[Problem] = field(default_factory=list)
    has_labels: bool = False
    """Whether completions are labels: few, and repeated."""
    prompts: Prompts = field(default_factory=dict)


def survey(contract: Contract, place: str, rows: Iterable[Row], trained: Prompts) -> Survey:
    """Read all rows once; ``place`` is where the contract stands.

    ``trained`` are the prompts of the training data when this is the evaluation data.
    """
    result, labels, common = Survey(), Counter[str](), _Common()
    repeats, contradictions = list[str](), list[tuple[int, Problem]]()
    for number, row in enumerate(rows):
        if row.fatal:
            result.problems += row.faults(contract)
            continue
        result.rows += 1
        if faults := row.faults(contract):
            result.bad[number] = faults
            common.add(row, faults)
            continue
        exchanges = contract.exchanges(row.values)
        if len(labels) <= _MOST_LABELS:
            for _, completion in exchanges:
                labels[completion] += 1
        others = [other for exchange in exchanges if (other := _note(result.prompts, exchange, row.place))]
        differing = [other for other in others if isinstance(other, Problem)]
        if differing:
            contradictions.append((number, differing[0]))
        elif len(others) == len(exchanges):
            repeats.append(str(row.place))
        if leak := next(_leaks(exchanges, row.place, trained), None):
            result.bad[number] = [leak]
    result.has_labels = len(labels) <= _MOST_LABELS and labels.total() >= _ROWS_PER_LABEL * len(labels)
    _judge_contradictions(result, contradictions)
    if repeats:
        hint = "harmless if meant so; each copy counts once more in training"
        result.warnings.append(together("repeating an earlier one", repeats, hint))
    common.tell_once(result, contract, place)
    return result


def _note(prompts: Prompts, exchange: tuple[str, str], here: Place) -> Problem | Place | None:
    """Remember a prompt; return where it occurred before, as a problem if the completion was another one."""
    new = (hash(exchange[1]), here)
    first = prompts.setdefault(hash(exchange[0]), new)
    if first is new:
        return None
    if first[0] == new[0]:
        return first[1]
    message = f"the same prompt as {first[1]}, with another completion"
    return Problem(message, str(here), "keep the one that is right")


def _leaks(exchanges: list[tuple[str, str]], here: Place, trained: Prompts) -> Iterator[Problem]:
    for prompt, _ in exchanges:
        if first := trained.get(hash(prompt)):
            message = f"the prompt is in the training data too ({first[1]}): evaluation would measure memory"
            hint = "remove one of the two, or split anew with `edgetune data --write-split 0.1`"
            yield Problem(message, str(here), hint)


def _judge_contradictions(result: Survey, found: list[tuple[int, Problem]]) -> None:
    """Two labels for one prompt cannot both be right; two texts can."""
    if result.has_labels:
        for number, problem in found:
            result.bad.setdefault(number, []).append(problem)
    elif found:
        hint = "fine if several answers are right; otherwise keep one of them"
        places = [problem.where for _, problem in found]
        result.warnings.append(together("with the prompt of an earlier one, but another completion", places, hint))


class _Common:
    """Counts faults that rows share, to tell once what is wrong with every row."""

    def __init__(self) -> None:
        self.unread = 0
        self.counts = Counter[str]()
        self.first: dict[str, Problem] = {}
        self.columns: tuple[str, ...] = ()

    def add(self, row: Row, faults: list[Problem]) -> None:
        """Count the faults of a row, or that it could not be read."""
        if row.fault:
            self.unread += 1
        else:
            for fault in faults:
                self.counts[fault.message] += 1
                self.first.setdefault(fault.message, fault)
            self.columns = self.columns or (tuple(row.values) if isinstance(row.values, dict) else ())

    def tell_once(self, result: Survey, contract: Contract, place: str) -> None:
        """Turn a fault that every readable row has into one problem of the data set."""
        readable = result.rows - self.unread
        missing = {lacks(column): column for column in contract.columns}
        everywhere = {
            message
            for message, count in self.counts.items()
            if count == readable and (count >= _EVERY_ROW or message in missing)
        }
        for message in everywhere:
            first = self.first[message]
            file = first.where.rpartition(":")[0]
            if column := missing.get(message):
                there = ", ".join(map(repr, self.columns)) or "none"
                hint = f"its columns are: {there}; change text_template or the data"
                told = Problem(f"the template names the column {column!r}, which {file} lacks", place, hint)
            else:
                told = Problem(f"in every row that can be read, {message}", first.where, first.hint)
            result.problems.append(told)
        for number, faults in result.bad.items():
            result.bad[number] = [fault for fault in faults if fault.message not in everywhere]


def together(what: str, places: list[str], hint: str) -> Problem:
    """Make one problem of the rows at ``places`` that have the same fault."""
    file, _, _ = places[0].rpartition(":")
    others = [place.removeprefix(file + ":") for place in places[1:_PLACES_SHOWN]]
    more = ", …" if len(places) > _PLACES_SHOWN else ""
    also = f" (also {', '.join(others)}{more})" if others else ""
    return Problem(f"{len(places):,} {'row' if len(places) == 1 else 'rows'} {what}{also}", places[0], hint)
