"""The models of a project behind one small interface: transformers for base, adapter and merged, ONNX Runtime for onnx.

A backend takes token ids, so that every model is asked just what it was trained on.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import adapters, machine, preflight
from edgetune.base_model import trusts_code
from edgetune.errors import EdgetuneError, failure, first_line, missing_extra
from edgetune.generation import Backend, Sampling, Speed
from edgetune.loading import load_base, load_weights
from edgetune.prompt import context_length, end_token_ids, load_tokenizer
from edgetune.quantised import Quantisation
from edgetune.stages import Job, read_json, read_manifest, recover_at_rest
from edgetune.stream import Stream, TransformersStreamer

if TYPE_CHECKING:
    from edgetune.generation import Logits

BACKENDS = ("base", "adapter", "merged", "onnx")
MADE_BY = {"adapter": "train", "merged": "merge", "onnx": "verify"}
"""The stage that publishes each model but the base model."""
_OF_THE_ADAPTER = ("adapter", "merged")


def backends_of(job: Job) -> list[str]:
    """Return the backends that a project has: there may be no adapter, or it is not merged."""
    left_out = ("adapter",) * (job.workflow.tuning is None) + ("merged",) * (not job.workflow.merges)
    return [name for name in BACKENDS if name not in left_out]


GENAI_CONFIG = "genai_config.json"
"""What ONNX Runtime GenAI reads about an exported model: end tokens, context and search options."""

_DEFAULT_CONTEXT = 2048  # of a base model that does not say


def exported_from(job: Job) -> str:
    """Return which of the models is the one that is exported; with its adapter, where that stays beside it."""
    return "merged" if job.workflow.merges else "adapter" if job.workflow.tuning else "base"


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


def torch_backend(job: Job, folder: Path, dtype: str) -> TorchBackend:
    """Load a model of the project. Raises EdgetuneError when its files are not what they should be."""
    return TorchBackend(
        _loaded(folder, lambda: load_weights(folder, dtype=dtype, trusted=trusts_code(job))),
        folder,
        max_length=job.workflow.builder.search.get("max_length"),
    )


def adapter_backend(job: Job, adapter: Path) -> TorchBackend:
    """Load the base model with its adapter, as they were trained. Raises EdgetuneError as :func:`torch_backend`."""

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


DEVICES = {"cpu": "a CPU", "cuda": "an NVIDIA GPU (CUDA)", "dml": "a GPU on Windows (DirectML)"}
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
        message = f"{folder} is made for {DEVICES[device]}, which cannot be used here: {said}"
        raise failure(message, where=where, hint=hint) from error


def _device(folder: Path) -> str:
    providers = _session_options(folder).get("provider_options", [])
    return next((name for entry in providers for name in entry if name in DEVICES), "cpu")


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


def folder_of(job: Job, name: str) -> Path:
    """Return the folder of a backend's model. Raises EdgetuneError when there is none, or files of it are gone."""
    if name in _OF_THE_ADAPTER and job.workflow.tuning is None:
        where, hint = job.workflow.where("passes"), "use --backend base or onnx"
        raise failure(f"there is no {name} model: the workflow has no fine-tuning pass", where=where, hint=hint)
    if name == "merged" and not job.workflow.merges:
        where, hint = job.workflow.where("passes"), "use --backend base, adapter or onnx"
        raise failure("there is no merged model: the workflow has no MergeAdapterWeights pass", where=where, hint=hint)
    if name == "base":
        folder = job.base_folder
        if not (folder / "config.json").is_file():
            where = job.project.name(folder)
            raise failure("the base model is not there yet", where=where, hint="run `edgetune download`")
        return folder
    folder = job.project.stage_folder(MADE_BY[name])
    recover_at_rest(job.project, folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise _missing(job, name, folder)
    if lost := [file for file in manifest["outputs"] if not (folder / file).is_file()]:
        where, hint = job.project.name(folder), f"run `{_command(job)}`: it makes it again"
        raise failure(f"the {name} model has lost {', '.join(lost)}", where=where, hint=hint)
    return folder


def _command(job: Job) -> str:
    return "edgetune finetune" + (" --engine olive" if job.project.olive else "")


def _missing(job: Job, name: str, folder: Path) -> EdgetuneError:
    project = job.project
    candidate = project.stage_folder("export")
    if name == "onnx" and read_manifest(candidate) is not None:
        where = project.name(candidate)
        return failure("the model was exported, but not verified yet", where=where, hint="run `edgetune verify`")
    if name == "onnx" and project.refused_model.is_dir():
        before = exported_from(job)
        hint = f"{project.name(project.verdict)} says why; `--backend {before}` asks the model before its conversion"
        return failure("verification refused the exported model", where=project.name(project.refused_model), hint=hint)
    hint = f"run `make {'olive' if project.olive else 'finetune'}` (or `{_command(job)}`) first"
    return failure(f"there is no {name} model yet", where=project.name(folder), hint=hint)


def open_backend(job: Job, name: str, adapter: str | None = None) -> Backend:
    """Load one of ``BACKENDS``, the exported one with an adapter by its name. Raises EdgetuneError when it is missing.

    All of them answer within the context length of the exported model, so that their answers can be compared.
    """
    folder = folder_of(job, name)
    if name == "onnx":
        return OnnxBackend(folder, adapters.chosen(job, folder, adapter) if adapter else None)
    if name == "adapter":
        return adapter_backend(job, folder)
    return torch_backend(job, folder, preflight.trained_dtype(job))
