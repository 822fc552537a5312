"""Charts as SVG elements that stand in an HTML page: its colours, light or dark, and its font are theirs too.

matplotlib draws with placeholder colours, which become CSS variables of the page. The same numbers give the same
bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from edgetune.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _QUIET, _GRID, _MUTED = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b06"
_SERIES = ("#0a0b04", "#0a0b05")
_VARIABLES = {
    _INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _GRID: "var(--line)",
    _MUTED: "var(--muted)",
    _SERIES[0]: "var(--first)",
    _SERIES[1]: "var(--second)",
}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _QUIET,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 72,  # a point is then a CSS pixel
    "font.size": 12.5,
    "grid.color": _GRID,
    "grid.linewidth": 1,
    "svg.fonttype": "none",
    "svg.hashsalt": "edgetune",
    "text.color": _INK,
    "xtick.color": _GRID,
    "xtick.labelcolor": _QUIET,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.labelcolor": _QUIET,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
_WIDTHS = {"wide": 720, "narrow": 340}
"""CSS pixels. Text keeps its size on a phone because a page holds both and shows the one that fits."""

_LOGARITHMIC = 20  # from this ratio of the highest to the lowest loss on


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart."""

    label: str
    value: float
    interval: tuple[float, float]
    """Where the value lies, as far as it is known."""
    text: str


def losses(name: str, log: Sequence[dict[str, Any]]) -> list[str]:
    """Draw the loss of training and evaluation over the steps, wide and narrow; nothing when there is no loss."""
    curves = {
        label: [(entry["step"], entry[key]) for entry in log if key in entry]
        for label, key in (("train", "loss"), ("eval", "eval_loss"))
    }
    values = [value for curve in curves.values() for _, value in curve]
    if not values:
        return []

    def draw(axes: "Axes") -> None:
        for (label, curve), colour in zip(curves.items(), _SERIES, strict=True):
            if curve:
                mark = "o" if label == "eval" or len(curve) == 1 else None
                steps, points = zip(*curve, strict=True)
                axes.plot(steps, points, color=colour, marker=mark, markersize=5, linewidth=2, label=label)
        if min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("optimiser step")
        axes.legend(frameon=False, loc="upper right", labelcolor=_INK)

    return _both(name, "Loss on completions over the optimiser steps", 250, draw)


def bars(name: str, what: str, entries: Sequence[Bar]) -> list[str]:
    """Draw shares from 0 to 1 as horizontal bars, each with its interval, wide and narrow."""

    def draw(axes: "Axes") -> None:
        for place, bar in enumerate(entries):
            last = place == len(entries) - 1
            axes.barh(place, bar.value, height=0.56, color=_SERIES[0] if last else _MUTED, zorder=2)
            axes.plot(bar.interval, (place, place), color=_INK, linewidth=1.5, zorder=3)
            end = max(bar.value, *bar.interval)
            axes.annotate(bar.text, (end, place), (8, 0), textcoords="offset points", va="center_baseline")
        axes.set_yticks(range(len(entries)), [bar.label for bar in entries])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_xlim(0, 1.18)
        axes.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
        axes.spines["bottom"].set_visible(False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    return _both(name, what, 40 + 42 * len(entries), draw)


def _both(name: str, what: str, height: int, draw: "Callable[[Axes], None]") -> list[str]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("train", error) from None
    drawn = []
    for kind, width in _WIDTHS.items():
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            figure.patch.set_visible(False)
            axes = figure.add_subplot()
            axes.patch.set_visible(False)
            draw(axes)
            drawn.append(_inlined(figure, f"{name}-{kind}", kind, what))
    return drawn


def _inlined(figure: "Figure", name: str, kind: str, what: str) -> str:
    """Return the figure as an element whose ids are its own in the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<style.*?</style>", "", text, flags=re.DOTALL)  # its rules would reach the whole page
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    opening = f'<svg class="chart {kind}" {box[0] if box else ""} role="img" aria-label="{escape(what)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()
