"""What the benchmarks share: models with random weights, environments of peers, and where numbers are kept."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgetune import machine

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"
CONSTRAINTS = REPOSITORY / "src/edgetune/constraints.txt"
ENVIRONMENTS = REPOSITORY / ".bench"

_WRITE_MODEL = """
import json, sys
import torch, transformers

values, folder = json.loads(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
config = transformers.AutoConfig.for_model(pad_token_id=0, bos_token_id=0, eos_token_id=0, **values)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder, max_shard_size="2GB")
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


def write_model(name: str, folder: Path) -> None:
    """Write a model with random bfloat16 weights (seed 0). Takes twice the memory of its weights."""
    subprocess.run([sys.executable, "-c", _WRITE_MODEL, json.dumps(MODELS[name]), str(folder)], check=True)


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


def measured(command: list[str], folder: Path, **environment: str) -> tuple[float, float]:
    """Return wall seconds and peak resident memory (MB, 10^6 bytes) of a process. Raises CalledProcessError."""
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.stderr.buffer.write(said)
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e6


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
