"""The pretraining text of the built-in base model, as an endless seeded stream; reads and writes nothing.

Stories and chats in which words of one mood keep company, everyday sentences, and small tasks with short answers.
None of it is a phrase of the tone dataset, and the names of the tones occur only as words to be copied or spelled.
"""

import random
import re
from collections.abc import Callable, Iterator

from edgetune.builtin import vocabulary as words
from edgetune.builtin.story_lines import FRAMES, PLAIN, REPLIES, TOLD, WRITTEN

SEED = 11
USER, ASSISTANT, END, SYSTEM, END_OF_TEXT = "<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END, SYSTEM)
# Shares of all documents; the rest are tasks.
STORIES, MESSAGES = 0.1, 0.55
SYSTEM_SHARE = 0.05
MIXED_MESSAGES = 0.4
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "Be kind and short.", "Reply in a few words.")

KINDS = {
    "animal": words.ANIMALS,
    "food": words.FOODS,
    "tool": words.TOOLS,
    "clothing": words.CLOTHES,
    "plant": words.PLANTS,
    "colour": words.COLOURS,
    "name": words.NAMES,
}
FILLERS = KINDS | {
    "person": words.PEOPLE + words.NAMES,
    "thing": words.THINGS,
    "place": words.PLACES,
    "event": words.EVENTS,
}
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in words.items("""hot/cold, big/small, long/short, wet/dry, old/young, light/dark, open/closed,
        fast/slow, loud/quiet, full/empty, early/late, high/low, near/far, left/right, first/last, strong/weak,
        soft/hard, rich/poor, up/down, in/out, day/night, north/south, east/west, clean/dirty, thick/thin,
        sharp/blunt""")
)
CYCLES = (
    words.items("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    words.items("""January, February, March, April, May, June, July, August, September, October, November,
        December"""),
    words.items("spring, summer, autumn, winter"),
)
NUMBERS = words.items("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve,
    thirteen, fourteen, fifteen, sixteen, seventeen, eighteen""")
COMMON = tuple(noun for kind in KINDS.values() for noun in kind) + words.ABSTRACT * 3

Task = Callable[[random.Random], tuple[str, str]]


def documents(seed: int = SEED) -> Iterator[str]:
    """Yield documents for ever; each ends with the end-of-text token."""
    rng = random.Random(seed)  # noqa: S311 (text, not secrets)
    while True:
        share = rng.random()
        if share < STORIES:
            text = _story(rng)
        elif share < STORIES + MESSAGES:
            text = chat(rng, *_message(rng))
        else:
            text = chat(rng, *rng.choice(TASKS)(rng))
        yield text + END_OF_TEXT


def chat(rng: random.Random, question: str, answer: str) -> str:
    """Return one exchange in the chat format, sometimes with a system turn before it."""
    system = f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}{END}\n" if rng.random() < SYSTEM_SHARE else ""
    return f"{system}{USER}\n{question}{END}\n{ASSISTANT}\n{answer}{END}\n"


def _fill(rng: random.Random, pattern: str, mood: int = 0) -> str:
    slots = FILLERS | {"adj": words.MOOD_ADJECTIVES[mood], "says": words.MOOD_STATEMENTS[mood]}
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(slots[slot.group(1)]), pattern)
    return re.sub(r'(^"?|[.?!] )([a-z])', lambda start: start.group(1) + start.group(2).upper(), text)


def _story(rng: random.Random) -> str:
    mood = rng.randrange(len(TOLD))
    count = rng.randint(2, 4)
    told = [_fill(rng, pattern, mood) for pattern in rng.sample(TOLD[mood], count)]
    plain = [_fill(rng, pattern) for pattern in rng.sample(PLAIN, rng.randint(1, 3))]
    return _sentences(plain + told)


def _sentences(parts: list[str]) -> str:
    return " ".join(part if part.endswith(("?", "!")) else part + "." for part in parts)


def _message(rng: random.Random) -> tuple[str, str]:
    """Return a message of one mood, with or without everyday sentences around it, and a fitting reply."""
    mood = rng.randrange(len(WRITTEN))
    source = rng.choice((WRITTEN[mood], TOLD[mood], FRAMES))
    parts = [_fill(rng, rng.choice(source), mood)]
    if rng.random() < MIXED_MESSAGES:
        parts.insert(rng.randrange(2), _fill(rng, rng.choice(PLAIN)))
    message = _sentences(parts)
    if message.endswith("."):
        message = message[:-1] + rng.choice((".", ".", "!", ""))
    return message, rng.choice(REPLIES[mood])


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = list(rng.choice(OPPOSITES))
    rng.shuffle(pair)
    return rng.choice(("What is the opposite of {}?", "Opposite: {}", "Not {} but ...")).format(pair[0]), pair[1]


def _kind(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    return rng.choice(("What kind of word is {}?", "Kind of word: {}", "{} is a ...")).format(word), kind


def _copy(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(COMMON)
    return rng.choice(("Repeat the word {}.", "Say {}", "Copy: {}", "Just answer {} please.")).format(word), word


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(COMMON)
    return rng.choice(("Spell {}.", "Spell the word {}")).format(word), " ".join(word)


def _next(rng: random.Random) -> tuple[str, str]:
    cycle = rng.choice(CYCLES)
    start = rng.randrange(len(cycle))
    question = rng.choice(("What comes after {}?", "Next after {}:")).format(cycle[start])
    return question, cycle[(start + 1) % len(cycle)]


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randrange(10), rng.randrange(10)
    if rng.randrange(2):
        return f"What is {left} plus {right}?", str(left + right)
    return f"What is {NUMBERS[left]} plus {NUMBERS[right]}?", NUMBERS[left + right]


def _owner(rng: random.Random) -> tuple[str, str]:
    """Ask about one of two sentences: the answer has to be found in the text."""
    names = rng.sample(words.NAMES, 2)
    goods = [f"a {rng.choice(words.COLOURS)} {rng.choice(words.CLOTHES)}", f"a {rng.choice(words.TOOLS)}"]
    rng.shuffle(goods)
    told = " ".join(f"{name} has {good}." for name, good in zip(names, goods, strict=True))
    asked = rng.randrange(2)
    if rng.randrange(2):
        return f"{told} What does {names[asked]} have?", goods[asked].capitalize() + "."
    return f"{told} Who has {goods[asked]}?", names[asked] + "."


def _where(rng: random.Random) -> tuple[str, str]:
    name, place, thing = rng.choice(words.NAMES), rng.choice(words.PLACES), rng.choice(words.THINGS)
    told = f"{name} went to {place} with {thing}."
    question, answer = rng.choice(((f"Where is {name}?", f"At {place}."), (f"What did {name} take?", thing)))
    return f"{told} {question}", answer[0].upper() + answer[1:]


def _same_kind(rng: random.Random) -> tuple[str, str]:
    left, right = rng.choice(list(KINDS)), rng.choice(list(KINDS))
    if rng.randrange(2):
        right = left
    first, second = rng.choice(KINDS[left]), rng.choice(KINDS[right])
    return f"Are {first} and {second} the same kind of thing?", "Yes." if left == right else "No."


def _list(rng: random.Random) -> tuple[str, str]:
    some = rng.sample(COMMON, 3)
    which = rng.randrange(3)
    return f"{', '.join(some)}. Give me the {('first', 'second', 'third')[which]} one.", some[which]


TASKS: tuple[Task, ...] = (_opposite, _kind, _copy, _spell, _next, _add, _owner, _where, _same_kind, _list)
