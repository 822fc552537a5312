"""The tensors of safetensors files, some rows at a time.

A file is a length (8 bytes, little-endian), a header of that length in JSON, and the tensors' bytes, row by row
(https://huggingface.co/docs/safetensors). Files are read, not mapped: mapped pages count as memory of the process.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SLICE_ELEMENTS = 1 << 20  # in float32, these and their sum fit in the cache of one core
_ROWS = 64  # slices begin at multiples of it: so they do at the blocks of 64 elements that QLoRA quantises
_PIECE = 1 << 24  # bytes
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What torch calls the types that models are stored in."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its type and shape, and where its bytes lie."""

    path: Path
    dtype: str
    """The type as the format spells it, such as ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""
    end: int
    """Where they end."""

    def slices(self) -> Iterator[slice]:
        """Yield the rows in turn, as many at a time as are worked on at once."""
        count = self.shape[0] if self.shape else 1
        step = max(1, _SLICE_ELEMENTS // max(1, math.prod(self.shape[1:])) // _ROWS) * _ROWS
        for first in range(0, count, step):
            yield slice(first, min(first + step, count))

    def data(self, rows: slice) -> bytearray:
        """Return the bytes of some rows. Raises EOFError when the file ends before."""
        first, last = rows.start * self._row_bytes, rows.stop * self._row_bytes
        buffer = bytearray(last - first)
        with self.path.open("rb") as file:
            file.seek(self.start + first)
            if file.readinto(buffer) != len(buffer):
                raise EOFError(self.path)
        return buffer

    def read(self, rows: slice | None = None) -> "torch.Tensor":
        """Return some rows, or all of it."""
        import torch

        count = self.shape[0] if self.shape else 1
        data = self.data(rows or slice(0, count))
        flat = torch.frombuffer(data, dtype=self.torch_dtype) if data else torch.empty(0, dtype=self.torch_dtype)
        return flat.reshape(-1, *self.shape[1:]) if self.shape else flat[0]

    @property
    def is_readable(self) -> bool:
        """Whether it holds something, of a type that is known here."""
        return self.dtype in _DTYPES and self.end > self.start

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The type as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[self.dtype])
        return dtype

    @property
    def _row_bytes(self) -> int:
        return (self.end - self.start) // max(1, self.shape[0] if self.shape else 1)


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), *(8 + length + end for end in entry["data_offsets"]))
        for name, entry in header.items()
    }


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model by name."""
    paths = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in read_file(path).items()}


def read_bytes(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """Yield a part of a file in pieces. Raises EOFError when it ends before."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            data = file.read(min(_PIECE, end - start))
            if not data:
                raise EOFError(path)
            start += len(data)
            yield memoryview(data)
