"""Weights that go through 4 bits as bitsandbytes' do, the same numbers in a quarter of its time.

bitsandbytes searches the nearest of 16 numbers for each weight and packs what it finds. Here only the way back counts,
so nothing is packed, and a table tells the numbers on both sides of the one boundary that is near.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCK = 64  # weights that share a scale, as in bitsandbytes' quantize_4bit
_CELLS = 1024  # from 0 to 1: in none of them are two boundaries, those of FP4 included
_NEAR = 0.1 / _CELLS  # what rounding may move a number across the edge of its cell, and more
_SMALLEST = 1e-38  # a scale that bitsandbytes divides by


def scales(weight: "torch.Tensor") -> "torch.Tensor":
    """Return the largest magnitude in each block of 64 weights, row by row, in float32; the last may be shorter."""
    return _blocks(weight).abs_().amax(1)


def rounded(weight: "torch.Tensor", held: "torch.Tensor", quant_type: str) -> "torch.Tensor":
    """Return a matrix as 4 bits hold it: for each weight the nearest of 16 numbers, times the scale of its block.

    ``held`` has those scales: :func:`scales`, or what is left of them when they are quantised too. ``quant_type`` is
    ``nf4`` or ``fp4`` (QLoRA, arXiv:2305.14314, section 3). Weights that are not finite come out as such.
    """
    import torch

    boundaries, sides = _table(quant_type)
    blocks = _blocks(weight)
    own = blocks.abs().amax(1).clamp_(min=_SMALLEST).unsqueeze(1)
    last = blocks[-1] / own[-1]
    flat = blocks.mul_(1 / own).view(-1)
    if weight.numel() % _BLOCK:
        blocks[-1] = last  # bitsandbytes multiplies whole blocks by the inverse, which may round to another number
    number = flat * _CELLS
    cell = number.add_(_CELLS).to(torch.int32).clamp_(0, 2 * _CELLS - 1)
    above = flat > torch.index_select(boundaries, 0, cell, out=number)
    torch.index_select(sides, 0, cell.mul_(2).add_(above), out=number)
    number.view(-1, _BLOCK).mul_(held.unsqueeze(1))
    return number[: weight.numel()].to(weight.dtype).view(weight.shape)


def _blocks(weight: "torch.Tensor") -> "torch.Tensor":
    """Return a copy in float32 of shape (blocks, 64), filled up with zeros."""
    import torch

    flat = torch.empty(-(-weight.numel() // _BLOCK) * _BLOCK)
    flat[: weight.numel()] = weight.reshape(-1)
    flat[weight.numel() :] = 0
    return flat.view(-1, _BLOCK)


@cache
def _table(quant_type: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return for each cell of -1 to 1 the boundary that is in it or near, and the numbers below and above that."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    numbers = get_4bit_type(quant_type, device="cpu").sort().values  # type: ignore[no-untyped-call]
    boundaries = (numbers[:-1] + numbers[1:]) / 2
    edges = torch.arange(2 * _CELLS, dtype=torch.float64) / _CELLS - 1
    below = torch.bucketize(edges - _NEAR, boundaries.double())
    above = below.add(1).clamp_(max=len(boundaries))
    none = torch.tensor([torch.inf])
    return torch.cat([boundaries, none])[below], numbers[torch.stack([below, above], 1)].view(-1)
