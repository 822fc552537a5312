"""Check that the merged weights are what the adapter makes of the base model's, some rows of a tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.merge import Update, read_updates, wider
from edgetune.quantised import Quantisation

if TYPE_CHECKING:
    import torch

_SLICE_ELEMENTS = 1 << 24


@dataclass
class MergeFindings:
    """What differs from what the merge ought to have made."""

    matrices: int = 0
    """Matrices that the adapter changes."""
    others: int = 0
    """Tensors that have to be the base model's."""
    wrong: list[str] | None = None
    """What is wrong with which tensor."""
    zero: int = 0
    """LoRA B matrices without any value: nothing was learned there."""
    largest_ulps: float = 0.0
    """The largest difference of an element in units in the last place."""


def compare_weights(base: Path, adapter: Path, merged: Path) -> MergeFindings:
    """Compare every tensor of ``merged`` with what ``base`` and ``adapter`` make it."""
    updates, quantisation = read_updates(adapter), Quantisation.read(adapter)
    found = MergeFindings(matrices=len(updates), wrong=[], zero=sum(not update.b.any() for update in updates.values()))
    originals, results = Tensors(base), Tensors(merged)
    wrong = found.wrong = [f"{name} is missing" for name in sorted(originals.names - results.names)]
    wrong += [f"{name} is not in the base model" for name in sorted((results.names | updates.keys()) - originals.names)]
    for name in sorted(originals.names & results.names):
        original, result = originals[name], results[name]
        if name not in updates:
            found.others += 1
        if (original.get_shape(), original.get_dtype()) != (result.get_shape(), result.get_dtype()):
            wrong.append(f"{name} has another shape or type")
            continue
        if name in quantisation.tensors:
            stored = original[...]
            original = quantisation.trained_on(name, stored)
            original = original if name in updates else original.to(stored.dtype)
        if name not in updates:
            if not all(_same_bits(*both) for _, *both in _slices(original, result)):
                wrong.append(f"{name} is not the base model's")
        elif (ulps := _largest_ulps(original, result, updates[name])) > 1:
            wrong.append(f"{name} is off by {ulps:.3g} units in the last place")
            found.largest_ulps = max(found.largest_ulps, ulps)
        else:
            found.largest_ulps = max(found.largest_ulps, ulps)
    return found


class Tensors:
    """The tensors of a model folder by name, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.names = self._files.keys()

    def __getitem__(self, name: str) -> Any:
        return self._files[name].get_slice(name)


def _slices(original: Any, result: Any) -> Iterator[tuple[slice, "torch.Tensor", "torch.Tensor"]]:
    """Yield some rows of two tensors of the same shape at a time."""
    shape = result.get_shape()
    if not shape:
        yield slice(None), original[...], result[...]
        return
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, _SLICE_ELEMENTS // max(width, 1))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield rows, original[rows], result[rows]


def _same_bits(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _largest_ulps(original: Any, result: Any, update: Update) -> float:
    """Return the largest difference from what the update makes of W, in units in the last place of the stored type.

    The unit is that of the larger of |W| and the sum: where both nearly cancel, the sum has no more exact bits.
    """
    import torch

    largest = 0.0
    for rows, weight, merged in _slices(original, result):
        expected = update.rows(rows).applied(weight)
        wide = wider(weight.dtype)
        magnitude = torch.maximum(expected.abs(), weight.to(wide).abs())
        limits = torch.finfo(merged.dtype)
        _, exponent = torch.frexp(magnitude.clamp(min=limits.smallest_normal))
        ulp = torch.ldexp(torch.full_like(magnitude, limits.eps), exponent - 1)
        ulps = ((merged.to(wide) - expected).abs() / ulp).max()
        largest = max(largest, float(ulps if torch.isfinite(ulps) else torch.inf))
    return largest
