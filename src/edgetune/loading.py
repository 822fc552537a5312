"""Load weights with transformers: for training, and to be asked afterwards, always in the same way."""

from pathlib import Path
from typing import Any

from edgetune.quantised import Quantisation
from edgetune.schema import FineTuning
from edgetune.stages import Job


def device() -> str:
    """Return where models are trained and asked: ``cuda``, the first device of CUDA that can be seen, or ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_weights(folder: Path, *, dtype: str, trusted: bool, quantisation: Any = None) -> Any:
    """Load a model folder onto :func:`device`, its floating-point weights as ``dtype`` (``auto``: as stored).

    ``quantisation`` is a BitsAndBytesConfig or None.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device()},
        quantization_config=quantisation,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trusted,
    )


def load_base(job: Job, dtype: str, quantisation: Quantisation | None) -> Any:
    """Load the base model as the adapter sits on it: in 4 bits for QLoRA. Raises EdgetuneError without bitsandbytes."""
    configuration = quantisation and quantisation.configuration()
    return load_weights(job.base_folder, dtype=dtype, trusted=job.workflow.trusts_code, quantisation=configuration)


def fine_tuning(job: Job) -> FineTuning:
    """Return the fine-tuning pass of a workflow that has one."""
    assert job.workflow.tuning is not None  # noqa: S101 - steps that ask for it do not run without
    return job.workflow.tuning
