"""Time and memory of merging an adapter, against PEFT and against copying and hashing the same bytes, in one run.

Base models have random bfloat16 weights, adapters are of rank 64 on all linear layers; those of QLoRA were trained on
4 bits of them. Every merge is a process of its own; what is measured begins when its libraries are imported. The files
are in the page cache for all of them, as far as it goes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import FILE_BYTES, MODELS, save, write_model

R = 64
SMALL = ("135M", "0.5B")

WRITE_ADAPTER = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file

from edgetune.quantised import Quantisation

base, adapter, r, method = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))
layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
pairs = {}
for name, layer in layers.items():
    pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, layer.in_features) * 0.02
    pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, r) * 0.02
    if method == "dora":
        pairs[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(layer.out_features)
adapter.mkdir()
save_file(pairs, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
targets = sorted({name.rpartition(".")[2] for name in layers})
(adapter / "adapter_config.json").write_text(json.dumps(
    {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "target_modules": targets,
     "use_dora": method == "dora"}
))
if method == "qlora":
    Quantisation(double_quant=True, dtype="bfloat16", compute_dtype="bfloat16", modules=tuple(layers)).write(adapter)
"""
OURS = """
from edgetune.merge import write_merged
import torch
def run(base, adapter, target):
    target.mkdir()
    list(write_merged(base, adapter, target, lambda done, total: None))
"""
CHECK = """
from edgetune.checks.merge import compare_weights
import torch
def run(base, adapter, target):
    assert not compare_weights(base, adapter, target).wrong
"""
PEFT = """
import torch, transformers, peft
from transformers.models.auto import modeling_auto
def run(base, adapter, target):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(target, max_shard_size="2GB")
"""
MEASURE = """
import json, sys, time
from pathlib import Path
from edgetune.memory import peak_memory_mb, reset_peak_memory
reset_peak_memory()
before, started = peak_memory_mb(), time.monotonic()
run(*map(Path, sys.argv[1:]))
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "peak_mb": (peak_memory_mb() - before) * 2**20 / 1e6}))
"""
WAYS = {"edgetune merge": OURS, "PEFT merge_and_unload, save": PEFT, "edgetune's check of it": CHECK}
COPY = "cp and sha256sum"


def main() -> None:
    """Print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=SMALL, choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--method", choices=("lora", "dora", "qlora"), default="lora", help="qlora: without PEFT")
    parser.add_argument("--one-file", action="store_true", help="do not cut the weights into files of 2 GB")
    parser.add_argument("--repeat", type=int, default=2, help="take the fastest of so many")
    parser.add_argument("--without-peft", action="store_true", help="it needs the memory of the whole model")
    parser.add_argument("--scratch", type=Path, help="where the models are written for the time being")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    alone = arguments.without_peft or arguments.method == "qlora"  # PEFT leaves such a model in 4 bits
    ways = [way for way in WAYS if not (alone and way.startswith("PEFT"))]
    numbers = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            file_bytes = 10**15 if arguments.one_file else FILE_BYTES
            base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
            write_model(name, base, file_bytes)
            given = [str(base), str(adapter), str(R), arguments.method]
            subprocess.run([sys.executable, "-c", WRITE_ADAPTER, *given], check=True)
            imports = "import bitsandbytes\n" if arguments.method == "qlora" else ""
            scripts = {way: imports + WAYS[way] + MEASURE for way in ways}
            numbers.append({"model": name, **measure(base, adapter, scripts, arguments.repeat)})
        print(table(numbers[-1:]), flush=True)
    if arguments.save:
        kind = "-".join([arguments.method] * (arguments.method != "lora") + ["one_file"] * arguments.one_file)
        save(f"merge-{kind}".rstrip("-"), numbers, "torch", "transformers", "peft", "safetensors")


def measure(base: Path, adapter: Path, scripts: dict[str, str], repeat: int) -> dict[str, Any]:
    """Merge one model with each script, by its name.

    Returns seconds and peaks (MB above the imports) by name, and sizes in bytes.
    """
    scratch = base.parent
    files = [path.stat().st_size for path in base.glob("*.safetensors")]
    found: dict[str, Any] = {way: [] for way in (COPY, *scripts)}
    for _ in range(repeat):
        found[COPY].append({"seconds": copied(base, scratch / "copy"), "peak_mb": 0.0})
        for way, script in scripts.items():
            target = scratch / ("theirs" if way.startswith("PEFT") else "ours")
            command = [sys.executable, "-c", script, str(base), str(adapter), str(target)]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for folder in ("ours", "theirs"):
            shutil.rmtree(scratch / folder, ignore_errors=True)
    best = {way: {key: min(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()}
    return {"files": len(files), "bytes": sum(files), "largest": max(files), "ways": best}


def copied(base: Path, target: Path) -> float:
    """Return the seconds that copying and hashing the weights take."""
    target.mkdir()
    started = time.monotonic()
    subprocess.run(["cp", *base.glob("*.safetensors"), target], check=True)
    subprocess.run(["sha256sum", *target.glob("*.safetensors")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def table(numbers: list[dict[str, Any]]) -> str:
    """Return the numbers as Markdown."""
    lines = [
        f"| model | weights | | seconds | ratio to {COPY} | peak above the imports |",
        "|---|---|---|---|---|---|",
    ]
    for entry in numbers:
        size = f"{entry['bytes'] / 1e9:.2f} GB in {entry['files']} file{'s' * (entry['files'] > 1)}"
        plain = entry["ways"][COPY]["seconds"]
        for way, one in entry["ways"].items():
            peak = f"{one['peak_mb']:,.0f} MB" if way != COPY else ""
            lines.append(
                f"| {entry['model']} | {size} | {way} | {one['seconds']:.1f} | {one['seconds'] / plain:.2f} | {peak} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
