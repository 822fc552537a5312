"""Seconds and peak memory of `edgetune export` to int4 against onnxruntime-genai's own builder, in one run.

Both export the same random weights. edgetune's whole step is measured: hashing its input and output, and loading what
it made, are in it. The builder is left out where it would not fit into memory.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import MODELS, compared, measured, random_project, save

BUILDERS_BYTES = 12
"""Of memory for a weight, at least."""


def main() -> None:
    """Print seconds and memory for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["135M", "0.5B"])
    parser.add_argument("--limit", type=float, default=14, help="gigabytes that the builder may take")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    found = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(compare(name, Path(scratch), arguments.limit * 1e9))
        print(line(found[-1]))
    if arguments.save:
        save("export", found, "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def compare(name: str, scratch: Path, limit: float) -> dict[str, Any]:
    """Export a model both ways."""
    project = scratch / "my-slm"
    base = random_project(project, name, prompt_format="plain", method="none")
    parameters = sum(path.stat().st_size for path in base.glob("*.safetensors")) // 2
    edgetune = [sys.executable, "-m", "edgetune"]
    measured([*edgetune, "data"], project)
    found: dict[str, Any] = {"model": name, "parameters": parameters}
    found["edgetune"] = measured([*edgetune, "export"], project)
    if BUILDERS_BYTES * parameters < limit:
        options = ("-i", base, "-o", scratch / "onnx", "-p", "int4", "-e", "cpu", "-c", scratch / "cache")
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, options)]
        found["builder"] = measured([*builder, "--extra_options", "hf_token=false"], scratch)
    return found


def line(found: dict[str, Any]) -> str:
    """Return a line for a person."""
    return f"{found['model']:>6} ({found['parameters'] / 1e6:,.0f} M)  {compared(found, 'edgetune', 'builder')}"


def table(numbers: list[dict[str, Any]]) -> str:
    """Return the numbers as a Markdown table."""
    lines = ["| model | parameters | edgetune | builder | time | memory |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {found['model']} | {found['parameters'] / 1e6:,.0f} M | {compared(found, 'edgetune', 'builder', ' | ')} |"
        for found in numbers
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
