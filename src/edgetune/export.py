"""Export the merged model with onnxruntime-genai's builder: ``gen-model/merged/`` → ``gen-model/onnx/``."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from edgetune.backends import GENAI_CONFIG, exported_end_ids
from edgetune.dataset import TRAIN, Tokens
from edgetune.errors import failure, missing_extra
from edgetune.prompt import Encoder, end_token_ids, load_tokenizer
from edgetune.stages import Job, Stage, published, write_json

_ROWS_COMPARED = 200
_DIFFICULT_TEXTS = (
    "  spaces before and after  ",
    "\n\nlines\r\n\tand\ttabs\n",
    "emoji \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3 \u2764\ufe0f",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",  # Chinese, Japanese, Korean
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u0661\u0662\u0663",  # Hebrew, Arabic
    "word" * 200,
    "don't 12345678 3.14 C++ <b> {x} \\n \u00e9 e\u0301",
)
_DEVICE = "cpu"  # the builder's name of the one execution provider the schema lets through so far


def inputs(job: Job) -> dict[str, Any]:
    """Return what the exported model depends on."""
    return {
        "merged": [job.keys["merge"], published(job.project.stage_folder("merge"))],
        "pass": job.workflow.builder.model_dump(exclude_none=True),
    }


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Write the ONNX model. Raises EdgetuneError when the builder cannot, or what it made is not usable."""
    source = job.project.stage_folder("merge")
    _run_builder(job, source, folder)
    config_path = folder / GENAI_CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["search"] |= _search_options(job, config["model"]["context_length"])
    write_json(config_path, config)
    if exported_end_ids(config) != end_token_ids(source):
        raise failure(
            f"the exported model would stop at the ids {sorted(exported_end_ids(config))}, "
            f"the base model stops at {sorted(end_token_ids(source))}",
            where=job.project.name(folder),
            hint="generation_config.json of the base model is missing or damaged",
        )
    # The runtime's own tokenizer reads this file; the builder does not copy it for every model class.
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    _check_tokenizers(job, folder)
    size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    job.progress.say(
        f"{job.workflow.builder.precision} for {_DEVICE}, {size / 1e6:.1f} MB, "
        f"max_length {config['search']['max_length']}"
    )
    return {"bytes": size, "max_length": config["search"]["max_length"]}


STAGE = Stage("export", 1, inputs, build)


def _run_builder(job: Job, source: Path, folder: Path) -> None:
    try:
        from onnxruntime_genai.models.builder import create_model
    except ImportError as error:
        raise missing_extra("export", error) from None
    builder = job.workflow.builder
    work = folder / "work"
    try:
        create_model(
            str(source),
            str(source),
            str(folder),
            builder.precision,
            _DEVICE,
            str(work),
            hf_token="false",  # noqa: S106 - everything is local; the builder's default asks the Hub client for a token
            hf_remote=job.workflow.input_model.load_kwargs.trust_remote_code,
            **builder.builder_options(),
        )
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise failure(
            f"onnxruntime-genai's builder failed: {type(error).__name__}: {lines[0]}",
            where=job.project.name(job.project.log("export")),
            hint="the log has what it printed; --debug shows the traceback",
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    if not (folder / "model.onnx").is_file():
        raise failure("the builder ended without an ONNX model", where=job.project.name(job.project.log("export")))


def _search_options(job: Job, context_length: int) -> dict[str, Any]:
    """Return the pass's search options; without ``max_length`` the KV cache is made for the whole context."""
    options = job.workflow.builder.search
    length = options.get("max_length", context_length)
    if length > context_length:
        raise failure(
            f"search.max_length {length} is longer than the model's context of {context_length} tokens",
            where=job.workflow.where_in_pass("ModelBuilder", "search", "max_length"),
            hint=f"use at most {context_length}",
        )
    return options


def _check_tokenizers(job: Job, folder: Path) -> None:
    """Raise EdgetuneError unless ONNX Runtime and transformers read texts as the ids that were trained on."""
    import onnxruntime_genai as og
    from transformers import AutoTokenizer

    try:
        of_runtime = og.Tokenizer(og.Model(str(folder)))
    except RuntimeError as error:  # the only type the library has
        raise failure(
            f"ONNX Runtime GenAI cannot load what the builder made: {str(error).splitlines()[0]}",
            where=job.workflow.where_in_pass("ModelBuilder"),
            hint="check `search` and the int4 options of this pass",
        ) from error
    trusted = job.workflow.input_model.load_kwargs.trust_remote_code
    of_transformers = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    reference = load_tokenizer(folder)
    readers: dict[str, Callable[[str], list[int]]] = {
        "onnxruntime-genai": lambda text: list(of_runtime.encode(text)),
        "transformers": lambda text: list(of_transformers.encode(text, add_special_tokens=False)),
    }
    for text, (name, read) in product(_texts_compared(job, folder), readers.items()):

        def differs(part: str, read: Callable[[str], list[int]] = read) -> bool:
            return read(part) != reference.encode(part, add_special_tokens=False).ids

        if differs(text):
            raise failure(
                f"the tokenizer of {name} reads {smallest(text, differs)!r} differently from tokenizer.json",
                where=job.project.name(folder),
                hint="applications would give the model other ids than it was trained with: choose another base model",
            )


def _texts_compared(job: Job, folder: Path) -> Iterator[str]:
    """Yield prompts of the training data, and prompts with what tokenizers are known to disagree on."""
    encoder = Encoder(job.workflow.contract, folder)
    tokens = Tokens(job.project.stage_folder("data"), TRAIN)
    for index in range(min(len(tokens), _ROWS_COMPARED)):
        sample = tokens[index]
        yield encoder.tokenizer.decode(sample.ids[: sample.prompt_length], skip_special_tokens=False)
    for text in _DIFFICULT_TEXTS:
        yield encoder.format.prompt_text(encoder.contract.filled(text))


def smallest(text: str, differs: Callable[[str], bool]) -> str:
    """Return a part of ``text`` that still differs, and no longer does when any single character is left out."""
    size = max(len(text) // 2, 1)
    while size:
        start = 0
        while start < len(text):
            shorter = text[:start] + text[start + size :]
            if shorter and differs(shorter):
                text = shorter
            else:
                start += size
        size //= 2
    return text
