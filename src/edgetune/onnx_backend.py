"""Exported models on ONNX Runtime GenAI, with the adapter beside them where there is one."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import adapters, machine
from edgetune.errors import failure, first_line, missing_extra
from edgetune.generation import Backend, Sampling, Speed
from edgetune.prompt import load_tokenizer
from edgetune.stages import read_json
from edgetune.stream import Stream

if TYPE_CHECKING:
    from edgetune.generation import Logits

GENAI_CONFIG = "genai_config.json"
"""What ONNX Runtime GenAI reads about an exported model: end tokens, context and search options."""

_PLAIN_SEARCH = {"num_beams": 1, "num_return_sequences": 1, "min_length": 0, "no_repeat_ngram_size": 0}
"""What the model's own file says about these must not mix with what is asked for here."""

_MIND_PADDING = {"lfm2"}
"""Types of models whose layers of convolution read the padding of a batch as if it were text."""


class OnnxBackend(Backend):
    """An exported model on ONNX Runtime GenAI."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        """Load the model in ``folder``, and an adapter for it: its own if it has one, unless another is given."""
        self.model = load_exported(folder)
        import onnxruntime_genai as og

        self._og = og
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
        self.end_ids = exported_end_ids(config)
        self.max_length = int(config["search"]["max_length"])
        self._model = config["model"]
        # The library sets memory aside for the whole length of every row: float32 keys and values on a CPU.
        decoder = self._model["decoder"]
        self._cache_bytes = 8 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        self._padding = int(config["model"]["pad_token_id"])
        self._adapters = None
        if (path := adapter or adapters.own(folder)).is_file():
            self._adapters = og.Adapters(self.model)
            self._adapters.load(str(path.absolute()), adapters.OWN)

    def logits(self, ids: Sequence[int], start: int) -> "Logits":
        """Run the model once over the ids."""
        generator = self._generator(1, max_length=len(ids))
        generator.append_tokens(list(ids[:-1]))
        return generator.get_output("logits")[0, start - 1 :].astype("float32")  # type: ignore[no-any-return]

    def speed(self, ids: Sequence[int], new_tokens: int) -> Speed:
        """Run the prompt, then token by token; ``min_length`` keeps the answer from ending."""
        length = len(ids) + new_tokens
        generator = self._generator(1, max_length=length + 1, min_length=length + 1)
        started = time.perf_counter()
        generator.append_tokens(list(ids))
        read = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return Speed(read - started, time.perf_counter() - read)

    def _generator(self, batch_size: int, **options: Any) -> Any:
        parameters = self._og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch_size, **{**_PLAIN_SEARCH, **options})
        generator = self._og.Generator(self.model, parameters)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, adapters.OWN)
        return generator

    def _rows_at_once(self, length: int, sampling: Sampling) -> int:
        # The library takes padding for something that was said, and would count it as a repetition.
        alone = sampling.repetition_penalty != 1 or self._model["type"] in _MIND_PADDING
        return 1 if alone else super()._rows_at_once(length, sampling)

    def _continue(
        self, prompts: list[list[int]], new_tokens: int, sampling: Sampling, stream: Stream | None
    ) -> list[list[int]]:
        # The library takes the padding id for padding wherever it stands in a batch.
        if len(prompts) > 1 and any(self._padding in prompt for prompt in prompts):
            return [self._continue([prompt], new_tokens, sampling, stream)[0] for prompt in prompts]
        width = max(map(len, prompts))
        options = {**sampling.options, **({} if sampling.seed is None else {"random_seed": sampling.seed})}
        if "top_k" in options:  # the library reads beyond its vocabulary, where transformers takes all of it
            options["top_k"] = min(options["top_k"], self._model["vocab_size"])
        generator = self._generator(len(prompts), max_length=width + new_tokens, **options)
        generator.append_tokens([prompt + [self._padding] * (width - len(prompt)) for prompt in prompts])
        answers: list[list[int]] = [[] for _ in prompts]
        while not generator.is_done():
            generator.generate_next_token()
            for answer, token in zip(answers, generator.get_next_tokens(), strict=True):
                answer.append(int(token))
            if stream is not None:
                stream.put(answers[0][-1])
        return answers


_DEVICES = {"cpu": "a CPU", "cuda": "an NVIDIA GPU (CUDA)", "dml": "a GPU on Windows (DirectML)"}
"""What an exported model runs on, by the builder's name of the execution provider."""


def load_exported(folder: Path, *, where: str = "", hint: str = "run `edgetune export` again") -> Any:
    """Load an exported model. Raises EdgetuneError with the hint, or what its device asks for if that is why."""
    try:
        import onnxruntime_genai as og
    except ImportError as error:
        raise missing_extra("export", error) from None
    device = _device(folder)
    if device == "cuda":
        _load_cuda_libraries()
    try:
        config = og.Config(str(folder))
        if device == "cpu":
            config.overlay(json.dumps({"model": {"decoder": {"session_options": _threads(folder)}}}))
        return og.Model(config)
    except RuntimeError as error:  # the only type the library has
        said = first_line(error)
        if device == "cpu":
            raise failure(f"{folder} cannot be loaded: {said}", where=where, hint=hint) from error
        hint = "run this on a machine that has one, with what setup/requirements.txt names installed"
        message = f"{folder} is made for {_DEVICES[device]}, which cannot be used here: {said}"
        raise failure(message, where=where, hint=hint) from error


def _device(folder: Path) -> str:
    providers = _session_options(folder).get("provider_options", [])
    return next((name for entry in providers for name in entry if name in _DEVICES), "cpu")


def _threads(folder: Path) -> dict[str, int]:
    """Return the session option for the number of threads, unless the model's own file has it.

    ONNX Runtime's own choice was seen to be one thread on a virtual machine with two cores: half the speed.
    """
    option = "intra_op_num_threads"
    return {} if option in _session_options(folder) else {option: machine.physical_cores()}


def _session_options(folder: Path) -> dict[str, Any]:
    config = read_json(folder / GENAI_CONFIG) or {}
    try:
        return dict(config["model"]["decoder"]["session_options"])
    except (KeyError, TypeError, ValueError):
        return {}


def _load_cuda_libraries() -> None:
    """Load CUDA's libraries from the packages that torch brings, where the system's loader does not look."""
    import onnxruntime

    onnxruntime.preload_dlls()


def exported_end_ids(genai_config: dict[str, Any]) -> frozenset[int]:
    """Return the ids at which ONNX Runtime GenAI stops."""
    ids = genai_config["model"]["eos_token_id"]
    return frozenset(ids if isinstance(ids, list) else [ids])
