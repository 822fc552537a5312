"""Merge the adapter into the base weights: base + ``gen-model/adapter/`` → ``gen-model/merged/``.

Works on the safetensors files themselves, some rows of a tensor at a time: every byte that the adapter does not
change, headers and the other files of the model included, stays what it is in the base model. For QLoRA, the
weights that training saw in 4 bits are merged as training saw them: docs/training.md has the measurement.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.download import digests
from edgetune.errors import failure, missing_extra
from edgetune.quantised import Quantisation
from edgetune.stages import HashedFile, Job, Stage, published
from edgetune.tensors import Tensor, read_bytes, read_file, read_folder

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
    place = job.project.stage_folder("train")
    adapter = Adapter(place)
    if foreign := adapter.names - read_folder(job.base_folder).keys():
        raise failure(
            f"the adapter changes {len(foreign)} tensors that the base model does not have, such as {min(foreign)}",
            where=job.project.name(place),
            hint="the adapter was trained on another base model: delete gen-model/adapter and train again",
        )
    for path, digest in write_merged(job.base_folder, place, folder, job.progress.transfer):
        job.hashes.wrote(path, digest)
    for path in job.base_folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    job.progress.say(f"{len(adapter.names)} matrices changed")
    return {"merged_matrices": len(adapter.names)}


def write_merged(
    base: Path, adapter: Path, folder: Path, report: Callable[[int, int], None]
) -> Iterator[tuple[Path, str]]:
    """Write the merged weights, and yield each file with its sha256.

    ``report`` gets the bytes that are written, and all there will be. Raises EdgetuneError when torch is missing, or
    bitsandbytes for QLoRA.
    """
    try:
        import torch  # noqa: F401 - for a word before anything is written
    except ImportError as error:
        raise missing_extra("train", error) from None
    updates, quantisation = Adapter(adapter), Quantisation.read(adapter)
    paths = sorted(base.glob("*.safetensors"))
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with HashedFile(folder / path.name) as file:
            for data in merged_file(path, updates, quantisation):
                file.write(data)
                done += len(data)
                report(done, total)
        yield folder / path.name, file.sha256


def merged_file(source: Path, adapter: "Adapter", quantisation: Quantisation) -> Iterator[memoryview]:
    """Yield the bytes of a merged file of weights in pieces: those of the base model's with other numbers in places."""
    tensors = read_file(source)
    changed = tensors.keys() & (adapter.names | quantisation.tensors)
    copied = 0
    for name in sorted(changed, key=lambda name: tensors[name].start):
        yield from read_bytes(source, copied, tensors[name].start)
        yield from merged_rows(name, tensors[name], adapter, quantisation)
        copied = tensors[name].end
    yield from read_bytes(source, copied, source.stat().st_size)


def merged_rows(name: str, tensor: Tensor, adapter: "Adapter", quantisation: Quantisation) -> Iterator[memoryview]:
    """Yield the bytes of a merged tensor, some rows at a time."""
    import torch

    update = adapter[name] if name in adapter.names else None
    for rows, weight in quantisation.trained_on(name, tensor):
        merged = weight if update is None else update.rows(rows).applied(weight)
        data: Any = merged.to(tensor.torch_dtype).reshape(-1).view(torch.uint8).numpy()
        yield memoryview(data)


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
        matrix = (self.b.to(wide) @ self.a.to(wide)).mul_(self.scale).add_(weight)
        if self.magnitude is None:
            return matrix
        lengths: torch.Tensor = self.magnitude.to(wide) / matrix.norm(dim=1)
        return matrix.mul_(lengths.unsqueeze(1))


class Adapter:
    """What the adapter in a folder does, by the name of the base model's tensor; its matrices are read one by one.

    Raises EdgetuneError when it holds something else than LoRA and DoRA for linear layers.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self._scale = config["lora_alpha"] / config["r"]
        self._tensors = read_file(folder / "adapter_model.safetensors")
        if unknown := [name for name in self._tensors if not name.endswith(_PARTS)]:
            raise failure(
                f"the adapter holds {unknown[0]}, which is no LoRA matrix of a linear layer",
                hint="delete gen-model/adapter and train again; target_modules must name linear layers",
            )
        modules = [name.removesuffix(_A) for name in self._tensors if name.endswith(_A)]
        self._modules = {f"{module.removeprefix(_PEFT_PREFIX)}.weight": module for module in modules}
        self.names = self._modules.keys()

    def __getitem__(self, name: str) -> Update:
        module = self._modules[name]
        a, b, magnitude = (self._tensors.get(module + part) for part in _PARTS)
        if a is None or b is None:
            raise KeyError(name)
        return Update(a.read(), b.read(), self._scale, None if magnitude is None else magnitude.read())


def wider(dtype: "torch.dtype") -> "torch.dtype":
    """Return the type in which sums of a weight's dtype have bits to spare."""
    import torch

    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
