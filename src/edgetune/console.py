"""What commands say: results on stdout, where another program may read them, and remarks on stderr."""

import codecs
import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

if TYPE_CHECKING:
    from edgetune.surroundings import Finding


def write(screen: TextIO, text: str) -> None:
    """Write at once, without a line end."""
    screen.write(text)
    screen.flush()


def tell(text: str) -> None:
    """Remark something."""
    print(text, file=sys.stderr, flush=True)


def as_json(content: Any, indent: int | None = 2, output: str = "") -> str:
    """Return JSON that stays JSON on an output of another encoding than UTF-8 (default: that of stdout)."""
    return json.dumps(content, indent=indent, ensure_ascii=(output or encoding()) != "utf-8")


def encoding() -> str:
    """Return the encoding of stdout, by its plain name."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name


def standard_input() -> BinaryIO:
    """Return the standard input, which may be closed."""
    return sys.stdin.buffer if sys.stdin is not None else io.BytesIO()


def line_reader() -> Callable[[], str]:
    """Return what reads a line: behind a prompt with history on a terminal, plainly from a pipe."""
    if standard_input().isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history
        return partial(input, "> ")
    lines = io.TextIOWrapper(standard_input(), encoding="utf-8", errors="surrogateescape")

    def read() -> str:
        if line := lines.readline():
            return line.rstrip("\r\n")
        raise EOFError

    return read


def show_samples(samples: list[Any]) -> None:
    """Print rows token by token."""
    from edgetune import preview

    colour = is_coloured()
    show_text: Callable[[Any], None] = print
    if colour:
        from rich.console import Console

        show_text = partial(Console().print, soft_wrap=True)
    show = preview.coloured if colour else preview.bracketed
    if samples:
        print("\nsamples as they are trained on, in these marks:", end=" ")
        show_text(show(preview.LEGEND))
    for number, tokens in enumerate(samples, start=1):
        print(f"\n{number}. {len(tokens)} tokens, {sum(token['learned'] for token in tokens)} of them learned")
        show_text(show(tokens))


def is_coloured() -> bool:
    """Tell whether colours are wanted."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_finding(finding: "Finding") -> None:
    """Print what the doctor found."""
    said = f"{finding.name:<12}{finding.summary}" + (f"\n{'':<17}{finding.remedy}" if finding.remedy else "")
    if not is_coloured():
        print(f"{finding.state:<5}{said}")
        return
    from rich.console import Console
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}[finding.state]
    Console().print(Text.assemble((f"{finding.state:<5}", colour), said), soft_wrap=True)
