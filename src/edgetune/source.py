"""JSON with line numbers: reads a file and remembers on which line every key and item stands."""

import json
import shutil
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edgetune.errors import Problem, failure

Location = tuple[str | int, ...]
"""Keys and indices that lead from the top of a JSON document to one of its values."""

_CONFLICT = "<" * 7
_DECIDE = "left open by an update or a merge: decide between the two versions, and delete the marks"


def parse(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """Parse JSON. Raises ValueError (JSONDecodeError where it has a position) for all that is not usable text."""
    try:
        value = decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a \\ud… escape without its other half is no character") from None
    return value


class _Walker:
    """Second pass over text that :func:`json.loads` has accepted, so it need not check syntax."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: dict[Location, int] = {}
        self.spans: dict[Location, tuple[int, int]] = {}
        self.keys: dict[Location, int] = {}
        self.newlines = [at for at, character in enumerate(text) if character == "\n"]
        self.duplicates: list[tuple[str, int]] = []
        self.decoder = json.JSONDecoder()

    def line(self, at: int) -> int:
        return bisect_left(self.newlines, at) + 1

    def skip(self, at: int) -> int:
        while at < len(self.text) and self.text[at] in " \t\r\n,:":
            at += 1
        return at

    def value(self, at: int, location: Location) -> int:
        """Record the value that starts at or after ``at``; return the position behind it."""
        at = self.skip(at)
        self.lines.setdefault(location, self.line(at))
        if self.text[at] == "{":
            end = self.members(at + 1, location)
        elif self.text[at] == "[":
            end = self.items(at + 1, location)
        else:
            end = self.decoder.raw_decode(self.text, at)[1]
        self.spans[location] = at, end
        return end

    def members(self, at: int, location: Location) -> int:
        while self.text[at := self.skip(at)] != "}":
            line, start = self.line(at), at
            key, at = self.decoder.raw_decode(self.text, at)
            if (*location, key) in self.lines:
                self.duplicates.append((key, line))
            self.lines[(*location, key)], self.keys[(*location, key)] = line, start
            at = self.value(at, (*location, key))
        return at + 1

    def items(self, at: int, location: Location) -> int:
        index = 0
        while self.text[at := self.skip(at)] != "]":
            at = self.value(at, (*location, index))
            index += 1
        return at + 1


class JsonSource:
    """A JSON file's content together with the line of each of its keys."""

    def __init__(self, path: Path, name: str) -> None:
        """Read ``path``; ``name`` is how messages call it. Raises EdgetuneError with the line of a mistake."""
        self.name = name
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise failure(f"{name} does not exist", where=name) from None
        except (OSError, UnicodeDecodeError) as error:
            raise failure(f"{name} cannot be read: {error}", where=name) from None
        walker = _Walker(text)
        try:
            self.data: Any = parse(text)
            walker.value(0, ())
        except json.JSONDecodeError as error:
            marked = text.startswith(_CONFLICT, error.pos)
            raise failure(
                f"not valid JSON: {error.msg} (column {error.colno})",
                where=f"{name}:{error.lineno}",
                hint=_DECIDE if marked else "often a missing or trailing comma on this line or the one above",
            ) from None
        except (ValueError, RecursionError) as error:
            raise failure(f"not usable JSON: {error}", where=f"{name}:1") from None
        self.text, self.spans, self.keys, self.lines = text, walker.spans, walker.keys, walker.lines
        self.duplicates = walker.duplicates

    def where(self, *location: str | int) -> str:
        """Return ``file:line`` of a value, or of the closest enclosing one that exists."""
        while location not in self.lines and location:
            location = location[:-1]
        return f"{self.name}:{self.lines.get(location, 1)}"

    def duplicate_problems(self) -> list[Problem]:
        """Return a problem for each key that stands twice in one object: readers keep only the last."""
        return [
            Problem(f"the key {key!r} appears twice", f"{self.name}:{line}", "remove one of the two")
            for key, line in self.duplicates
        ]

    def replacing(self, location: Location, value: Any) -> "Edit":
        """Return the edit that writes ``value`` in place of the one that stands at ``location``."""
        start, end = self.spans[location]
        return Edit(start, end, self._written(value, start))

    def adding_after(self, location: Location, value: Any) -> "Edit":
        """Return the edit that adds ``value`` behind an item, or behind a member: then ``value`` is (key, value)."""
        start, end = self.spans[location]
        key = ""
        if isinstance(location[-1], str):
            name, value = value
            key = f"{json.dumps(name)}: "
        return Edit(end, end, f",\n{self._indent(start)}{key}{self._written(value, start)}")

    def adding_before(self, location: Location, member: tuple[str, Any]) -> "Edit":
        """Return the edit that adds a member before the one at ``location``."""
        key, value = member
        at = self.keys[location]
        return Edit(at, at, f"{json.dumps(key)}: {self._written(value, at)},\n{self._indent(at)}")

    def edited(self, edits: "list[Edit]") -> str:
        """Return the document with the edits made; all else stays as it is, layout included."""
        text = self.text
        for edit in sorted(edits, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def _indent(self, at: int) -> str:
        line = self.text[self.text.rfind("\n", 0, at) + 1 :]
        return line[: len(line) - len(line.lstrip(" \t"))]

    def _written(self, value: Any, at: int) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + self._indent(at))


def write_edits(source: JsonSource, edits: "list[Edit]", original: Path, new: Path) -> None:
    """Write the edited document as ``new``, with the byte order mark, line ends and mode of ``original``."""
    raw = original.read_bytes()
    encoding = "utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8"
    new.write_text(source.edited(edits), encoding=encoding, newline="\r\n" if b"\r\n" in raw else "\n")
    shutil.copymode(original, new)


class Edit(NamedTuple):
    """A part of a text and what is to stand there instead."""

    start: int
    end: int
    text: str
