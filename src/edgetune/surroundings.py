"""What a run meets: the machine, the packages, and the Hub, against what the workflow file asks for.

Nothing here imports torch, and nothing is changed.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal

from edgetune import config, download, hub, installed, machine
from edgetune.data_schema import FILE_FORMATS
from edgetune.errors import EdgetuneError, Problem
from edgetune.project import BUILTIN_MODELS, Project
from edgetune.stages import Job, read_json

State = Literal["ok", "warn", "fail"]

GATED = ("meta-llama/", "google/gemma-")
"""How the ids of well-known gated models begin."""

_EXTRAS = {"LoRA": "train", "DoRA": "train", "QLoRA": "qlora", "Gptq": "olive"}
SETUP = "run `python -m pip install -r setup/requirements.txt` in this environment"
_INSTRUCTIONS = {
    "AVX2": ("avx2", "AVX2"),
    "AVX-512": ("avx512f",),
    "VNNI (fast int8)": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_tile",),
    "NEON": ("asimd", "AdvSIMD", "neon"),
    "dot products (fast int8)": ("asimddp", "FEAT_DotProd"),
    "int8 matrices": ("i8mm", "FEAT_I8MM"),
    "SVE": ("sve",),
    "bfloat16": ("amx_bf16", "avx512_bf16", "bf16", "FEAT_BF16"),
}
"""What people call instruction sets, and how Linux and macOS spell them."""

_LITTLE_DISK = 5_000_000_000
_COPIES = 2  # the merged and the exported model are about as large as the base model at most, each
_NAMED = 3  # of many
_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    summary: str
    remedy: str = ""


class Needs:
    """What the workflow file asks for, as far as it can be read."""

    def __init__(self, project: Project | None) -> None:
        self.project = project
        raw = (read_json(project.config) if project else None) or {}
        self.passes = _texts(raw.get("passes"), "type")
        self.dtypes = _texts(raw.get("passes"), "torch_dtype")
        providers = _texts(raw.get("systems"), "execution_providers")
        self.device = next((installed.DEVICES[name] for name in providers if name in installed.DEVICES), "cpu")
        export = "export" if self.device == "cpu" else f"export-{self.device}"
        used = {_EXTRAS[kind] for kind in self.passes if kind in _EXTRAS} if self.passes else {"train"}
        self.extras = used | {export}
        named = dict.fromkeys(_texts(raw.get("data_configs"), "data_name"))
        self.hub_data = [name for name in named if name not in FILE_FORMATS]

    @cached_property
    def job(self) -> Job | None:
        """The project's job; None without a project, and when not even the base model can be read from the file."""
        if self.project is None:
            return None
        try:
            workflow = config.load_for_olive(self.project)
        except (EdgetuneError, OSError):
            return None
        job = Job.start(self.project, workflow)
        return job if job.base_id else None

    @cached_property
    def base_sizes(self) -> dict[Path, int]:
        """The files of the base model by the lock, or else those that are there."""
        if self.job is None:
            return {}
        try:
            locked = download.locked_sizes(self.job)
        except EdgetuneError:
            locked = {}
        source = BUILTIN_MODELS.get(self.job.base_id, self.job.base_folder)
        return locked or {path: path.stat().st_size for path in source.glob("*") if path.is_file()}

    def name(self, path: Path) -> str:
        """Return a path as messages show it."""
        return self.project.name(path) if self.project else str(path)

    @property
    def base_bytes(self) -> int:
        """The size of the base model; 0 when it is not known."""
        return sum(self.base_sizes.values())

    @property
    def fetches(self) -> list[str]:
        """What the next run asks the Hub for."""
        found = list(self.hub_data)
        if self.job and self.job.base_id not in BUILTIN_MODELS and not self.is_here:
            found.insert(0, self.job.base_id)
        return found

    @property
    def is_here(self) -> bool:
        """Whether all files of the base model are there."""
        return bool(self.base_sizes) and all(has_size(path, size) for path, size in self.base_sizes.items())


def _texts(content: Any, key: str, *, below: bool = False) -> list[str]:
    """Return the texts that stand under a key, anywhere, alone or in a list."""
    if isinstance(content, list):
        return [text for item in content for text in _texts(item, key, below=below)]
    if isinstance(content, dict):
        return [text for name, item in content.items() for text in _texts(item, key, below=name == key)]
    return [content] if below and isinstance(content, str) else []


def around(needs: Needs) -> Iterator[Finding]:
    """Examine what lies outside of the project."""
    yield _python(needs)
    yield _packages(needs)
    yield _onnxruntime(needs)
    yield _processor(needs)
    yield _gpu(needs)
    yield _memory(needs)
    yield from _disk(needs)
    yield from _hub(needs)


def _python(needs: Needs) -> Finding:
    if problem := installed.python_problem():
        return Finding("python", "fail", problem, "make the environment anew: `make setup PYTHON=python3.12`")
    return Finding("python", "ok", f"{sys.version.split()[0]} in {needs.name(Path(sys.prefix))}")


def _packages(needs: Needs) -> Finding:
    found, extras = installed.packages(needs.extras), ", ".join(sorted(needs.extras))
    if found.missing and needs.project is None:
        summary = f"not installed: {', '.join(found.missing)}"
        return Finding("packages", "warn", summary, f"a project needs edgetune's extras: {extras}")
    if bad := [f"{name} is missing" for name in found.missing] + found.wrong:
        return Finding("packages", "fail", "; ".join(bad), SETUP)
    if found.untested:
        return Finding("packages", "warn", f"not the tested versions: {'; '.join(found.untested)}", SETUP)
    return Finding("packages", "ok", f"{len(found.right)} packages in the tested versions ({extras})")


def _remedy(*packages: str) -> str:
    return f"`pip uninstall -y {' '.join(packages)}`, then {SETUP}"


def _onnxruntime(needs: Needs) -> Finding:
    name, families = "onnxruntime", installed.flavours()
    for members in families.values():
        if len(members) > 1:
            return Finding(name, "fail", f"{' and '.join(members)} overwrite each other", _remedy(*members))
    found = {family: next(iter(members.items()), None) for family, members in families.items()}
    runtime, genai = found["onnxruntime"], found["onnxruntime-genai"]
    if runtime is None or genai is None:
        missing = " and ".join(family for family, flavour in found.items() if flavour is None)
        return Finding(name, "fail" if needs.project else "warn", f"{missing} not installed", SETUP)
    both = ", ".join(f"{flavour} {installed.installed_version(flavour)}" for flavour, _ in (runtime, genai))
    if runtime[1] != genai[1]:
        return Finding(name, "fail", f"{both} do not belong together", _remedy(runtime[0], genai[0]))
    if needs.device not in ("cpu", genai[1]):
        summary = f"{both}: these are for {genai[1]}, the workflow file exports for {needs.device}"
        return Finding(name, "fail", summary, _remedy(runtime[0], genai[0]))
    return Finding(name, "ok", f"{both}, one flavour of each")


def _processor(needs: Needs) -> Finding:
    count, features, bf16 = machine.cores(), machine.cpu_features(), machine.has_bf16()
    cores = f"{count} core{'s' if count > 1 else ''}"
    known = [name for name, spelled in _INSTRUCTIONS.items() if features and not features.isdisjoint(spelled)]
    summary = f"{machine.processor()}, {cores}: {', '.join(known) or 'instruction sets not readable'}"
    if features and not bf16:
        summary += "; no bfloat16"
    if bf16 is False and "bfloat16" in needs.dtypes and needs.device != "cuda":
        remedy = '"torch_dtype": "float32" in that pass is two to three times as fast here, for twice the memory'
        return Finding("processor", "warn", f"{summary}: training in bfloat16 is slow", remedy)
    if bf16 and "float32" in needs.dtypes and needs.device != "cuda":
        summary += '; "torch_dtype": "bfloat16" would train faster and in less memory'
    return Finding("processor", "ok", summary)


def _gpu(needs: Needs) -> Finding:
    found = machine.gpus()
    if "" in found:
        return Finding("gpu", "warn", "an NVIDIA GPU that nvidia-smi cannot ask", "install or repair its driver")
    if not found and needs.device == "cuda":
        remedy = "the finished model runs on a machine that has one; train and verify there"
        return Finding("gpu", "warn", "none, and the workflow file exports for one", remedy)
    torch = installed.installed_version("torch") or ""
    if needs.device == "cuda" and torch.endswith("+cpu"):
        remedy = "install torch from an index with CUDA builds: `make setup TORCH_INDEX=...`"
        return Finding("gpu", "warn", f"{', '.join(found)}, but torch {torch} cannot use it", remedy)
    return Finding("gpu", "ok", ", ".join(found) or "none")


def _memory(needs: Needs) -> Finding:
    memory = machine.memory_bytes()
    if memory is None:
        return Finding("memory", "warn", "cannot be read on this system")
    summary, size = f"{decimal(memory.available)} free of {decimal(memory.total)}", needs.base_bytes
    if size > memory.total:
        return Finding("memory", "fail", f"{summary}; the base model alone has {decimal(size)}", "choose a smaller one")
    if size > memory.available:
        summary += f"; the base model has {decimal(size)}"
        return Finding("memory", "warn", summary, "close other programs before a run")
    return Finding("memory", "ok", summary)


def _disk(needs: Needs) -> Iterator[Finding]:
    """Look at the place of the base model and that of the results, if it is another one."""
    project, size = needs.project, needs.base_bytes
    if project is None:
        yield _room(needs, "disk", Path.cwd(), 0)
        return
    missing = 0 if needs.is_here else size
    one_place = _device(project.model_cache) == _device(project.results)
    made = sum(path.stat().st_size for path in project.results.rglob("*") if path.is_file())
    yield _room(needs, "disk", project.results, max(_COPIES * size - made, 0) + (missing if one_place else 0))
    if not one_place:
        yield _room(needs, "model cache", project.model_cache, missing)


def _room(needs: Needs, name: str, folder: Path, needed: int) -> Finding:
    free, where = machine.disk_free(folder), f"where {needs.name(folder)} is"
    if free < needed:
        summary = f"{decimal(free)} free {where}; base model and results take up to {decimal(needed)}"
        return Finding(name, "fail", summary, "free some space, or make the folder a link to a larger disk")
    if free < _LITTLE_DISK and not needed:
        return Finding(name, "warn", f"{decimal(free)} free {where}", "larger base models need more")
    return Finding(name, "ok", f"{decimal(free)} free {where}" + (f", {decimal(needed)} needed" if needed else ""))


def _device(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _hub(needs: Needs) -> Iterator[Finding]:
    """Look at the token (never its value) and the server."""
    before = bool(os.environ.get("HF_TOKEN"))
    if needs.project:
        hub.load_dotenv(needs.project.dotenv)
    wanted = needs.fetches
    if needs.project and not wanted:
        yield Finding("hub", "ok", "not needed: base model and data are here")
        return
    yield _token("the environment" if before else ".env", wanted)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        if wanted:
            remedy = "unset HF_HUB_OFFLINE, or copy the model with `edgetune download --from FOLDER`"
            yield Finding("hub", "fail", f"HF_HUB_OFFLINE is set, and {', '.join(wanted)} is not here", remedy)
        else:
            yield Finding("hub", "ok", "not asked: HF_HUB_OFFLINE is set")
        return
    try:
        problem = hub.unreachable(f"api/models/{wanted[0]}" if wanted else "", _SECONDS)
    except EdgetuneError as error:  # a token with impossible characters
        yield of_problems("hub", error.problems)
        return
    server = hub.clean(os.environ.get("HF_ENDPOINT", "") or "https://huggingface.co")
    remedy = "check the network and its proxy (HTTPS_PROXY), or set HF_ENDPOINT to a mirror"
    if problem:
        yield Finding("hub", "fail" if wanted else "warn", f"cannot be reached: {problem}", remedy)
    else:
        yield Finding("hub", "ok", f"{server} answers" + (f"; to fetch: {', '.join(wanted)}" if wanted else ""))


def _token(place: str, wanted: list[str]) -> Finding:
    from huggingface_hub import get_token

    gated = next((name for name in wanted if name.startswith(GATED)), "")
    if get_token():
        place = place if os.environ.get("HF_TOKEN") else "the file of `hf auth login`"
        return Finding("token", "ok", f"present, in {place}")
    if not gated:
        return Finding("token", "ok", "none; only gated and private models need one")
    login = "put HF_TOKEN=... into .env or run `hf auth login`"
    remedy = f"accept the terms on https://huggingface.co/{gated}, then {login}"
    return Finding("token", "fail", f"none, and {gated} is gated", remedy)


def of_problems(name: str, problems: tuple[Problem, ...]) -> Finding:
    """Make one finding of an error's problems, the first of them named."""
    said = [f"{problem.where + ': ' if problem.where else ''}{problem.message}" for problem in problems[:_NAMED]]
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return Finding(name, "fail", "; ".join(said) + more, next((p.hint for p in problems if p.hint), ""))


def has_size(path: Path, size: int) -> bool:
    """Tell whether a file is there with this many bytes."""
    return path.is_file() and path.stat().st_size == size
