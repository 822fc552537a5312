"""The base model in 4 bits, as QLoRA trains on it, and its weights as they come out of that.

``gen-model/adapter/quantisation.json`` says which layers the adapter was trained on in 4 bits, and how.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgetune import four_bits
from edgetune.errors import missing_extra
from edgetune.schema import FineTuning, QLoRA
from edgetune.stages import write_json
from edgetune.tensors import Tensor

if TYPE_CHECKING:
    import torch

_RECORD = "quantisation.json"


def bitsandbytes() -> Any:
    """Return the library. Raises EdgetuneError when it is missing."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise missing_extra("qlora", error) from None
    return bitsandbytes


@dataclass(frozen=True)
class Quantisation:
    """Which weights of the base model went through 4 bits, and how; by default none did."""

    quant_type: str = "nf4"
    double_quant: bool = False
    dtype: str = "float32"
    """The type that they had before and have after."""
    compute_dtype: str = "float32"
    """The type they are multiplied in."""
    modules: tuple[str, ...] = ()

    @classmethod
    def wanted(cls, tuning: FineTuning, dtype: str) -> Self | None:
        """Return what a pass asks for; None when it leaves the base model as it is."""
        if not isinstance(tuning, QLoRA):
            return None
        return cls(tuning.quant_type, tuning.double_quant, dtype, tuning.compute_dtype or dtype)

    def configuration(self) -> Any:
        """Return it for transformers. Raises EdgetuneError when bitsandbytes is missing."""
        bitsandbytes()
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def of(self, model: Any) -> Self:
        """Return it with the layers that a loaded model holds so."""
        layer = bitsandbytes().nn.Linear4bit
        return replace(self, modules=tuple(name for name, module in model.named_modules() if isinstance(module, layer)))

    @classmethod
    def read(cls, adapter: Path) -> Self:
        """Return what the adapter in a folder was trained on."""
        path = adapter / _RECORD
        if not path.is_file():
            return cls()
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"modules": tuple(content["modules"])})

    def write(self, adapter: Path) -> None:
        """Leave it beside the adapter."""
        write_json(adapter / _RECORD, asdict(self))

    @property
    def tensors(self) -> set[str]:
        """The names of the weights."""
        return {f"{module}.weight" for module in self.modules}

    def trained_on(self, name: str, weight: Tensor) -> Iterator[tuple[slice, "torch.Tensor"]]:
        """Yield a base weight as training saw it, some rows at a time.

        What comes out of 4 bits is not rounded to the stored type. Raises EdgetuneError when bitsandbytes is missing.
        """
        if name not in self.tensors:
            yield from ((rows, weight.read(rows)) for rows in weight.slices())
            return
        import torch

        bitsandbytes()
        slices = list(weight.slices())
        scales = [four_bits.scales(self._loaded(weight, rows)) for rows in slices]
        if self.double_quant:
            scales = list(torch.split(_in_8_bits(torch.cat(scales)), [len(part) for part in scales]))
        for rows, held in zip(slices, scales, strict=True):
            yield rows, four_bits.rounded(self._loaded(weight, rows), held, self.quant_type)

    def _loaded(self, weight: Tensor, rows: slice) -> "torch.Tensor":
        import torch

        return weight.read(rows).to(getattr(torch, self.dtype))


def _in_8_bits(scales: "torch.Tensor") -> "torch.Tensor":
    """Send the scales of a matrix through 8 bits, all at once as their mean is taken off before.

    As bitsandbytes' ``quantize_4bit`` does with ``compress_statistics`` (QLoRA, arXiv:2305.14314, section 3).
    """
    functional, offset = bitsandbytes().functional, scales.mean()
    packed = functional.quantize_blockwise(scales - offset, blocksize=256)
    held: torch.Tensor = functional.dequantize_blockwise(*packed)
    return held + offset
