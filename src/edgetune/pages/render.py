"""Jinja environments of the report and the model card, and how their pages write numbers and other people's texts."""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.filesize import decimal

from edgetune.errors import missing_extra

if TYPE_CHECKING:
    from jinja2 import Environment

DASH = "\N{EN DASH}"
"""Stands where there is no number."""

_LONGEST_TEXT = 400
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


class _Done(str):
    """Markdown that is already as it should be."""

    __slots__ = ()


def html() -> "Environment":
    """Return the environment for HTML: every text is escaped."""
    return _environment(autoescape=True)


def markdown() -> "Environment":
    """Return the environment for Markdown: every text that did not go through a filter of its own is escaped."""
    return _environment(autoescape=False, finalize=_plain)


def _environment(**options: Any) -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing_extra("train", error) from None
    loader = PackageLoader("edgetune.pages")
    environment = Environment(  # noqa: S701 - html() turns escaping on; Markdown has an escape of its own
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    environment.filters |= FILTERS
    return environment


def percent(share: float | None) -> str:
    """Write a share as ``97.9 %``; not rounded up to all of them, nor down to none."""
    if share is None:
        return DASH
    value = round(100 * share, 1)
    if value in (0, 100) and share not in (0, 1):
        return "> 99.9 %" if value else "< 0.1 %"
    return f"{value:g} %" if value in (0, 100) else f"{value:.1f} %"


def number(value: float | None) -> str:
    """Write a number with three digits that count and thousands separators."""
    if value is None:
        return DASH
    if abs(value) >= 100 or value == int(value):  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 0.001 else f"{value:.1e}"  # noqa: PLR2004


def counted(count: int, noun: str) -> str:
    """Write a count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def probability(p: float) -> str:
    """Write a p value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"  # noqa: PLR2004


def seconds(value: float | None) -> str:
    """Write a duration as ``0.05 s``, ``44.4 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    if value is None:
        return DASH
    if value < 60:  # noqa: PLR2004
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"  # noqa: PLR2004
    minutes, rest = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def memory(megabytes: float | None) -> str:
    """Write a peak of memory; systems that cannot tell it report 0."""
    if not megabytes:
        return DASH
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 10_000 else f"{megabytes:,.0f} MB"  # noqa: PLR2004


def size(count: int | None) -> str:
    """Write a number of bytes."""
    return DASH if count is None else decimal(count)


def _four_digits(value: float | None) -> str:
    """Write a number that is close to 1 when all is well: 1.045 and 1.046 are not 1.04 and 1.05."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else number(value)  # noqa: PLR2004


class Metric(NamedTuple):
    """How a metric is called and written."""

    title: str
    write: Callable[[float | None], str]
    meaning: str


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", percent, "share of answers that are the expected label"),
    "macro_f1": Metric("macro F1", percent, "mean of the labels' F1: rare labels count as much as frequent ones"),
    "exact_match": Metric("exact match", percent, "share of answers that are the expected text"),
    "rouge_l": Metric("ROUGE-L", percent, "overlap with the expected text, in the order of its words"),
    "perplexity": Metric(
        "perplexity", _four_digits, "how surprising the expected answers are to the model; 1 is not at all"
    ),
    "ended": Metric("ended", percent, "share of answers that the model ended by itself"),
}


def metric(value: float | None, name: str) -> str:
    """Write the value of a metric."""
    return (METRICS[name].write if name in METRICS else number)(value)


def title(name: str) -> str:
    """Return what a metric is called."""
    return METRICS[name].title if name in METRICS else name


def span(bounds: tuple[float, float]) -> str:
    """Write an interval of shares."""
    low, high = (100 * bound for bound in bounds)
    return f"{low:.1f}{DASH}{high:.1f} %"


def capital(text: str) -> str:
    """Begin a text with a capital and leave the others as they are."""
    return text[:1].upper() + text[1:]


def glued(text: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b|s\b|tokens/s|checks?\b)", "\N{NO-BREAK SPACE}", text)


def short(text: str, most: int = _LONGEST_TEXT) -> str:
    """Return a text in one line, cut where it gets long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _plain(value: Any) -> str:
    """Escape what Markdown would read as marks; line breaks would end a table's row."""
    return value if isinstance(value, _Done) else _MARKUP.sub(r"\\\1", re.sub(r"\s+", " ", str(value)))


def _code(value: Any) -> str:
    """Make a code span that a table can hold."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return _Done(fence + space + text.replace("|", r"\|") + space + fence)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal(value: Any) -> str:
    """Write a string as Python, C# and YAML all read it."""
    text = _json(value)
    # These end a line for C#, and JSON lets them through.
    return _Done(re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text))


FILTERS: Mapping[str, Callable[..., str]] = {
    "capital": capital,
    "code": _code,
    "counted": counted,
    "glued": glued,
    "json": _json,
    "literal": _literal,
    "memory": memory,
    "metric": metric,
    "number": number,
    "percent": percent,
    "probability": probability,
    "raw": _Done,
    "seconds": seconds,
    "short": short,
    "size": size,
    "span": span,
    "title_of": title,
}
