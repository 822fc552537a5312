"""docs/performance.md from the kept numbers of the benchmarks; `python tests/performance_tables.py` writes it anew."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/performance.md"
BENCHMARKS = ROOT / "tests/benchmarks"


def kept() -> dict[str, Any]:
    """Return what the benchmarks have saved, by their names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (BENCHMARKS / "results").glob("*.json")}


def section(name: str, result: dict[str, Any]) -> str:
    """Return a benchmark's table, and what its numbers belong to."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    around = result["surroundings"]
    versions = ", ".join(f"{package} {version}" for package, version in around["versions"].items())
    instructions = ", ".join(around["instructions"])
    machine = f"{around['processor']}, {around['cores']} cores ({instructions}), {around['memory_gb']} GB"
    return f"{importlib.import_module(name.partition("-")[0]).table(result['numbers'])}\n\n*{around['day']}: {machine}; {versions}*"


def page() -> str:
    """Return docs/performance.md with its tables as they ought to be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, result in kept().items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n{section(name, result)}\n{marks[1]}{rest.partition(marks[1])[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
