"""docs/performance.md and its plot from the kept numbers of the benchmarks.

`python tests/performance_tables.py` writes both anew.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/scaling.svg"
BENCHMARKS = ROOT / "tests/benchmarks"


def kept() -> dict[str, Any]:
    """Return what the benchmarks have saved, by name: the benchmark's, and what follows a hyphen."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (BENCHMARKS / "results").glob("*.json")}


def section(name: str, result: dict[str, Any]) -> str:
    """Return a benchmark's table, and what its numbers belong to."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    benchmark = importlib.import_module(name.partition("-")[0])
    around = result["surroundings"]
    versions = ", ".join(f"{package} {version}" for package, version in around["versions"].items())
    instructions = ", ".join(around["instructions"])
    machine = f"{around['processor']}, {around['cores']} cores ({instructions}), {around['memory_gb']} GB"
    return f"{benchmark.table(result['numbers'])}\n\n*{around['day']}: {machine}; {versions}*"


def page() -> str:
    """Return docs/performance.md with its tables as they ought to be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, result in kept().items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n{section(name, result)}\n{marks[1]}{rest.partition(marks[1])[2]}"
    return text


def plot(results: dict[str, Any]) -> None:
    """Draw how time and memory grow with the parameters of a model, and with the rows of a data set."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scaling"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    exports, merges = results["export"]["numbers"], results["merge"]["numbers"]
    parameters = {entry["model"]: entry["parameters"] for entry in exports}
    curves = [
        ("export", "C0o-", [(e["parameters"], *e["edgetune"]) for e in exports]),
        ("the builder alone", "C0o:", [(e["parameters"], *e["builder"]) for e in exports if "builder" in e]),
        ("merge", "C1s-", _merging(merges, parameters, "edgetune merge")),
        ("PEFT", "C1s:", _merging(merges, parameters, "PEFT merge_and_unload, save")),
    ]
    _panels(panels[0], "parameters", curves)
    sets = results["data"]["numbers"]
    ways = {"data": ("C2^-", "edgetune data"), "datasets and a tokenizer": ("C2^:", "datasets and tokenizer")}
    curves = [
        (label, style, [(e["rows"], *e["ways"][way].values()) for e in sets if way in e["ways"]])
        for label, (style, way) in ways.items()
    ]
    _panels(panels[1], "rows", curves)
    figure.savefig(PLOT, metadata={"Date": None})


def _merging(merges: list[dict[str, Any]], parameters: dict[str, int], way: str) -> list[tuple[float, float, float]]:
    return [
        (parameters[entry["model"]], entry["ways"][way]["seconds"], entry["ways"][way]["peak_mb"])
        for entry in merges
        if way in entry["ways"]
    ]


def _panels(panels: Any, what: str, curves: list[tuple[str, str, list[tuple[float, float, float]]]]) -> None:
    """Fill a row: seconds on the left, peak memory on the right."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for column, unit in ((1, "seconds"), (2, "peak memory, MB")):
        panel = panels[column - 1]
        for label, style, points in curves:
            panel.loglog([point[0] for point in points], [point[column] for point in points], style, label=label)
        panel.set(xlabel=what, ylabel=unit)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(EngFormatter(sep="") if axis is panel.xaxis else "{x:,g}")
            axis.set_minor_formatter(NullFormatter())
        panel.grid(visible=True, alpha=0.3)
    panels[0].legend(fontsize="small")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    plot(kept())
