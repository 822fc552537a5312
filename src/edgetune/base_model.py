"""What a base model must be for the steps after the download: its files, its architecture, and room for both."""

import json
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from edgetune import machine
from edgetune.architectures import EXPORTABLE, NEEDS_REMOTE_CODE, refusal
from edgetune.errors import EdgetuneError, Problem
from edgetune.prompt import load_tokenizer
from edgetune.stages import Job, read_json

DOCUMENTS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""What tells the terms of a model; it changes no result."""

USED_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    *DOCUMENTS,
)
"""What a run can use of a repository. Weights in pickle form are not among it."""

UNUSED_FILES = ("consolidated*", "*[/\\:\0]*", "*.py")
"""A second copy of the weights in another layout (Mistral), what lies elsewhere (``:`` is for drives), and code."""

ADAPTER_CONFIG = "adapter_config.json"
"""With this beside it, transformers takes the weights from wherever it says, and an adapter with them."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_used(name: str, *, code: bool) -> bool:
    """Tell whether a run can use a file of a repository; ``code``: whether that goes for Python files too."""
    if code and re.fullmatch(r"[^/\\:\0]+\.py", name):
        return True
    return matches(name, USED_FILES) and not matches(name, UNUSED_FILES)


def used_files(job: Job, folder: Path) -> list[Path]:
    """Return the files of a model folder that a run can use."""
    code = job.workflow.trusts_code
    return [path for path in sorted(folder.iterdir()) if path.is_file() and is_used(path.name, code=code)]


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says; nothing when it is missing or no JSON object."""
    return read_json(folder / "config.json") or {}


def folder_problems(job: Job, folder: Path) -> list[Problem]:
    """Return what keeps the later steps from using a model folder."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    problems = listing_problems(job, names) + shard_problems(job, folder, names)
    if "config.json" in names:
        problems += config_problems(job, folder, names)
    problems += _unreadable_problems(job, folder)
    for path in used_files(job, folder):
        if path.suffix == ".safetensors" and not _is_whole(path):
            hint = "copy it again; in a git clone, run `git lfs pull` first"
            problems.append(Problem(f"{path.name} of {job.base_id} is not a whole safetensors file", str(path), hint))
    return problems


def _unreadable_problems(job: Job, folder: Path) -> list[Problem]:
    """Return which of the small files that are there cannot be read."""
    damaged = [
        name
        for name in ("generation_config.json", "tokenizer_config.json")
        if (folder / name).is_file() and read_json(folder / name) is None
    ]
    if (folder / "tokenizer.json").is_file():
        try:
            load_tokenizer(folder)
        except EdgetuneError:
            damaged.append("tokenizer.json")
    return [_problem(job, f"has a damaged {name}", f"copy {folder / name} again") for name in damaged]


def listing_problems(job: Job, names: Collection[str]) -> list[Problem]:
    """Return what is wrong with a model that consists of these files."""
    hint = "choose a model that ships safetensors weights and tokenizer.json (pickle files are never loaded)"
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    if not any(name.endswith(".safetensors") for name in names if is_used(name, code=False)):
        pickles = [name for name in names if matches(name, _PICKLES)]
        missing.append("weights as *.safetensors" + (f", only as pickle ({pickles[0]})" if pickles else ""))
    return [_problem(job, f"has no {name}", hint) for name in missing]


def shard_problems(job: Job, folder: Path, names: Collection[str]) -> list[Problem]:
    """Return which weights the index in ``folder`` speaks of that are not among ``names``."""
    shards: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [_problem(job, f"has a damaged {index.name}", "choose another revision, or copy the file again")]
    hint = "copy the missing files too, or choose another revision"
    return [_problem(job, f"has no {name}", hint) for name in sorted(shards) if name not in names]


def config_problems(job: Job, folder: Path, names: Collection[str]) -> list[Problem]:
    """Return what is wrong with the architecture that config.json names, and with the code it asks for."""
    config, another = read_config(folder), "choose another base model"
    if reason := refusal(config):
        return [_problem(job, reason, another)]
    match config.get("architectures"):
        case [str(architecture), *_]:
            pass
        case _:
            return [Problem(f"the config.json of {job.base_id} names no architecture", _where(job), another)]
    if architecture in NEEDS_REMOTE_CODE and not job.workflow.trusts_code:
        where = job.workflow.where("input_model", "load_kwargs", "trust_remote_code")
        hint = "read that code; then set load_kwargs.trust_remote_code to true and .revision to a commit (40 digits)"
        return [
            Problem(f"{job.base_id} ({architecture}) runs only with Python code of its own repository", where, hint)
        ]
    if architecture not in EXPORTABLE | NEEDS_REMOTE_CODE:
        hint = f"choose a model of one of these architectures: {', '.join(sorted(EXPORTABLE))}"
        return [_problem(job, f"is a {architecture}, which onnxruntime-genai 0.14.1 cannot export as text model", hint)]
    return _code_problems(job, config, names) if job.workflow.trusts_code else []


def unused_code(job: Job, folder: Path) -> bool:
    """Tell whether the model brings Python code that is passed over."""
    return bool(read_config(folder).get("auto_map")) and not job.workflow.trusts_code


def space_problems(job: Job, needed: int) -> list[Problem]:
    """Return whether the disk lacks room for this many bytes more."""
    free = machine.disk_free(job.base_folder)
    if needed <= free:
        return []
    hint = f"free some space, or make {job.project.name(job.project.model_cache)} a link to a larger disk"
    return [_problem(job, f"needs {decimal(needed)} of disk space, {decimal(free)} are free", hint)]


def _code_problems(job: Job, config: dict[str, Any], names: Collection[str]) -> list[Problem]:
    """Check that all code which ``auto_map`` refers to lies in this repository, where the revision pins it."""
    references = config.get("auto_map")
    problems = []
    for reference in _texts(references.values() if isinstance(references, dict) else ()):
        if "--" in reference:
            hint = "choose another base model; only code of the model's own repository is pinned by its revision"
            problems.append(_problem(job, f"takes Python code from another repository ({reference})", hint))
        elif (name := reference.partition(".")[0] + ".py") not in names:
            problems.append(_problem(job, f"has no {name}, which its config.json asks for", "choose another revision"))
    return problems


def _texts(values: Iterable[Any]) -> set[str]:
    """Return the texts among values that are texts or lists of texts (a tokenizer's slow and fast class)."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return {item for item in flat if isinstance(item, str)}


def _is_whole(path: Path) -> bool:
    """Tell whether a safetensors file has all the bytes that its header speaks of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            tensors = [entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"]
            return 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0) == size
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a file's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _where(job: Job) -> str:
    return job.workflow.where("input_model", "model_path")


def _problem(job: Job, what: str, hint: str) -> Problem:
    return Problem(f"{job.base_id} {what}", _where(job), hint)
