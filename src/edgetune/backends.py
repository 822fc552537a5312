"""Models that answer prompts. ``infer`` sees only the protocol; here it is ONNX Runtime GenAI."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.errors import failure, missing_extra
from edgetune.prompt import load_tokenizer

GENAI_CONFIG = "genai_config.json"
"""What ONNX Runtime GenAI reads about an exported model: end tokens, context and search options."""


@dataclass(frozen=True)
class Answer:
    """A generated completion."""

    text: str
    stop_reason: str
    """``stop``: the model ended its answer; ``length``: a limit did."""
    prompt_tokens: int
    answer_tokens: int
    seconds: float


class Backend(Protocol):
    """Continues prompts."""

    max_length: int
    """Most tokens of prompt and answer together."""

    def answer(
        self, prompt_ids: list[int], *, max_new_tokens: int | None, on_text: Callable[[str], None] | None
    ) -> Answer:
        """Generate greedily until an end token or a limit; ``on_text`` gets the pieces as they come."""


def exported_end_ids(genai_config: dict[str, Any]) -> frozenset[int]:
    """Return the ids at which ONNX Runtime GenAI stops."""
    ids = genai_config["model"]["eos_token_id"]
    return frozenset(ids if isinstance(ids, list) else [ids])


class OnnxBackend:
    """An exported model on ONNX Runtime GenAI."""

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise missing_extra("export", error) from None
        self._og = og
        try:
            self._model = og.Model(str(folder))
        except RuntimeError as error:  # the only type the library has
            hint = "run `edgetune export` again"
            raise failure(f"{folder} cannot be loaded: {str(error).splitlines()[0]}", hint=hint) from error
        self._tokenizer = load_tokenizer(folder)
        config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
        self._end_ids = exported_end_ids(config)
        self.max_length = int(config["search"]["max_length"])

    def answer(
        self, prompt_ids: list[int], *, max_new_tokens: int | None, on_text: Callable[[str], None] | None
    ) -> Answer:
        """Generate one answer; the prompt must have fewer than ``max_length`` tokens."""
        from tokenizers.decoders import DecodeStream

        started = time.monotonic()
        length = self.max_length if max_new_tokens is None else len(prompt_ids) + max_new_tokens
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=min(length, self.max_length), do_sample=False)
        generator = self._og.Generator(self._model, parameters)
        generator.append_tokens(prompt_ids)
        stream, ids = DecodeStream(skip_special_tokens=True), []
        while not generator.is_done():
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
            if on_text is not None and (piece := stream.step(self._tokenizer, ids[-1])):
                on_text(piece)
        return Answer(
            text=self._tokenizer.decode(ids, skip_special_tokens=True).strip(),
            stop_reason="stop" if ids and ids[-1] in self._end_ids else "length",
            prompt_tokens=len(prompt_ids),
            answer_tokens=len(ids),
            seconds=round(time.monotonic() - started, 4),
        )
