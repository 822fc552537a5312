"""The tables of docs/memory.md, made from preflight's formulas; `python tests/memory_tables.py` writes them anew."""

import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from edgetune.estimate import MEMORY, Plan, Shape
from edgetune.preflight import RESERVE, changed_keys, fitting

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/memory.md"
MEASURED = ROOT / "tests/benchmarks/preflight.jsonl"
ROW_TOKENS = 512
GIGABYTES = (8, 16, 24)

# Published: hidden size, layers, heads, key-value heads, size of a head, intermediate size, vocabulary, tied.
CATALOGUE = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 30, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (960, 32, 15, 5, 64, 2560, 49152, True),
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "google/gemma-3-1b-it": (1152, 26, 4, 1, 256, 6912, 262144, True),
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 16, 32, 8, 64, 8192, 128256, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 128, 8960, 151936, True),
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "microsoft/Phi-3-mini-4k-instruct": (3072, 32, 32, 32, 96, 8192, 32064, False),
    "microsoft/Phi-3.5-mini-instruct": (3072, 32, 32, 32, 96, 8192, 32064, False),
    "microsoft/Phi-4-mini-instruct": (3072, 32, 24, 8, 128, 8192, 200064, True),
    "mistralai/Mistral-7B-Instruct-v0.3": (4096, 32, 32, 8, 128, 14336, 32768, False),
}


def rendered(model: str) -> Plan:
    """Return what the template renders for a model, with rows of ROW_TOKENS."""
    fused = model.startswith("microsoft/")
    return Plan(
        Shape(*CATALOGUE[model], dtype="bfloat16"),
        method="LoRA",
        dtype="bfloat16",
        r=64,
        targets=("qkv_proj", "o_proj") if fused else ("q_proj", "k_proj", "v_proj", "o_proj"),
        dropout=True,
        batch=1,
        accumulation=4,
        checkpointing=False,
        longest=ROW_TOKENS,
    )


def catalogue_table() -> str:
    """Return what each model of the catalogue takes, and what makes it fit."""
    lines = [
        "| model | train | merge | export | verify | " + " | ".join(f"{size} GB" for size in GIGABYTES) + " |",
        "|" + "---|" * (5 + len(GIGABYTES)),
    ]
    for model in CATALOGUE:
        plan = rendered(model)
        needs = [f"{function(plan) / 1e9:.1f}" for function in MEMORY.values()]
        fits = [what_fits(plan, size * 2**30 - RESERVE) for size in GIGABYTES]
        lines.append(f"| `{model}` | " + " | ".join([*needs, *fits]) + " |")
    return "\n".join(lines)


def what_fits(plan: Plan, available: float) -> str:
    """Say with which settings a plan is trained in this memory, and which of the later steps do not fit."""
    found = plan if MEMORY["train"](plan) <= available else fitting(plan, "train", available)
    if found is None:
        return "no"
    named = ", ".join(f"`{key}: {value}`" for key, value in changed_keys(plan, found).items()) or "as rendered"
    late = [step for step in ("merge", "export", "verify") if MEMORY[step](plan) > available]
    return f"{named}; not {', '.join(late)}" if late else named


def measured_table() -> str:
    """Return the measured peaks with today's estimates."""
    lines = ["| case | step | estimate | measured | ratio |", "|---|---|---|---|---|"]
    for name, step, estimated, peak in comparisons():
        ratio = estimated / peak
        lines.append(f"| {name} | {step} | {estimated / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {ratio:.2f} |")
    return "\n".join(lines)


@cache
def bench() -> Any:
    """Return the script that measures, as a module."""
    sys.path.insert(0, str(MEASURED.parent))
    return importlib.import_module("preflight")


def comparisons() -> list[tuple[str, str, float, float]]:
    """Return case, step, estimate and measured peak (bytes) of all published measurements."""
    found = []
    for line in MEASURED.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        case = bench().Case(**entry["case"])
        plan = case.plan(entry["longest"])
        found += [(case.name, step, MEMORY[step](plan), peak) for step, peak in entry["peaks"].items()]
    return found


def page() -> str:
    """Return docs/memory.md with its tables as they ought to be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("catalogue", catalogue_table()), ("measured", measured_table())):
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"(?s){marks[0]}.*{marks[1]}", f"{marks[0]}\\n{table}\\n{marks[1]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
