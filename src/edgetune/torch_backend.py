"""Weights in safetensors on transformers: the base model, with an adapter or merged."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import preflight
from edgetune.errors import EdgetuneError, failure, first_line, missing_extra
from edgetune.generation import Backend, Sampling, Speed
from edgetune.loading import load_base, load_weights
from edgetune.prompt import context_length, end_token_ids, load_tokenizer
from edgetune.quantised import Quantisation
from edgetune.stages import Job
from edgetune.stream import Stream, TransformersStreamer

if TYPE_CHECKING:
    from edgetune.generation import Logits

_DEFAULT_CONTEXT = 2048  # of a base model that does not say


class TorchBackend(Backend):
    """Weights in safetensors, with or without an adapter, on transformers."""

    def __init__(self, model: Any, folder: Path, *, max_length: int | None = None) -> None:
        import transformers

        self.model = model.eval()
        # What the model's own file says about sampling must not mix with what is asked for here.
        self.model.generation_config = transformers.GenerationConfig()
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.end_ids = end_token_ids(folder)
        self._cache_bytes = _cache_bytes(self.model)
        context = context_length(folder) or _DEFAULT_CONTEXT
        self.max_length = min(context, max_length or context)

    def logits(self, ids: Sequence[int], start: int) -> "Logits":
        """Run the model once over the ids."""
        import torch

        with torch.inference_mode():
            given = torch.tensor([list(ids[:-1])], device=self.model.device)
            output = self.model(input_ids=given, use_cache=False, logits_to_keep=len(ids) - start)
        return output.logits[0].float().cpu().numpy()  # type: ignore[no-any-return]

    def speed(self, ids: Sequence[int], new_tokens: int) -> Speed:
        """Run the prompt, then token by token on its cache."""
        import torch

        with torch.inference_mode():
            started = time.perf_counter()
            given = torch.tensor([list(ids)], device=self.model.device)
            output = self.model(input_ids=given, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()  # a GPU only has it now
            read = time.perf_counter()
            for _ in range(new_tokens):
                output = self.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            return Speed(read - started, time.perf_counter() - read)

    def _continue(
        self, prompts: list[list[int]], new_tokens: int, sampling: Sampling, stream: Stream | None
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        width = max(map(len, prompts))
        padding = min(self.end_ids, default=0)  # it is masked, so any id will do
        place = self.model.device
        ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=place)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=place)
        options = GenerationConfig(
            max_new_tokens=new_tokens,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=padding,
            **sampling.options,
        )
        streamer = None if stream is None else TransformersStreamer(stream)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=options, streamer=streamer
            )
        return output[:, width:].tolist()  # type: ignore[no-any-return]


def open_model(job: Job, folder: Path, dtype: str) -> TorchBackend:
    """Load a model of the project. Raises EdgetuneError when its files are not what they should be."""
    return TorchBackend(
        _loaded(folder, lambda: load_weights(folder, dtype=dtype, trusted=job.workflow.trusts_code)),
        folder,
        max_length=job.workflow.builder.search.get("max_length"),
    )


def open_with_adapter(job: Job, adapter: Path) -> TorchBackend:
    """Load the base model with its adapter, as they were trained. Raises EdgetuneError as :func:`open_model`."""

    def load() -> Any:
        from peft import PeftModel

        quantisation = Quantisation.read(adapter)
        base = load_base(job, preflight.trained_dtype(job), quantisation if quantisation.modules else None)
        return PeftModel.from_pretrained(base, adapter)

    return TorchBackend(
        _loaded(adapter, load), job.base_folder, max_length=job.workflow.builder.search.get("max_length")
    )


def _loaded(folder: Path, load: Callable[[], Any]) -> Any:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_extra("train", error) from None
    try:
        return load()
    except EdgetuneError:
        raise
    except Exception as error:
        hint = "`edgetune finetune` makes it again; for a base model, `edgetune download --from` brings it back"
        raise failure(f"{folder} cannot be loaded: {type(error).__name__}: {first_line(error)}", hint=hint) from error


def _cache_bytes(model: Any) -> int:
    """Return how much memory the keys and values of a token take."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
