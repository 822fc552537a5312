"""What the benchmarks share: models with random weights, environments of peers, and where numbers are kept."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Container
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from copier import run_copy

from edgetune import machine

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"
BUILT_IN = REPOSITORY / "src/edgetune/builtin/tiny-phi3"
CONSTRAINTS = REPOSITORY / "src/edgetune/constraints.txt"
ENVIRONMENTS = REPOSITORY / ".bench"

_POLL_SECONDS = 0.02
FILE_BYTES = 2_000_000_000
_WRITE_MODEL = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file

values, folder, limit = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = transformers.AutoConfig.for_model(pad_token_id=0, bos_token_id=0, eos_token_id=0, dtype="bfloat16", **values)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
config.architectures = [type(model).__name__]
config.save_pretrained(folder)
shards, size = [[]], 0
for name, weight in model.named_parameters():
    size += 2 * weight.numel()
    if size > limit and shards[-1]:
        shards.append([])
        size = 2 * weight.numel()
    shards[-1].append((name, weight.shape))
places = {}
for number, shard in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
    places |= {name: file for name, _ in shard}
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range)
        for name, shape in shard
    }
    save_file(tensors, folder / file, metadata={"format": "pt"})
if len(shards) > 1:
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""


def sizes(kind: str, *numbers: int, tied: bool) -> dict[str, Any]:
    """Return a configuration from hidden size, layers, heads, key-value heads, intermediate size and vocabulary."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = dict(zip((*names, "vocab_size"), numbers, strict=True))
    return {"model_type": kind, "tie_word_embeddings": tied, "max_position_embeddings": 4096, **config}


# The sizes of SmolLM2, Qwen2.5, TinyLlama and Phi-3-mini.
MODELS = {
    "135M": sizes("llama", 576, 30, 9, 3, 1536, 49152, tied=True),
    "360M": sizes("llama", 960, 32, 15, 5, 2560, 49152, tied=True),
    "0.5B": sizes("qwen2", 896, 24, 14, 2, 4864, 151936, tied=True),
    "1.1B": sizes("llama", 2048, 22, 32, 4, 5632, 32000, tied=False),
    "1.5B": sizes("qwen2", 1536, 28, 12, 2, 8960, 151936, tied=True),
    "3.8B": sizes("phi3", 3072, 32, 32, 32, 8192, 32064, tied=False),
}


def write_model(name: str, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write a model of MODELS with random bfloat16 weights (seed 0) and the built-in model's tokenizer.

    Its files have at most so many bytes, or one tensor.
    """
    command = [sys.executable, "-c", _WRITE_MODEL, json.dumps(MODELS[name]), str(folder), str(file_bytes)]
    subprocess.run(command, check=True, capture_output=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((BUILT_IN / file).read_bytes())


def random_project(project: Path, model: str, **answers: str) -> Path:
    """Render a project whose base model has random weights; return that model's folder."""
    answers |= {"base_model": "custom", "custom_model": f"random/{model}"}
    run_copy(str(REPOSITORY), project, data=answers, defaults=True, quiet=True, vcs_ref="HEAD")
    base = project / "model-cache/random" / model
    write_model(model, base)
    return base


def peer(name: str) -> Path:
    """Return the interpreter of a peer's environment, made from ``peers/<name>.txt`` when it is missing or outdated.

    torch comes from this environment's wheel cache or index, at the version that edgetune is tested with.
    """
    requirements = (PEERS / f"{name}.txt").read_text(encoding="utf-8")
    folder = ENVIRONMENTS / name
    python, made = folder / "bin/python", folder / "made-from.txt"
    if made.is_file() and made.read_text(encoding="utf-8") == requirements:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--requirement", str(PEERS / f"{name}.txt")], check=True)
    made.write_text(requirements, encoding="utf-8")
    return python


def measured(
    command: list[str], folder: Path, accepted: Container[int] = (0,), **environment: str
) -> tuple[float, float]:
    """Return wall seconds and peak resident memory (MB, 10^6 bytes) of a process and all that it starts.

    Pages that they share count for each. Raises CalledProcessError when it ends with a code that is not accepted.
    """
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=said
        )
        while process.poll() is None:
            peak = max(peak, resident(process))
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode not in accepted:
            said.seek(0)
            sys.stderr.buffer.write(said.read())
            raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak / 1e6


def resident(process: psutil.Process) -> int:
    """Return the bytes of memory that a process and its children have now."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def compared(found: dict[str, Any], ours: str, peer: str, gap: str = "  ") -> str:
    """Return seconds and MB of both, and the ratios; ``-`` where the peer was not run."""
    parts = [
        f"{seconds:.1f} s, {megabytes:,.0f} MB"
        for seconds, megabytes in (found[name] for name in (ours, peer) if name in found)
    ]
    if peer in found:
        speed, memory = found[peer][0] / found[ours][0], found[ours][1] / found[peer][1]
        return gap.join([*parts, f"x{speed:.2f}", f"x{memory:.2f}"])
    return gap.join([*parts, "-", "-", "-"])


def surroundings(*packages: str) -> dict[str, Any]:
    """Return what belongs to every number: the machine, the day, and the versions."""
    memory = machine.memory_bytes()
    return {
        "processor": machine.processor(),
        "instructions": sorted(
            {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"} & (machine.cpu_features() or set())
        ),
        "cores": machine.cores(),
        "memory_gb": round(memory.total / 1e9) if memory else None,
        "day": datetime.now(tz=UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("edgetune", *packages)},
    }


def save(name: str, numbers: Any, *packages: str) -> None:
    """Keep the numbers of a benchmark, for docs/performance.md."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"surroundings": surroundings(*packages), "numbers": numbers}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
