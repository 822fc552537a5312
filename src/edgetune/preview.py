"""Show what will be trained on: counts, lengths, labels, and samples token by token."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgetune.dataset import TRAIN, Tokens
from edgetune.prompt import load_tokenizer
from edgetune.stages import Job

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = [
    {"text": "given", "learned": False, "special": False},
    {"text": "learned", "learned": True, "special": False},
    {"text": "special token", "learned": False, "special": True},
]
"""Tokens that explain the marks of :func:`coloured` and :func:`bracketed`."""

_BAR = 40
_LABELS_SHOWN = 12


def summary(job: Job, found: dict[str, Any], *, bar: str) -> Iterator[str]:
    """Yield lines about every data set; ``bar`` is the character that histograms are drawn with."""
    for role, numbers in found["sets"].items():
        yield "{role:<11} {rows:,} rows, {tokens:,} tokens, longest row {longest}".format(role=role, **numbers)
        yield f"{'':<11} {numbers['learned_tokens'] / numbers['samples']:.1f} tokens learned per sample on average"
        if left_out := numbers["rejected"]:
            rows = f"{left_out:,} {'row' if left_out == 1 else 'rows'}"
            yield f"{'':<11} {rows} left out: {job.project.name(job.project.rejected)}"
        yield from _histogram(numbers["histogram"], bar)
        yield from _labels(numbers["labels"], bar)


def _histogram(bins: list[tuple[int, int, int]], bar: str) -> Iterator[str]:
    most = max(count for *_, count in bins)
    for low, high, count in bins:
        span = f"{low}" if low == high else f"{low}-{high}"
        yield f"{'tokens':>9} {span:>9} {count:>9,} {bar * -(-count * _BAR // most)}".rstrip()


def _labels(labels: dict[str, int], bar: str) -> Iterator[str]:
    total = sum(labels.values())
    for label, count in list(labels.items())[:_LABELS_SHOWN]:
        share = f"{bar * -(-count * _BAR // total)} {count / total:.0%}"
        yield f"{'answer':>9} {_visible(label)[:9]:>9} {count:>9,} {share}"
    if len(labels) > _LABELS_SHOWN:
        yield f"{'':>9} and {len(labels) - _LABELS_SHOWN} other answers"


def samples(job: Job, count: int) -> list[list[dict[str, Any]]]:
    """Return the tokens of the first training samples, each with ``id``, ``text``, ``learned`` and ``special``."""
    from tokenizers.decoders import DecodeStream

    tokens, tokenizer = Tokens(job.project.stage_folder("data"), TRAIN), load_tokenizer(job.base_folder)
    special = set(tokenizer.get_added_tokens_decoder())
    shown = []
    for index in range(min(count, len(tokens))):
        sample, stream = tokens[index], DecodeStream(skip_special_tokens=False)
        shown.append(
            [
                {
                    "id": token,
                    # A character of several tokens comes with the last of them; the others have only their names.
                    "text": text
                    if (text := stream.step(tokenizer, token)) is not None
                    else tokenizer.id_to_token(token),
                    "learned": bool(learned),
                    "special": token in special,
                }
                for token, learned in zip(sample.ids, sample.learned, strict=True)
            ]
        )
    return shown


def coloured(tokens: list[dict[str, Any]]) -> "Text":
    """Return a sample for a terminal: given tokens cyan, learned ones green, special ones in reverse."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        style = ("green" if token["learned"] else "cyan") + (" reverse" if token["special"] else "")
        text.append(_visible(token["text"]), style=style)
        text.append("|", style="dim")
    return text


def bracketed(tokens: list[dict[str, Any]]) -> str:
    """Return a sample without colours: (given), [learned], and {special} inside of these."""
    parts = []
    for token in tokens:
        text = _visible(token["text"])
        text = f"{{{text}}}" if token["special"] else text
        parts.append(f"[{text}]" if token["learned"] else f"({text})")
    return "".join(parts)


def _visible(text: str) -> str:
    """Return a text in which nothing moves the cursor or changes colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
