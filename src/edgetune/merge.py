"""Merge the adapter into the base weights: base + ``gen-model/adapter/`` → ``gen-model/merged/``.

Works on the safetensors files themselves, one after the other, so that every tensor the adapter does not
touch, and every configuration and tokenizer file, stays byte for byte what the base model has. For QLoRA, the
weights that training saw in 4 bits are merged as training saw them: docs/training.md has the measurement.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.download import digests
from edgetune.errors import failure, missing_extra
from edgetune.quantised import Quantisation
from edgetune.stages import Job, Stage, published

if TYPE_CHECKING:
    import torch

_PEFT_PREFIX = "base_model.model."
_PARTS = _A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


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
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing_extra("train", error) from None
    adapter = job.project.stage_folder("train")
    updates, quantisation = read_updates(adapter), Quantisation.read(adapter)
    shards, merged = sorted(job.base_folder.glob("*.safetensors")), 0
    for number, shard in enumerate(shards, start=1):
        with safe_open(shard, framework="pt") as source:
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 - not a mapping
            metadata = source.metadata()
        for name in tensors.keys() & (updates.keys() | quantisation.tensors):
            weight = quantisation.trained_on(name, tensors[name])
            if name in updates:
                weight = updates.pop(name).applied(weight)
                merged += 1
            tensors[name] = weight.to(tensors[name].dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
        job.progress.advance(number, len(shards), shard.name)
    if updates:
        raise failure(
            f"the adapter changes {len(updates)} tensors that the base model does not have, such as {min(updates)}",
            where=job.project.name(adapter),
            hint="the adapter was trained on another base model: delete gen-model/adapter and train again",
        )
    for path in job.base_folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    job.progress.say(f"{merged} matrices changed")
    return {"merged_matrices": merged}


STAGE = Stage("merge", 2, inputs, build)


@dataclass(frozen=True)
class Update:
    """What an adapter does to a matrix W of shape (out, in)."""

    a: "torch.Tensor"
    """LoRA's A, of shape (r, in)."""
    b: "torch.Tensor"
    """LoRA's B, of shape (out, r)."""
    scale: float
    magnitude: "torch.Tensor | None" = None
    """DoRA's length of each row, of shape (out,)."""

    def rows(self, rows: slice) -> "Update":
        """Return what it does to some of the rows."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return replace(self, b=self.b[rows], magnitude=magnitude)

    def applied(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return the merged matrix in a wider type than W's, not rounded yet.

        W + s·BA (https://arxiv.org/abs/2106.09685, section 4.1), for DoRA with each row brought to its length
        (https://arxiv.org/abs/2402.09353, equation 5; PEFT takes rows, as its weights are (out, in)).
        """
        wide = wider(weight.dtype)
        matrix = weight.to(wide) + self.scale * (self.b.to(wide) @ self.a.to(wide))
        if self.magnitude is None:
            return matrix
        lengths: torch.Tensor = self.magnitude.to(wide) / matrix.norm(dim=1)
        return matrix * lengths.unsqueeze(1)


def read_updates(adapter: Path) -> dict[str, Update]:
    """Return what the adapter in a folder does, by the name of the base model's tensor.

    Raises EdgetuneError when it holds something else than LoRA and DoRA for linear layers.
    """
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    if unknown := [name for name in tensors if not name.endswith(_PARTS)]:
        raise failure(
            f"the adapter holds {unknown[0]}, which is no LoRA matrix of a linear layer",
            hint="delete gen-model/adapter and train again; target_modules must name linear layers",
        )
    modules = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    return {
        f"{module.removeprefix(_PEFT_PREFIX)}.weight": Update(
            tensors[module + _A],
            tensors[module + _B],
            config["lora_alpha"] / config["r"],
            tensors.get(module + _MAGNITUDE),
        )
        for module in modules
    }


def wider(dtype: "torch.dtype") -> "torch.dtype":
    """Return the type in which sums of a weight's dtype have bits to spare."""
    import torch

    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
