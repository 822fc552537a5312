"""Adapters beside an exported model: small ``.onnx_adapter`` files that are switched at run time.

Without a MergeAdapterWeights pass, ``gen-model/onnx/`` is the base model with inputs for an adapter, and holds the
project's own. ``gen-model/adapters/`` has those of other projects with the same base model. Each file says which base
model it belongs to: its ``model_version`` is the beginning of the hash of the base model's files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import adapter_inputs
from edgetune.download import digests
from edgetune.errors import failure, missing_extra
from edgetune.merge import Adapter
from edgetune.stages import Job, changes, content_digest, partial_folder, published, read_manifest

if TYPE_CHECKING:
    import numpy as np

OWN = "default"
"""What the adapter of the project itself is called, as PEFT calls an adapter without a name."""

GRAPH = "model.onnx"
_FOLDER, SUFFIX = "adapters", ".onnx_adapter"
_NAME = re.compile(r"\w[\w.-]*")
_TYPES = {1: "float32", 10: "float16"}  # as ONNX numbers them


def own(model: Path) -> Path:
    """Return the file of the project's own adapter in the folder of an exported model."""
    return model / _FOLDER / (OWN + SUFFIX)


def base_version(base: Mapping[str, str]) -> int:
    """Return the number that stands for a base model, given the sha256 of its files."""
    return int(content_digest(base)[:7], 16)  # an int32


def is_beside(job: Job) -> bool:
    """Tell whether the project has an adapter that stays beside the exported model."""
    return job.workflow.tuning is not None and not job.workflow.merges


def inputs(job: Job) -> dict[str, Any]:
    """Return what an exported model with an adapter beside it depends on besides the base model."""
    return {"adapter": [job.keys["train"], published(job.project.stage_folder("train"))]} if is_beside(job) else {}


def builder_options(job: Job) -> dict[str, Any]:
    """Return what the builder has to be told to make room for the adapter."""
    return adapter_inputs.builder_options(_trained(job).names) if is_beside(job) else {}


def export(job: Job, model: Path) -> None:
    """Give the ONNX model in a folder inputs for the project's adapter, and write the adapter beside it.

    Raises EdgetuneError when the adapter cannot stay beside the model.
    """
    put_beside(model, adapter := _trained(job), sorted(adapter.names), base_version(digests(job, weights=True)))


def put_beside(model: Path, adapter: Adapter, names: Sequence[str], base: int = 0) -> None:
    """Put what an adapter does to these tensors of the base model beside the ONNX model in a folder."""
    graph = model / GRAPH
    adapter_inputs.add_inputs(graph, adapter, names)
    own(model).parent.mkdir(exist_ok=True)
    _write(own(model), tensors(adapter, names, _dtype(graph)), base)


def _trained(job: Job) -> Adapter:
    return Adapter(job.project.stage_folder("train"))


def tensors(adapter: Adapter, names: Iterable[str], dtype: str = "float32") -> "dict[str, np.ndarray]":
    """Return Aᵀ and s·Bᵀ by the names of the inputs that take them."""
    import torch

    found = {}
    for name in names:
        update = adapter[name]
        wide = update.b.to(torch.float64) * update.scale
        for key, matrix in zip(adapter_inputs.input_names(name), (update.a, wide), strict=True):
            found[key] = matrix.to(getattr(torch, dtype)).t().contiguous().numpy()
    return found


def read(path: Path) -> "tuple[int, dict[str, np.ndarray]]":
    """Return the number of the base model and the matrices. Raises EdgetuneError when the file is none of these."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("export", error) from None
    try:
        content = onnxruntime.AdapterFormat.read_adapter(str(path))
        matrices = {name: value.numpy().copy() for name, value in content.get_parameters().items()}
        return content.get_model_version(), matrices
    except Exception as error:  # the library has no type of its own
        hint = "make it again, or remove it"
        raise failure("this is no adapter for ONNX Runtime", where=str(path), hint=hint) from error


def _write(path: Path, matrices: "dict[str, np.ndarray]", base: int) -> None:
    import onnxruntime

    content = onnxruntime.AdapterFormat()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(matrix) for name, matrix in matrices.items()}
    content.set_parameters(values)
    content.set_adapter_version(1)
    content.set_model_version(base)
    content.export_adapter(str(path))


def _dtype(graph: Path) -> str:
    return _TYPES[next(kind for _, _, kind in adapter_inputs.inputs_of(graph))]


@dataclass(frozen=True)
class Found:
    """An adapter that the exported model can work with, or why it cannot."""

    name: str
    file: str
    bytes: int
    matrices: int
    ranks: list[int]
    fault: str = ""


def found(job: Job, model: Path) -> list[Found]:
    """Return the adapters for the exported model, the project's own first. Raises EdgetuneError when it takes none."""
    return [_look_at(job, model, path) for path in _files(job, model).values()]


def chosen(job: Job, model: Path, name: str) -> Path:
    """Return the file of an adapter. Raises EdgetuneError when there is none, or it fits another model."""
    files = _files(job, model)
    if name not in files:
        hint = f"there is {', '.join(files)}; `edgetune adapters --add PROJECT` takes one from another project"
        raise failure(f"there is no adapter {name!r}", where=job.project.name(job.project.adapters), hint=hint)
    path = files[name]
    if fault := _look_at(job, model, path).fault:
        hint = "`edgetune adapters --add PROJECT` takes one that fits, from a project with the same base model"
        raise failure(fault, where=job.project.name(path), hint=hint)
    return path


def add(job: Job, model: Path, other: Path, name: str) -> Path:
    """Take the adapter that another project trained, from its folder; return its file here.

    Raises EdgetuneError when it was trained on another base model, or changes what the exported model has no inputs
    for.
    """
    _files(job, model)
    target = job.project.adapters / (name + SUFFIX)
    if name == OWN or not _NAME.fullmatch(name):
        hint = f"--name takes letters, digits, -, _ and dots; {OWN} is the project's own"
        raise failure(f"an adapter cannot be called {name!r}", hint=hint)
    manifest = read_manifest(other)
    if manifest is None:
        hint = "name the folder of a project that has trained one; `edgetune train` does"
        raise failure("there is no trained adapter here", where=str(other), hint=hint)
    base = digests(job, weights=True)
    if manifest["inputs"].get("base") != base:
        hint = f"train it on {job.base_id} as setup/model.lock.json has it"
        raise failure("this adapter was trained on another base model", where=str(other), hint=hint)
    if (kind := manifest["inputs"]["pass"]["type"]) != "LoRA":
        hint = "train it with LoRA"
        raise failure(f"{kind} changes more than an adapter beside the model can", where=str(other), hint=hint)
    if changed := next(changes(other, manifest["outputs"], job.hashes), None):
        hint = "run `edgetune finetune` in that project: it makes it again"
        raise failure("the file was changed or removed", where=str(other / changed), hint=hint)
    adapter = Adapter(other)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(target)
    _write(partial, tensors(adapter, sorted(adapter.names), _dtype(model / GRAPH)), base_version(base))
    if fault := _look_at(job, model, partial).fault:
        partial.unlink()
        hint = "give both projects the same target_modules, or let the one with more of them export the model"
        raise failure(fault, where=str(other), hint=hint)
    partial.replace(target)
    return target


def _look_at(job: Job, model: Path, path: Path) -> Found:
    """Read an adapter and compare it with the inputs of the exported model."""
    version, matrices = read(path)
    inputs = {name: (shape, _TYPES[kind]) for name, shape, kind in adapter_inputs.inputs_of(model / GRAPH)}
    fault = ""
    if unknown := sorted(matrices.keys() - inputs.keys()):
        fault = f"it changes {unknown[0].rpartition('.lora_')[0]}, which the exported model has no input for"
    elif wrong := [name for name, matrix in matrices.items() if not _fits(matrix, *inputs[name])]:
        matrix = matrices[wrong[0]]
        fault = f"{wrong[0]} is {matrix.dtype} {list(matrix.shape)}, which does not fit the exported model"
    elif version != base_version(digests(job, weights=True)):
        fault = "it does not say that it belongs to the base model of this project"
    ranks = sorted({matrix.shape[1] for name, matrix in matrices.items() if ".lora_A." in name})
    name = path.name.partition(SUFFIX)[0]
    return Found(name, job.project.name(path), path.stat().st_size, len(matrices) // 2, ranks, fault)


def _fits(matrix: "np.ndarray", shape: tuple[int, ...], dtype: str) -> bool:
    """Tell whether a matrix is what an input takes; a size of 0 stands for any rank."""
    sizes = zip(matrix.shape, shape, strict=False)
    return matrix.dtype == dtype and matrix.ndim == len(shape) and all(size in (given, 0) for given, size in sizes)


def _files(job: Job, model: Path) -> dict[str, Path]:
    """Return the files of the adapters by name, the project's own first. Raises EdgetuneError for a merged model."""
    if not own(model).is_file():
        hint = "remove the MergeAdapterWeights pass from fine-tuning/olive-config.json, then run `edgetune finetune`"
        raise failure("the exported model takes no adapters", where=job.project.name(model), hint=hint)
    others = sorted(job.project.adapters.glob("*" + SUFFIX))
    return {OWN: own(model)} | {path.stem: path for path in others if path.stem != OWN}
