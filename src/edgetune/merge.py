"""Merge the adapter into the base weights: base + ``gen-model/adapter/`` → ``gen-model/merged/``.

Works on the safetensors files themselves, one after the other, so that every tensor the adapter does not
touch, and every configuration and tokenizer file, stays byte for byte what the base model has.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.download import digests
from edgetune.errors import failure, missing_extra
from edgetune.stages import Job, Stage, published

if TYPE_CHECKING:
    import torch

_PEFT_PREFIX = "base_model.model."


def inputs(job: Job) -> dict[str, Any]:
    """Return what the merged weights depend on."""
    return {
        "base": digests(job, weights=True),
        "adapter": [job.keys["train"], published(job.project.stage_folder("train"))],
    }


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Write the merged model. Raises EdgetuneError when part of the adapter fits no tensor of the base."""
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise missing_extra("train", error) from None
    adapter = job.project.stage_folder("train")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    pairs = lora_pairs(load_file(adapter / "adapter_model.safetensors"))
    shards, merged = sorted(job.base_folder.glob("*.safetensors")), 0
    for number, shard in enumerate(shards, start=1):
        with safe_open(shard, framework="pt") as source:
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 - not a mapping
            metadata = source.metadata()
        for name in tensors.keys() & pairs.keys():
            weight = tensors[name]
            tensors[name] = merged_matrix(weight, *pairs.pop(name), scale).to(weight.dtype)
            merged += 1
        save_file(tensors, folder / shard.name, metadata=metadata)
        job.progress.advance(number, len(shards), shard.name)
    if pairs:
        raise failure(
            f"the adapter changes {len(pairs)} tensors that the base model does not have, such as {min(pairs)}",
            where=job.project.name(adapter),
            hint="the adapter was trained on another base model: delete gen-model/adapter and train again",
        )
    for path in job.base_folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    job.progress.say(f"{merged} matrices changed, scale {scale:g}")
    return {"merged_matrices": merged, "scale": scale}


STAGE = Stage("merge", 2, inputs, build)


def lora_pairs(adapter: dict[str, "torch.Tensor"]) -> dict[str, tuple["torch.Tensor", "torch.Tensor"]]:
    """Return A of shape (r, in) and B of shape (out, r) by the name of the base tensor they change."""
    if unknown := [name for name in adapter if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise failure(
            f"the adapter holds {unknown[0]}, which is no LoRA matrix of a linear layer",
            hint="delete gen-model/adapter and train again; target_modules must name linear layers",
        )
    pairs = {}
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            pairs[module.removeprefix(_PEFT_PREFIX) + ".weight"] = (a, adapter[module + ".lora_B.weight"])
    return pairs


def merged_matrix(weight: "torch.Tensor", a: "torch.Tensor", b: "torch.Tensor", scale: float) -> "torch.Tensor":
    """Return W + s·BA (https://arxiv.org/abs/2106.09685, section 4.1) in a wider type than W's, not rounded yet."""
    wide = wider(weight.dtype)
    return weight.to(wide) + scale * (b.to(wide) @ a.to(wide))


def wider(dtype: "torch.dtype") -> "torch.dtype":
    """Return the type in which sums of a weight's dtype have bits to spare."""
    import torch

    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
