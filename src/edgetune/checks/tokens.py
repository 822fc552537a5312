"""Check that applications read a text as the token ids the model was trained on, and where they stop."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from edgetune.examples import Example
from edgetune.onnx_backend import GENAI_CONFIG, exported_end_ids
from edgetune.prompt import Encoder, end_token_ids, load_tokenizer
from edgetune.stages import Job

_DIFFICULT_TEXTS = (
    "  spaces before and after  ",
    "\n\nlines\r\n\tand\ttabs\n",
    "emoji \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3 \u2764\ufe0f",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",  # Chinese, Japanese, Korean
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u0661\u0662\u0663",  # Hebrew, Arabic
    "word" * 200,
    "don't 12345678 3.14 C++ <b> {x} \\n \u00e9 e\u0301",
)


def token_faults(job: Job, source: Path, model: Path, examples: list[Example]) -> list[str]:
    """Return how ``model`` differs from ``source``, the model it was exported from, in tokens and end tokens."""
    return _end_token_fault(source, model) + _tokenizer_fault(job, model, examples)


def _end_token_fault(source: Path, model: Path) -> list[str]:
    expected = end_token_ids(source)
    ids = exported_end_ids(json.loads((model / GENAI_CONFIG).read_text(encoding="utf-8")))
    if ids == expected:
        return []
    return [f"the exported model would stop at the ids {sorted(ids)}, the base model stops at {sorted(expected)}"]


def _tokenizer_fault(job: Job, model: Path, examples: list[Example]) -> list[str]:
    """Compare both libraries' tokenizers with tokenizer.json; the first text that differs is enough."""
    import onnxruntime_genai as og
    from transformers import AutoTokenizer

    of_runtime = og.Tokenizer(og.Model(str(model)))
    trusted = job.workflow.trusts_code
    of_transformers = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=trusted)
    reference = load_tokenizer(model)
    readers: dict[str, Callable[[str], list[int]]] = {
        "onnxruntime-genai": lambda text: list(of_runtime.encode(text)),
        "transformers": lambda text: list(of_transformers.encode(text, add_special_tokens=False)),
    }
    for text, (name, read) in product(_texts(job, model, examples), readers.items()):

        def differs(part: str, read: Callable[[str], list[int]] = read) -> bool:
            return read(part) != reference.encode(part, add_special_tokens=False).ids

        if differs(text):
            return [f"the tokenizer of {name} reads {smallest(text, differs)!r} differently from tokenizer.json"]
    return []


def _texts(job: Job, model: Path, examples: list[Example]) -> Iterator[str]:
    """Yield the examples' prompts, and prompts with what tokenizers are known to disagree on."""
    encoder = Encoder(job.workflow.contract, model)
    for example in examples:
        yield encoder.tokenizer.decode(example.prompt_ids, skip_special_tokens=False)
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
