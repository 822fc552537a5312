"""Read the rows of JSON and CSV files, the unreadable ones included.

These formats are read here rather than by ``datasets``, whose readers stop at the first bad row and so cannot
tell all that is wrong. Well-formed files give the same rows either way; a test holds the two together.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgetune.data_schema import LoadDataset
from edgetune.errors import Problem
from edgetune.row import Place, Row
from edgetune.source import parse

_DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}  # as JSON writes them
_LEFT_OVER = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes it cannot decode
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CHUNK = 1 << 20  # bytes
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_REST = "correct this place: what follows was not read"


# ---------------------------------------------------------------- JSON


class _RepeatedKeyError(ValueError):
    """A key stands twice in one object."""


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(members)
    if len(values) < len(members):
        keys = [key for key, _ in members]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {repeated!r} appears twice")
    return values


_decode = json.JSONDecoder(object_pairs_hook=_object).decode  # made once: json.loads would make one for each row


def json_rows(path: Path, name: str, encoding: str = "utf-8") -> Iterator[Row]:
    """Yield the rows of a file of JSON lines or with one JSON array."""
    foreign = _foreign_bytes(path, encoding)
    if foreign is not None and foreign.fatal:
        yield Row(None, Place(name, 1), foreign.problem, fatal=True)
        return
    with _open(path, encoding, newline="\n") as file:
        first = _first_character(file)
        if first == "[":
            yield from _array_rows(file.read(), name, foreign)
        elif first == "{" and (fault := _is_one_object(path, encoding)):
            yield Row(None, Place(name, 1), fault, fatal=True)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(line, Place(name, number), foreign)


def _json_row(text: str, place: Place, foreign: "_Foreign | None") -> Row:
    text = text.rstrip("\n")
    if foreign and not is_decoded(text):
        return Row(text, place, foreign.problem)
    try:
        return Row(parse(text, _decode), place)
    except _RepeatedKeyError as error:
        return Row(text, place, Problem(str(error), hint="remove one of the two: readers keep only the last"))
    except ValueError as error:
        return Row(text, place, Problem(f"not valid JSON: {error}", hint="every line must be one JSON object"))


def _is_one_object(path: Path, encoding: str) -> Problem | None:
    """Return what to say of a file that is a single JSON object over several lines."""
    with _open(path, encoding, newline="\n") as file:
        try:
            json.loads(file.readline())
        except (ValueError, RecursionError):
            file.seek(0)
            try:
                json.load(file)
            except (ValueError, RecursionError):
                return None
            hint = "write the rows as one JSON array, or each on a line of its own"
            return Problem("the file is one JSON object, not rows", hint=hint)
    return None


def _array_rows(text: str, name: str, foreign: "_Foreign | None") -> Iterator[Row]:
    """Yield the items of a JSON array one by one: only its text is held."""
    decoder, line, seen, number = json.JSONDecoder(), 1, 0, 0
    at = _behind(text, text.index("[") + 1)
    while not (text.startswith("]", at) and number == 0):
        line, seen, number = line + text.count("\n", seen, at), at, number + 1
        place = Place(name, line, number)
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            yield Row(None, place, Problem(f"not valid JSON: {said}", hint=_REST), fatal=True)
            return
        yield _json_row(text[at:end], place, foreign)
        at = _behind(text, end)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            fault = Problem("not valid JSON: a comma or the closing bracket is missing behind this row", hint=_REST)
            yield Row(None, place, fault, fatal=True)
            return
        at = _behind(text, at + 1)
    if _behind(text, at + 1) < len(text):
        place = Place(name, line + text.count("\n", seen, at))
        yield Row(None, place, Problem("there is text behind the closing bracket", hint=_REST), fatal=True)


def _behind(text: str, at: int) -> int:
    """Return the position of the next character that is no white space (JSON has less of it than Python)."""
    found = _NO_SPACE.search(text, at)
    return found.start() if found else len(text)


# ---------------------------------------------------------------- CSV


def csv_rows(path: Path, name: str, load: LoadDataset) -> Iterator[Row]:
    """Yield the rows of a CSV file; those behind a bad one too."""
    csv.field_size_limit(2**31 - 1)
    foreign = _foreign_bytes(path, load.encoding)
    if foreign is not None and foreign.fatal:
        yield Row(None, Place(name, 1), foreign.problem, fatal=True)
        return
    with _open(path, load.encoding) as file:
        reader = csv.reader(file, delimiter=load.delimiter, strict=True)
        header: list[str] = []
        while True:
            place = Place(name, reader.line_num + 1)
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the next row can be read all the same, unless a quote was never closed
                fault = Problem(f"not valid CSV: {error}", hint="check its quotes")
                yield Row(None, place, fault, fatal="end of data" in str(error))
                continue
            if not header:
                header = fields
                if problem := _header_fault(header, load.delimiter, foreign):
                    yield Row(fields, place, problem, fatal=True)
                    return
            elif foreign and not is_decoded("".join(fields)):
                yield Row(fields, place, foreign.problem)
            elif len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), place)
            elif len(fields) > 1 or "".join(fields).strip():
                yield Row(fields, place, _count_fault(fields, header))


def _header_fault(header: list[str], delimiter: str, foreign: "_Foreign | None") -> Problem | None:
    """Return what is wrong with the columns: a mistake there would repeat itself in every row."""
    if foreign and not is_decoded("".join(header)):
        return foreign.problem
    if "".join(header).lower().startswith("sep="):
        hint = 'remove this line, and write the mark as "delimiter" into load_dataset_config'
        return Problem("the first line is a note for Excel, not the header", hint=hint)
    repeated = {column for column in header if column and header.count(column) > 1}
    if repeated:
        return Problem(f"several columns are called {min(repeated)!r}", hint="rename all but one")
    others = [mark for mark in _DELIMITERS if mark != delimiter and len(header) == 1 and mark in header[0]]
    if others:
        likely = _DELIMITERS[max(others, key=header[0].count)]
        message = f"the header is a single field, {header[0]!r}: it has no delimiter {delimiter!r}"
        return Problem(message, hint=f'write "delimiter": "{likely}" into load_dataset_config')
    return None


def _count_fault(fields: list[str], header: list[str]) -> Problem:
    hint = 'put a field with delimiters into "quotes"'
    if len(fields) > len(header) and not "".join(fields[len(header) :]):
        hint = "remove the delimiters at its end, or add them to the header too"
    return Problem(f"the row does not have {len(header)} fields like the header", hint=hint)


# ---------------------------------------------------------------- encodings


class _Foreign(NamedTuple):
    """What to say of text that is not in the encoding it should be in."""

    problem: Problem
    fatal: bool
    """Whether that goes for the whole file; otherwise for the rows that have such bytes."""


def _foreign_bytes(path: Path, encoding: str) -> _Foreign | None:
    """Look through a whole file for bytes that do not fit; None when there are none."""
    start = _start(path)
    if start.startswith(b"\x1f\x8b"):
        return _Foreign(Problem("the file is compressed", hint="unpack it"), fatal=True)
    if codecs.lookup(encoding).name in ("utf-16-le", "utf-16-be") and start[:2] in _MARKS:
        problem = Problem("the file begins with a byte order mark", hint='write "encoding": "utf-16"')
        return _Foreign(problem, fatal=True)
    is_utf8 = _codec(encoding) == "utf-8-sig"
    like_ascii = not start or b"\0" in start or ("a".encode(encoding) == b"a" and _decodes(path, "ascii"))
    if not is_utf8 and not like_ascii and _decodes(path, "utf-8"):
        problem = Problem(f"the file is UTF-8 text, not {encoding}", hint='remove "encoding" from load_dataset_config')
        return _Foreign(problem, fatal=True)
    if _decodes(path, _codec(encoding)) and not (is_utf8 and b"\0" in start):
        return None
    wide = start[:2] in _MARKS or b"\0" in start
    hint = "save the file as UTF-8"
    if is_utf8:
        hint += f', or say what it is, such as "encoding": "{"utf-16" if wide else "cp1252"}" in load_dataset_config'
    return _Foreign(Problem(f"not {encoding.upper()} text", hint=hint), fatal=wide or not is_utf8)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def _decodes(path: Path, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


def _open(path: Path, encoding: str, newline: str = "") -> io.TextIOWrapper:
    """Open a text file so that bytes of another encoding become marks in their row, not the end of reading."""
    return path.open(encoding=_codec(encoding), errors="surrogateescape", newline=newline)


def _codec(encoding: str) -> str:
    return "utf-8-sig" if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii") else encoding


def _first_character(file: io.TextIOWrapper) -> str:
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character


def is_decoded(text: str) -> bool:
    """Tell whether no byte of ``text`` was left over when it was decoded."""
    return text.isascii() or not _LEFT_OVER.search(text)
