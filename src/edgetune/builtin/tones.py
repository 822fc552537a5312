"""Generate the tone dataset: short phrases labelled joy, sadness, fear or surprise.

`python -m edgetune.builtin.tones DIR` reads nothing and writes `DIR/train.jsonl` and `DIR/eval.jsonl`, one object
with the columns `phrase` and `tone` per line. The same seed gives the same bytes.
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetune.builtin.tone_templates import CLOSINGS, OPENINGS, PATTERNS
from edgetune.builtin.vocabulary import (
    EVENTS,
    MOOD_ADJECTIVES,
    MOOD_STATEMENTS,
    PEOPLE,
    PLACES,
    THINGS,
    TONES,
)

SEED = 7
TRAIN_PER_TONE = 320
EVAL_PER_TONE = 60
MIN_WORDS, MAX_WORDS = 4, 20
SUBJECTS = {
    "person": PEOPLE,
    "event": EVENTS,
    "thing": THINGS,
    "place": PLACES,
    "any": PEOPLE + EVENTS + THINGS,
}
SUBJECT_SLOT = re.compile(r"\{(person|event|thing|place|any)\}")
ENDINGS = (".", ".", ".", "!", "")
FRAMED_SHARE = 0.15
SUBJECTS_PER_TEMPLATE = 14


@dataclass(frozen=True)
class ToneRow:
    """A phrase, its tone, and the template and subject that it was made from."""

    phrase: str
    tone: str
    template: str
    subject: str


def tone_rows(seed: int = SEED) -> tuple[list[ToneRow], list[ToneRow]]:
    """Return the training and the evaluation rows.

    A (template, subject) pair is drawn at most once per tone, and pairs of shared templates drawn for the
    evaluation of one tone are barred from training for every tone, so no evaluation pair is ever trained on.
    """
    rng = random.Random(seed)  # noqa: S311 (text, not secrets)
    pairs = {tone: list(_pairs(rng, patterns)) for tone, patterns in zip(TONES, PATTERNS, strict=True)}
    held_out = {tone: drawn[:EVAL_PER_TONE] for tone, drawn in pairs.items()}
    barred = set(itertools.chain.from_iterable(held_out.values()))
    allowed = {tone: [pair for pair in drawn if pair not in barred] for tone, drawn in pairs.items()}
    trained = {tone: drawn[:TRAIN_PER_TONE] for tone, drawn in allowed.items()}
    seen: set[str] = set()
    evaluation = _make_rows(rng, held_out, seen)
    return _make_rows(rng, trained, seen), evaluation


def _pairs(rng: random.Random, patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield every template once, then every template again with another subject, and so on."""
    subjects = {template: _subjects(template) for template in patterns}
    order = {template: rng.sample(fitting, SUBJECTS_PER_TEMPLATE) for template, fitting in subjects.items()}
    for turn in range(SUBJECTS_PER_TEMPLATE):
        for template in rng.sample(patterns, len(patterns)):
            yield template, order[template][turn]


def _subjects(template: str) -> tuple[str, ...]:
    slot = SUBJECT_SLOT.search(template)
    if slot is None:
        message = f"no subject slot in {template!r}"
        raise ValueError(message)
    return SUBJECTS[slot.group(1)]


def _make_rows(rng: random.Random, drawn: dict[str, list[tuple[str, str]]], seen: set[str]) -> list[ToneRow]:
    rows = []
    for tone, pairs in drawn.items():
        for template, subject in pairs:
            phrase = _phrase(rng, TONES.index(tone), template, subject)
            while phrase in seen or not MIN_WORDS <= len(phrase.split()) <= MAX_WORDS:
                phrase = _phrase(rng, TONES.index(tone), template, subject)
            seen.add(phrase)
            rows.append(ToneRow(phrase, tone, template, subject))
    rng.shuffle(rows)
    return rows


def _phrase(rng: random.Random, mood: int, template: str, subject: str) -> str:
    words = SUBJECT_SLOT.sub(subject, template)
    words = words.replace("{adj}", rng.choice(MOOD_ADJECTIVES[mood]))
    words = words.replace("{says}", rng.choice(MOOD_STATEMENTS[mood]))
    words = re.sub(r"(^|[.?!] )([a-z])", lambda start: start.group(1) + start.group(2).upper(), words)
    closed = words[-1] in "?!"
    ending = "" if closed else rng.choice(ENDINGS)
    frame = rng.random()
    if frame < FRAMED_SHARE:
        return f"{rng.choice(OPENINGS)} {words}{ending}"
    if frame < 2 * FRAMED_SHARE:
        return f"{words}{ending if ending or closed else '.'} {rng.choice(CLOSINGS)}"
    return words + ending


def write_jsonl(rows: list[ToneRow], path: Path) -> None:
    """Write the columns `phrase` and `tone` of the rows, one JSON object per line."""
    text = "".join(json.dumps({"phrase": row.phrase, "tone": row.tone}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> int:
    """Write both files and say on stderr how many rows they have."""
    parser = argparse.ArgumentParser(description="Write the tone dataset: train.jsonl and eval.jsonl.")
    parser.add_argument("folder", type=Path, help="where to write; made if it does not exist")
    folder: Path = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), tone_rows(), strict=True):
        write_jsonl(rows, folder / f"{name}.jsonl")
        sys.stderr.write(f"{folder / name}.jsonl: {len(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
