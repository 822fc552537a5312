"""Time and memory of merging an adapter, against PEFT and against copying and hashing the same bytes, in one run.

Base models have random bfloat16 weights, adapters are LoRA of rank 64 on all linear layers. Every merge is a process of
its own; what is measured begins when its libraries are imported. The files are in the page cache for all of them.
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

from common import MODELS, save

R = 64
SHARD = 2_000_000_000
SMALL = ("135M", "360M", "0.5B", "1.1B")

WRITE = """
import json, sys, torch, transformers
from pathlib import Path
from edgetune.stages import HashedFile

def write(path, shapes, dtype, scale):
    kinds = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4)}
    kind, size = kinds[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(memoryview(len(text).to_bytes(8, "little") + text))
        for shape in shapes.values():
            tensor = (torch.randn(shape) * scale).to(dtype)
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

values, folder, shard, r = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
with torch.device("meta"):
    config = transformers.AutoConfig.for_model(
        pad_token_id=0, bos_token_id=0, eos_token_id=0, dtype="bfloat16", **values
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
files, filled = [[]], 0
for name, shape in shapes.items():
    if filled and filled + 2 * shape.numel() > shard:
        files, filled = [*files, []], 0
    files[-1].append(name)
    filled += 2 * shape.numel()
names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
names = names if len(files) > 1 else ["model.safetensors"]
base, adapter = folder / "base", folder / "adapter"
base.mkdir(); adapter.mkdir()
config.save_pretrained(base)
for name, held in zip(names, files):
    write(base / name, {one: shapes[one] for one in held}, torch.bfloat16, 0.02)
if len(files) > 1:
    places = {one: name for name, held in zip(names, files) for one in held}
    index = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
pairs = {}
for name, layer in layers.items():
    pairs[f"base_model.model.{name}.lora_A.weight"] = torch.Size((r, layer.in_features))
    pairs[f"base_model.model.{name}.lora_B.weight"] = torch.Size((layer.out_features, r))
write(adapter / "adapter_model.safetensors", pairs, torch.float32, 0.02)
targets = sorted({name.rpartition(".")[2] for name in layers})
(adapter / "adapter_config.json").write_text(json.dumps(
    {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "target_modules": targets}
))
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
from edgetune.stages import peak_memory_mb, reset_peak_memory
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
    parser.add_argument("--one-file", action="store_true", help="do not cut the weights into files of 2 GB")
    parser.add_argument("--repeat", type=int, default=2, help="take the fastest of so many")
    parser.add_argument("--without-peft", action="store_true", help="it needs the memory of the whole model")
    parser.add_argument("--scratch", type=Path, help="where the models are written for the time being")
    parser.add_argument("--save", action="store_true", help="keep the numbers for docs/performance.md")
    arguments = parser.parse_args()
    ways = [way for way in WAYS if not (arguments.without_peft and way.startswith("PEFT"))]
    numbers = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            numbers.append(
                measure(name, Path(scratch), 10**15 if arguments.one_file else SHARD, ways, arguments.repeat)
            )
        print(table(numbers[-1:]), flush=True)
    if arguments.save:
        save("merge", numbers, "torch", "transformers", "peft", "safetensors")


def measure(name: str, scratch: Path, shard: int, ways: list[str], repeat: int) -> dict[str, Any]:
    """Merge one model in every way; return seconds and peaks (MB above the imports) by way, and sizes in bytes."""
    write = [sys.executable, "-c", WRITE, json.dumps(MODELS[name]), str(scratch), str(shard), str(R)]
    subprocess.run(write, check=True)
    base, adapter = scratch / "base", scratch / "adapter"
    files = [path.stat().st_size for path in base.glob("*.safetensors")]
    found: dict[str, Any] = {way: [] for way in (COPY, *ways)}
    for _ in range(repeat):
        found[COPY].append({"seconds": copied(base, scratch / "copy"), "peak_mb": 0.0})
        for way in ways:
            target = scratch / ("theirs" if way.startswith("PEFT") else "ours")
            command = [sys.executable, "-c", WAYS[way] + MEASURE, str(base), str(adapter), str(target)]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for folder in ("ours", "theirs"):
            shutil.rmtree(scratch / folder, ignore_errors=True)
    best = {way: {key: min(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()}
    return {"model": name, "files": len(files), "bytes": sum(files), "largest": max(files), "ways": best}


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
