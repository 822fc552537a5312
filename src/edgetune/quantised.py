"""The base model in 4 bits, as QLoRA trains on it, and its weights as they come out of that.

``gen-model/adapter/quantisation.json`` says which layers the adapter was trained on in 4 bits, and how.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgetune.errors import missing_extra
from edgetune.schema import FineTuning, QLoRA
from edgetune.stages import write_json

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

    def trained_on(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Return a base weight as training saw it; what came out of 4 bits is not rounded to the stored type."""
        if name not in self.tensors:
            return weight
        import torch

        functional = bitsandbytes().functional
        before = weight.to(getattr(torch, self.dtype)).contiguous()
        packed, state = functional.quantize_4bit(
            before, quant_type=self.quant_type, compress_statistics=self.double_quant
        )
        result: torch.Tensor = functional.dequantize_4bit(packed, state)
        return result
