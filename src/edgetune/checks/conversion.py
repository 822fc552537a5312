"""Check that onnxruntime-genai's builder translates the model's architecture faithfully.

The first layers of the merged model, in float32 on both sides: what differs then is a fault of the conversion, not of
quantisation. A few layers are enough, as long as every kind of layer is among them.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import adapters
from edgetune.export import run_builder
from edgetune.merge import Adapter
from edgetune.onnx_backend import OnnxBackend
from edgetune.stages import Job, write_json
from edgetune.tensors import Tensor, read_folder
from edgetune.torch_backend import open_model

_WEIGHTS = "model.safetensors"
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_VOCABULARY = 4096
_SHORT = 256
_LONGEST = 32768  # tokens; longer texts would take minutes
_BEYOND = 64


@dataclass(frozen=True)
class ConversionFindings:
    """How far the logits of the exported layers are from those of transformers."""

    layers: int
    of_layers: int
    positions: int
    longest: int
    """Tokens of the longest text compared."""
    difference: float
    """The largest difference as a share of the largest logit."""
    same_top: float
    """Share of positions with the same most likely token."""


def compare_conversion(job: Job, model: Path, work: Path) -> ConversionFindings:
    """Export the first layers of ``model`` in float32 and compare logits; ``work`` is used and emptied."""
    import numpy as np

    shutil.rmtree(work, ignore_errors=True)
    prefix, exported = work / "torch", work / "onnx"
    layers, of_layers = write_prefix(job, model, prefix)
    exported.mkdir()
    run_builder(job, prefix, exported, "fp32", {})
    if adapters.is_beside(job):
        _put_beside(exported, prefix, Adapter(job.project.stage_folder("train")))
    reference, converted = open_model(job, prefix, "float32"), OnnxBackend(exported)
    config = json.loads((prefix / "config.json").read_text(encoding="utf-8"))
    difference, same, positions, texts = 0.0, 0, 0, _texts(config, job.workflow.builder.search.get("max_length"))
    for ids, start in texts:
        one, other = reference.logits(ids, start), converted.logits(ids, start)
        distance = np.abs(one - other).max() / np.abs(one).max()
        difference = max(difference, float(distance) if np.isfinite(distance) else float("inf"))
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        positions += len(one)
    del reference, converted
    shutil.rmtree(work, ignore_errors=True)
    return ConversionFindings(
        layers, of_layers, positions, max(len(ids) for ids, _ in texts) - 1, difference, same / positions
    )


def _put_beside(exported: Path, prefix: Path, adapter: Adapter) -> None:
    """Put the adapter beside the exported layers, and merge it into the others, in float32."""
    from safetensors.torch import save_file

    weights = {name: tensor.read() for name, tensor in read_folder(prefix).items()}
    names = sorted(adapter.names & weights.keys())
    adapters.put_beside(exported, adapter, names)
    weights |= {name: adapter[name].applied(weights[name]).float() for name in names}
    save_file(weights, prefix / _WEIGHTS, metadata={"format": "pt"})


def write_prefix(job: Job, model: Path, target: Path) -> tuple[int, int]:
    """Write the smallest beginning of a model with all its kinds of layers, in float32.

    Returns how many layers it has, and how many the model has. The vocabulary is cut as well: its rows are all
    alike, and it is most of what small models weigh.
    """
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, target / path.name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tensors = read_folder(model)
    layers = prefix_length(layer_kinds(model, tensors, trusted=job.workflow.trusts_code))
    vocabulary = config["vocab_size"]
    kept = {}
    for name, tensor in tensors.items():
        if (found := _LAYER.search(name)) and int(found[1]) >= layers:
            continue
        cut = tensor.shape and tensor.shape[0] == vocabulary > _VOCABULARY
        kept[name] = tensor.read(slice(0, _VOCABULARY) if cut else None).float()
    save_file(kept, target / _WEIGHTS, metadata={"format": "pt"})
    write_json(target / "config.json", _prefix_config(config, layers, min(vocabulary, _VOCABULARY)))
    return layers, config["num_hidden_layers"]


def layer_kinds(model: Path, tensors: Mapping[str, Tensor], *, trusted: bool) -> list[Any]:
    """Return for each layer what sets it apart: its entries in the lists of the configuration, and its shapes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trusted)
    count = config.num_hidden_layers
    lists = [entries for entries in config.to_dict().values() if isinstance(entries, list) and len(entries) == count]
    shapes: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(count)]
    for name in sorted(tensors):
        if (found := _LAYER.search(name)) and int(found[1]) < count:
            shapes[int(found[1])].append((_LAYER.sub("", name), tensors[name].shape))
    return [([entries[layer] for entries in lists], shapes[layer]) for layer in range(count)]


def prefix_length(kinds: list[Any]) -> int:
    """Return how many of the first layers have all the kinds among them."""
    return max((kinds.index(kind) + 1 for kind in kinds), default=0)


def _prefix_config(config: dict[str, Any], layers: int, vocabulary: int) -> dict[str, Any]:
    """Return the configuration for fewer layers and token ids; its other words stay."""
    count = config["num_hidden_layers"]
    changed: dict[str, Any] = {
        name: value[:layers] for name, value in config.items() if isinstance(value, list) and len(value) == count > 1
    }
    changed |= {
        name: 0
        for name, value in config.items()
        if name.endswith("_token_id") and max(value if isinstance(value, list) else [value or 0]) >= vocabulary
    }
    dtype = {"dtype" if "dtype" in config else "torch_dtype": "float32"}
    return config | changed | dtype | {"num_hidden_layers": layers, "vocab_size": vocabulary}


def _texts(config: dict[str, Any], max_length: int | None) -> list[tuple[list[int], int]]:
    """Return random ids and the position from which logits are compared.

    One text is longer than the context a stretched position encoding began with, one longer than a sliding window if
    the exported model reads such texts.
    """
    context = config["max_position_embeddings"]
    original, window = (config.get(name) or 0 for name in ("original_max_position_embeddings", "sliding_window"))
    limits = [original, window] if window + _BEYOND <= (max_length or context) else [original]
    beyond = [limit + _BEYOND for limit in limits if 0 < limit < context and limit <= _LONGEST]
    choose = random.Random(0)  # noqa: S311 - no secret hangs on it

    def ids(length: int) -> list[int]:
        return [choose.randrange(config["vocab_size"]) for _ in range(length + 1)]

    return [(ids(min(_SHORT, context - 1)), 1), *((text := ids(n), len(text) - _BEYOND) for n in beyond)]
