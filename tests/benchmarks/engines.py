"""One engine with one model in a process of its own: how fast it reads a prompt and answers, and in how much memory.

Prints a JSON object. Runs in the environments of peers too, so it imports nothing of edgetune.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ask = Callable[[list[int], int], tuple[float, float]]
"""Gets a prompt and a number of new tokens; returns the seconds to the first of them, and for the others."""

WORDS = 1000  # ids below this are in every vocabulary


def genai(folder: Path, threads: int | None, options: dict[str, Any]) -> Ask:
    """Return ONNX Runtime GenAI; ``options`` are session options laid over those of the folder."""
    import onnxruntime_genai as og

    threads_too = {} if threads is None else {"intra_op_num_threads": threads}
    config = og.Config(str(folder))
    laid_over = {"model": {"decoder": {"session_options": threads_too | options}}}
    config.overlay(json.dumps(laid_over))
    model = og.Model(config)

    def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + tokens
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return first - started, time.perf_counter() - first

    return ask


def llama(file: Path, threads: int | None, _options: dict[str, Any]) -> Ask:
    """Return llama.cpp."""
    import llama_cpp as lib  # type: ignore[import-not-found]

    lib.llama_backend_init()
    lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = 2048
    parameters.n_batch = 2048
    if threads is not None:
        parameters.n_threads = parameters.n_threads_batch = threads
    context = lib.llama_init_from_model(model, parameters)
    words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        given = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(given, len(tokens))):
            raise RuntimeError("llama.cpp cannot go on")
        logits = lib.llama_get_logits_ith(context, -1)
        return int(_largest(logits, words))

    def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)  # noqa: FBT003 - a C function
        started = time.perf_counter()
        token = step(prompt)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = step([token])
        return first - started, time.perf_counter() - first

    return ask


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _SILENT(_level: int, _text: bytes, _data: Any) -> None:  # noqa: N802 - a constant that C calls
    pass


def _largest(logits: Any, words: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, (words,)).argmax())


def torch(folder: Path, threads: int | None, options: dict[str, Any]) -> Ask:
    """Return transformers; ``options`` has the dtype."""
    import torch
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = getattr(torch, options["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
        started = time.perf_counter()
        output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        return first - started, time.perf_counter() - first

    return ask


ENGINES = {"genai": genai, "llama": llama, "torch": torch}


def main() -> None:
    """Measure what the argument, a JSON object, asks for."""
    asked = json.loads(sys.argv[1])
    started = time.perf_counter()
    ask = ENGINES[asked["engine"]](Path(asked["model"]), asked.get("threads"), asked.get("options", {}))
    loaded = time.perf_counter() - started
    ask(_prompt(16), 4)
    found = []
    for length, tokens in asked["cases"]:
        times = [ask(_prompt(length), tokens) for _ in range(asked.get("repeats", 1))]
        first, rest = (min(one) for one in zip(*times, strict=True))
        found.append({"prompt": length, "tokens": tokens, "first_s": first, "rest_s": rest})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load_s": loaded, "peak_mb": peak / 1e6, "cases": found}), flush=True)
    os._exit(0)  # without what the libraries take to clean up


def _prompt(length: int) -> list[int]:
    return [10 + (7919 * at) % (WORDS - 10) for at in range(length)]


if __name__ == "__main__":
    main()
