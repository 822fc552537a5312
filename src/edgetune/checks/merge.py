"""Check that the merged weights are what the adapter makes of the base model's, some rows of a tensor at a time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.merge import Adapter, Update
from edgetune.quantised import Quantisation
from edgetune.tensors import Tensor, read_folder

if TYPE_CHECKING:
    import torch


@dataclass
class MergeFindings:
    """What differs from what the merge ought to have made."""

    matrices: int = 0
    """Matrices that the adapter changes."""
    others: int = 0
    """Tensors that have to be the base model's."""
    wrong: list[str] = field(default_factory=list)
    """What is wrong with which tensor."""
    zero: int = 0
    """LoRA B matrices without any value: nothing was learned there."""
    largest_ulps: float = 0.0
    """The largest difference of an element in units in the last place."""


def compare_weights(base: Path, adapter: Path, merged: Path) -> MergeFindings:
    """Compare every tensor of ``merged`` with what ``base`` and ``adapter`` make it."""
    updates, quantisation = Adapter(adapter), Quantisation.read(adapter)
    originals, results = read_folder(base), read_folder(merged)
    found = MergeFindings(matrices=len(updates.names))
    wrong = found.wrong
    wrong += [f"{name} is missing" for name in sorted(originals.keys() - results.keys())]
    more = (results.keys() | updates.names) - originals.keys()
    wrong += [f"{name} is not in the base model" for name in sorted(more)]
    for name in sorted(originals.keys() & results.keys()):
        original, result = originals[name], results[name]
        update = updates[name] if name in updates.names else None
        found.others += update is None
        found.zero += update is not None and not update.b.any()
        if (original.shape, original.dtype) != (result.shape, result.dtype):
            wrong.append(f"{name} has another shape or type")
        elif update is None:
            if not _is_same(name, original, result, quantisation):
                wrong.append(f"{name} is not the base model's")
        else:
            ulps = _largest_ulps(quantisation.trained_on(name, original), result, update)
            if ulps > 1:
                wrong.append(f"{name} is off by {ulps:.3g} units in the last place")
            found.largest_ulps = max(found.largest_ulps, ulps)
    return found


def _is_same(name: str, original: Tensor, result: Tensor, quantisation: Quantisation) -> bool:
    """Tell whether a tensor is the base model's, as training saw it, to the last bit."""
    import torch

    if name not in quantisation.tensors:
        return all(original.data(rows) == result.data(rows) for rows in original.slices())
    return all(
        torch.equal(*(weight.to(original.torch_dtype).view(torch.uint8) for weight in (seen, result.read(rows))))
        for rows, seen in quantisation.trained_on(name, original)
    )


def _largest_ulps(original: Iterable[tuple[slice, "torch.Tensor"]], result: Tensor, update: Update) -> float:
    """Return the largest difference from what the update makes of W, in units in the last place of the stored type.

    The unit is that of the larger of |W| and the sum: where both nearly cancel, the sum has no more exact bits.
    """
    import torch

    largest = 0.0
    for rows, weight in original:
        merged = result.read(rows)
        expected = update.rows(rows).applied(weight)
        limits, wide = torch.finfo(merged.dtype), expected.dtype
        magnitude = torch.maximum(expected.abs(), weight.to(wide).abs()).clamp_(min=limits.smallest_normal)
        integer = torch.int64 if wide == torch.float64 else torch.int32
        exponent = torch.tensor(torch.inf, dtype=wide).view(integer)  # the bits of infinity
        power = magnitude.view(integer).bitwise_and_(exponent).view(wide)
        ulps = (merged.to(wide).sub_(expected).abs_().div_(power).max() / limits.eps).item()
        largest = max(largest, ulps if math.isfinite(ulps) else math.inf)
    return largest
