"""A row of a data set and where it stands."""

import json
import math
from dataclasses import replace
from typing import Any, NamedTuple

from edgetune.contract import Contract
from edgetune.errors import Problem


class Place(NamedTuple):
    """Where a row stands; where lines hold several rows, or none are lines, its number says more."""

    file: str
    line: int
    number: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" (row {self.number})" if self.number else "")


class Row(NamedTuple):
    """A row and where it stands.

    With a ``fault`` (a problem without a place) it could not be read; ``fatal``: nor could what follows in the file.
    """

    values: Any
    place: Place
    fault: Problem | None = None
    fatal: bool = False

    def faults(self, contract: Contract, *, asking: bool = False) -> list[Problem]:
        """Return what is wrong with the row, with its place; ``asking``: as a question, which needs no answer."""
        found = [self.fault] if self.fault else contract.faults(self.values, asking=asking)
        return [replace(fault, where=str(self.place)) for fault in found]


def as_json(values: Any) -> str:
    """Write values on one line. What JSON has no word for becomes null (NaN, infinity) or its text (a date)."""
    return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
