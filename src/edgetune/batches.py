"""Batches for training: the rows of an optimiser step, padded, and how they are cut into micro-batches."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.prompt import Sample, end_token_ids

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label that transformers leaves out of the loss."""
BUDGET = 1024
"""Tokens of a micro-batch on a CPU, padding included: more make its matrix products no faster (docs/training.md)."""
_OVERHEAD = 64
"""How many tokens of padding are worth one micro-batch less."""


class Collator:
    """Pads a batch to its longest row; only completion tokens have labels."""

    def __init__(self, base_folder: Path) -> None:
        # What stands at padded positions is seen by no other position, so any id will do.
        self.padding = min(end_token_ids(base_folder), default=0)

    def __call__(self, samples: list[Sample]) -> dict[str, "torch.Tensor"]:
        """Return ids, labels and mask of the shape rows x tokens."""
        import torch

        width = max(len(sample.ids) for sample in samples)
        shape = (len(samples), width)
        ids = torch.full(shape, self.padding)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample.ids)
            ids[row, :length] = torch.tensor(sample.ids)
            learned = torch.tensor(list(sample.learned), dtype=torch.bool)
            labels[row, :length][learned] = ids[row, :length][learned]
            mask[row, :length] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def micro_batches(
    batch: dict[str, "torch.Tensor"], *, budget: int | None, rows: int
) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield the rows of a batch in groups of similar length, each cut after the last position that is needed.

    A group has at most ``budget`` tokens (None: no limit; a longer row is a group of its own) and ``rows`` rows.
    ``labels`` of the groups are those of the *next* token. Rows of which nothing is learned are left out.
    """
    following = batch["labels"][:, 1:]
    lengths = _needed(following)
    for group in grouped(lengths, budget=budget, rows=rows):
        width = lengths[group[0]]
        yield {
            "input_ids": batch["input_ids"][group, :width],
            "labels": following[group, :width],
            "attention_mask": batch["attention_mask"][group, :width],
        }


def share(batch: dict[str, "torch.Tensor"], number: int, count: int) -> dict[str, "torch.Tensor"]:
    """Return the rows of a batch that are for process ``number`` of ``count``; there may be none."""
    rows = shares(_needed(batch["labels"][:, 1:]), count)[number]
    return {name: tensor[rows] for name, tensor in batch.items()}


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal out row numbers: similar lengths together, so that little is padded; the largest share as small as can be.

    Rows of which nothing is needed are left out.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])

    def cut(most: int) -> list[list[int]]:
        found: list[list[int]] = [[]]
        room = most
        for row in order:
            if lengths[row] > room:
                found.append([])
                room = most
            found[-1].append(row)
            room -= lengths[row]
        return found

    limits = range(max(lengths, default=0), sum(lengths) + 1)
    fits = bisect_left(limits, True, key=lambda most: len(cut(most)) <= count)  # noqa: FBT003 - what is looked for
    found = cut(limits[fits])
    return found + [[] for _ in range(count - len(found))]


def _needed(following: "torch.Tensor") -> list[int]:
    """Return for each row how many positions there are up to the last one whose next token is learned."""
    import torch

    positions = torch.arange(1, following.shape[1] + 1, device=following.device)
    return [int(length) for length in ((following != IGNORED) * positions).amax(dim=1)]


def grouped(lengths: Sequence[int], *, budget: int | None, rows: int) -> list[list[int]]:
    """Return the row numbers of each group, longest rows first: the cut with the least padding and overhead.

    ``best[end]`` is the least cost of the ``end`` longest rows; the last group of a best cut begins at ``start[end]``.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    best, start = [0], [0]
    for end in range(1, len(order) + 1):
        costs: dict[int, int] = {}
        for begin in range(end - 1, max(end - 1 - rows, -1), -1):
            padded = lengths[order[begin]] * (end - begin)
            if costs and budget is not None and padded > budget:
                break
            costs[begin] = best[begin] + padded + _OVERHEAD
        cheapest = min(costs, key=costs.__getitem__)
        best.append(costs[cheapest])
        start.append(cheapest)
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]
