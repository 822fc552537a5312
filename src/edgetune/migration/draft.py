"""The old file, read key by key, and the new one, which knows where in the old one its values stand."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from edgetune.errors import Problem, failure
from edgetune.migration.names import RULES
from edgetune.source import JsonSource, Location


class Old(NamedTuple):
    """A value of the old file, and where it stands."""

    value: Any
    place: Location


@dataclass(frozen=True)
class Note:
    """One thing that is different in the new file, or that is left to the user."""

    kind: Literal["changed", "left out", "to do"]
    line: int
    where: str
    """``file:line`` of the old file."""
    text: str


class Part(dict[str, Any]):
    """An object of the new file."""

    def __init__(self, place: Location) -> None:
        super().__init__()
        self.place = place
        self.places: dict[str, Location] = {}

    def put(self, key: str, value: Any, place: Location | None = None) -> None:
        """Set a key; ``place`` is where the old file says so."""
        self[key] = value
        self.places[key] = self.place if place is None else place


@dataclass
class Draft:
    """What a migration has found so far."""

    source: JsonSource
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def at(self, place: Location) -> Any:
        """Return the old value at a place."""
        value = self.source.data
        for step in place:
            value = value[step]
        return value

    def changed(self, place: Location, key: str, now: str = "", reason: str = "") -> None:
        """Note a key that stands elsewhere, or has another name or value; ``key`` has the rule."""
        rule = RULES.get(key)
        today, why = (rule.today, rule.reason) if rule else ("", "")
        self._note("changed", place, f"→ {now or today}", reason or why)

    def left_out(self, place: Location, reason: str = "") -> None:
        """Note a key that is not in the new file, nor is anything instead."""
        rule = RULES.get(str(place[-1]))
        known = rule.reason if rule else "nothing reads this key today"
        self._note("left out", place, "is left out", reason or known)

    def to_do(self, place: Location, text: str) -> None:
        """Note what only the user can do."""
        self._note("to do", place, "", text)

    def refused(self, place: Location, message: str, hint: str) -> None:
        """Note what nothing can be made of: there will be no new file."""
        self.problems.append(Problem(f"{dotted(place)}: {message}", self.source.where(*place), hint))

    def _note(self, kind: Literal["changed", "left out", "to do"], place: Location, what: str, why: str) -> None:
        where = self.source.where(*place)
        ignored = (rule := RULES.get(str(place[-1]) if place else "")) and rule.ignored and kind != "to do"
        text = f"{dotted(place)} {what}".strip() + f": {why}" + ("; stock Olive ignores the old key" if ignored else "")
        self.notes.append(Note(kind, int(where.rpartition(":")[2]), where, text))


class Section:
    """An object of the old file. Each key is taken once; :meth:`leave_rest` tells of those nobody took."""

    def __init__(self, draft: Draft, place: Location, blocks: Iterable[str] = ()) -> None:
        """Read the object at ``place``, the keys of ``blocks`` inside it included, as Olive does."""
        self.draft, self.place = draft, place
        self.places: dict[str, Location] = {}
        self.absorb(place, blocks)

    def absorb(self, place: Location, blocks: Iterable[str] = ()) -> None:
        """Read the keys of one more object; those of blocks win, as in Olive."""
        content = self.draft.at(place)
        if not isinstance(content, dict):
            raise failure(f"{dotted(place) or 'the file'} is no JSON object", where=self.draft.source.where(*place))
        inner = [key for key in content if key in blocks and isinstance(content[key], dict)]
        for key, value in content.items():
            if key not in inner and value is not None:
                if key in self.places:
                    self.draft.left_out(self.places[key], "the key stands twice, and Olive takes the inner one")
                self.places[key] = (*place, key)
        for key in inner:
            self.draft.changed((*place, key), key)
            self.absorb((*place, key), blocks)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def take(self, *keys: str) -> Old | None:
        """Return the value of the first of these keys that is there, and count it as read."""
        for key in keys:
            if (place := self.places.pop(key, None)) is not None:
                return Old(self.draft.at(place), place)
        return None

    def section(self, key: str, *blocks: str) -> "Section | None":
        """Return the object at a key, if there is one."""
        found = self.take(key)
        return None if found is None else Section(self.draft, found.place, blocks)

    def carry(self, part: Part, keys: Iterable[str]) -> None:
        """Put these keys into the new file as they are."""
        for key in keys:
            if found := self.take(key):
                part.put(key, found.value, found.place)

    def leave_rest(self, known: Iterable[str] = (), reason: str = "") -> None:
        """Tell which keys are left out, and of which key of today each may be a misspelling."""
        from difflib import get_close_matches

        for key, place in self.places.items():
            near = get_close_matches(key, list(known), n=1, cutoff=0.8)
            unknown = f"nothing reads this key; did you mean {near[0]!r}?" if near else reason
            self.draft.left_out(place, "" if key in RULES else unknown)
        self.places.clear()


def dotted(place: Location) -> str:
    """Return a place as people write it: ``passes.lora.lora_r``."""
    return ".".join(str(step) for step in place)


def where_was(source: JsonSource, new: Part, *location: str | int) -> str:
    """Return ``file:line`` of the old file for a value of the new one, or for what it was made of."""
    value: Any = new
    place = new.place
    for step in location:
        if isinstance(value, Part):
            place = value.places.get(str(step), value.place)
            value = value.get(str(step))
        elif isinstance(value, dict):
            place, value = (*place, step), value.get(str(step))
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            place, value = (*place, step), value[step]
        else:
            break
        if isinstance(value, Part):
            place = value.place
    return source.where(*place)


def free_name(wanted: str, taken: Collection[str]) -> str:
    """Return ``wanted``, or with a number behind it the first that is not taken."""
    names = (wanted if n == 1 else f"{wanted}_{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
