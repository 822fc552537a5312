"""Read the Olive workflow file: every problem at once, with its line and the way out."""

import difflib
import json
import os
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edgetune.adapter_inputs import MODULES
from edgetune.data_schema import FILE_FORMATS, DataConfig, LoadDataset, PreProcess, WrongKeyError
from edgetune.errors import EdgetuneError, Problem, refuse
from edgetune.installed import olive_passes
from edgetune.migration.signs import old_style
from edgetune.project import Project
from edgetune.schema import (
    NATIVE,
    PRECISIONS,
    Accelerator,
    DoRA,
    Gptq,
    InputModel,
    LoadKwargs,
    LoRA,
    MergeAdapterWeights,
    ModelBuilder,
    OtherPass,
    QLoRA,
    System,
    Workflow,
)
from edgetune.source import JsonSource
from edgetune.training_schema import TrainingArguments

_SECTIONS: dict[str, type[BaseModel]] = {
    "input_model": InputModel,
    "load_kwargs": LoadKwargs,
    "systems": System,
    "accelerators": Accelerator,
    "data_configs": DataConfig,
    "load_dataset_config": LoadDataset,
    "pre_process_data_config": PreProcess,
    "training_args": TrainingArguments,
    "LoRA": LoRA,
    "QLoRA": QLoRA,
    "DoRA": DoRA,
    "MergeAdapterWeights": MergeAdapterWeights,
    "Gptq": Gptq,
    "ModelBuilder": ModelBuilder,
}
"""Which keys are valid where, for suggestions."""

_RENAMED = {
    "corpus_strategy": "strategy",
    "evaluation_strategy": "eval_strategy",
    "from_pretrained_args": "load_kwargs",
    "group_by_length": "train_sampling_strategy",
    "lora_alpha": "alpha",
    "lora_r": "r",
    "model_loading_args": "load_kwargs",
    "source_max_len": "max_seq_len",
    "warmup_ratio": "warmup_steps",
}
"""Keys of older Olive and transformers versions, which today's Olive ignores without an error."""

_SECRETS = {
    "a token of the Hugging Face Hub": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a token of GitHub": re.compile(r"\b(gh[a-z]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a key of an Azure storage account": re.compile(r"AccountKey=|SharedAccessSignature=|[?&]sig="),
    "a URL with a password": re.compile(r"://[^/@:\"]+:[^/@\"]+@"),
}
"""What must not stand in a file that is committed."""

_FINE_TUNING = ("LoRA", "QLoRA", "DoRA")
_BESIDE = ["LoRA", "ModelBuilder"]
_ORDERS = [["ModelBuilder"], *([tuning, "MergeAdapterWeights", "ModelBuilder"] for tuning in _FINE_TUNING)]
"""The passes that the native engine runs itself. Any others stand before ModelBuilder or behind it."""

_NO_FSDP = "remove it: the base model is not divided among processes; each has all of it, which QLoRA makes smaller"
_OLIVE = "run with `--engine olive`"
_README = "fine-tuning/README.md explains the keys"


def load(project: Project, path: Path | None = None) -> Workflow:
    """Read and check the project's workflow file, or the one at ``path`` as if it were that.

    Raises EdgetuneError with every problem of the file, each with its line.
    """
    source = _source(project, path)
    refuse(old_style(source))
    return check(source, project)


def check(source: JsonSource, project: Project) -> Workflow:
    """Check what was read. Raises EdgetuneError with every problem of the file, each with its line."""
    problems = source.duplicate_problems()
    try:
        workflow = Workflow.model_validate(_known(source.data) if project.olive else source.data).located(source)
    except ValidationError as error:
        problems += [_explain(details, source, project) for details in error.errors()]
        raise EdgetuneError(_in_order(problems)) from None
    order = _check_order_for_olive(workflow) if project.olive else _check_passes(workflow)
    problems += order or _check_references(workflow)
    if not problems:
        problems += _check_meaning(workflow, project)
    refuse(_in_order(problems))
    return workflow


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Return the problems of a file in the order of its lines."""
    return sorted(problems, key=lambda problem: int(problem.where.rpartition(":")[2]))


def load_for_olive(project: Project) -> Workflow:
    """Read only which base model and data the file wants; stock Olive judges all the rest.

    Raises EdgetuneError when the file is no JSON object.
    """
    source = _source(project)
    if not isinstance(source.data, dict):
        raise EdgetuneError([Problem("not a JSON object", source.where())])
    refuse(old_style(source, also_blocks=False))
    model = source.data.get("input_model")
    model = model if isinstance(model, dict) else {}
    kwargs = model.get("load_kwargs")
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    given = {key: kwargs[key] for key in LoadKwargs.model_fields if key in kwargs}
    base = InputModel.model_construct(
        model_path=str(model.get("model_path", "")), load_kwargs=LoadKwargs.model_construct(**given)
    )
    names: dict[str, Any] = {key: str(source.data.get(key, "")) for key in ("workflow_id", "cache_dir", "output_dir")}
    data = source.data.get("data_configs")
    data = [_data_for_olive(entry) for entry in data] if isinstance(data, list) else []
    return Workflow.model_construct(input_model=base, data_configs=data, passes={}, **names).located(source)


def _data_for_olive(entry: Any) -> DataConfig:
    load = entry.get("load_dataset_config") if isinstance(entry, dict) else None
    name = load.get("data_name") if isinstance(load, dict) else None
    return DataConfig.model_construct(
        load_dataset_config=LoadDataset.model_construct(data_name=str(name or FILE_FORMATS[0]))
    )


def _source(project: Project, path: Path | None = None) -> JsonSource:
    return read(path or project.config, project.name(project.config))


def read(path: Path, name: str) -> JsonSource:
    """Read a file that messages call ``name``.

    Raises EdgetuneError when it is no JSON, or holds a secret: it goes into version control.
    """
    source = JsonSource(path, name)
    hint = "revoke it and make a new one; it belongs into .env (HF_TOKEN=…) or the environment"
    problems = [
        Problem(f"this looks like {kind}", source.where(*location), hint)
        for location, (start, end) in source.spans.items()
        for kind, pattern in _SECRETS.items()
        if source.text[start] == '"' and pattern.search(source.text[start:end])
    ]
    if problems:
        raise EdgetuneError(problems)
    return source


def _known(data: Any) -> Any:
    """Return the content of the file without keys that stock Olive alone understands: it has done its work."""
    data = json.loads(json.dumps(data))
    try:
        Workflow.model_validate(data)
    except ValidationError as error:
        unknown = [_place(details["loc"]) for details in error.errors() if details["type"] == "extra_forbidden"]
        for *place, key in unknown:
            del reduce(getitem, place, data)[key]
        return _known(data) if unknown else data
    return data


def _place(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return where a value stands: a discriminated union puts its tag into the location, the file has no such level."""
    return tuple(p for i, p in enumerate(location) if not (i == 2 and location[0] == "passes"))  # noqa: PLR2004


def _explain(error: Any, source: JsonSource, project: Project) -> Problem:
    """Turn one of pydantic's errors into a problem with a line and a hint."""
    location: tuple[str | int, ...] = error["loc"]
    path = _place(location)
    where, key = source.where(*path), str(location[-1]) if location else "the file"
    owner = next((_SECTIONS[p] for p in reversed(location[:-1]) if p in _SECTIONS), Workflow)
    if key in _RENAMED and error["type"] == "extra_forbidden":
        hint = f"today it is {_RENAMED[key]!r}; `edgetune migrate {source.name}` finds all such keys"
        return Problem(f"the native engine does not know the key {key!r}", where, hint)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, owner.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"remove it, or {_OLIVE} if stock Olive knows it"
        hint = _NO_FSDP if key.startswith(("fsdp", "deepspeed")) else hint
        return Problem(f"the native engine does not know the key {key!r}", where, hint)
    if error["type"] == "missing":
        return Problem(f"the key {key!r} is missing", where, _README)
    if error["type"] == "union_tag_not_found":
        return Problem(f"the pass {key!r} has no 'type'", where, _README)
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(cause := error.get("ctx", {}).get("error"), WrongKeyError):
        path = (*path, cause.key)
        where = source.where(*path)
    hint = _README
    if error["type"] in ("literal_error", "too_long"):  # a value that may mean something elsewhere
        hint += "" if project.olive else f"; {_OLIVE} if stock Olive takes this value"
        message = message.replace("be False", "be false")  # as JSON writes it
    return Problem(f"{'.'.join(map(str, path))}: {message[0].lower()}{message[1:]}", where, hint)


def _check_passes(workflow: Workflow) -> list[Problem]:
    """Check that Olive has the passes that are not native, and that all are in a usable order."""
    problems = []
    for name, step in workflow.passes.items():
        where = workflow.where("passes", name)
        if len(workflow.exporting) > 1 and not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it names a folder
            problems.append(Problem(f"the pass is called {name!r}", where, "use letters, digits, - and _"))
        if isinstance(step, OtherPass):
            problems += _check_other(step.type, where)
    order = [step.type for step in workflow.passes.values()]
    if not problems and not _is_usable(order):
        hint = (
            f"use one of {', '.join(_FINE_TUNING)}, then MergeAdapterWeights and ModelBuilder; LoRA and ModelBuilder, "
            f"to leave the adapter beside the exported model (QLoRA and DoRA change more than an adapter there can); "
            f"ModelBuilder alone, to export the base model; other passes right before ModelBuilder, or those for ONNX "
            f"behind it, unless an adapter is left beside; or {_OLIVE}"
        )
        message = f"the native engine does not run these passes: {order}"
        problems.append(Problem(message, workflow.where("passes"), hint))
    return problems


def _is_usable(order: list[str]) -> bool:
    """Tell whether passes stand where the native engine can run them: others take a whole model, of one kind."""
    if order == _BESIDE:
        return True
    native = [kind for kind in order if kind in NATIVE and kind != "Gptq"]
    if native not in _ORDERS or order[: len(native) - 1] != native[:-1]:
        return False
    modules, builder = olive_passes() or {}, order.index("ModelBuilder")
    before, after = order[len(native) - 1 : builder], order[builder + 1 :]
    return not (
        any(".onnx." in modules.get(kind, "") for kind in before)
        or any(".pytorch." in modules.get(kind, "") or kind == "Gptq" for kind in after)
    )


def _check_order_for_olive(workflow: Workflow) -> list[Problem]:
    """Check for what has to be known to ask a model that stock Olive made, in whatever order."""
    if any(step.type == "ModelBuilder" for step in workflow.passes.values()):
        return []
    message = "the workflow has no ModelBuilder pass, so there is nothing to ask"
    return [Problem(message, workflow.where("passes"), _README)]


def _check_other(kind: str, where: str) -> list[Problem]:
    known = olive_passes()
    if known is None or kind in known:  # without Olive nobody can tell, until it is needed
        return []
    near = difflib.get_close_matches(kind.lower(), {name.lower(): name for name in known}, n=1)
    found = {name.lower(): name for name in known}
    hint = f"did you mean {found[near[0]]!r}?" if near else f"edgetune has {', '.join(NATIVE)}"
    return [Problem(f"neither edgetune nor Olive has a pass of type {kind!r}", where, hint)]


def _check_references(workflow: Workflow) -> list[Problem]:
    """Check that names used in the file are defined in it."""
    names = [data.name for data in workflow.data_configs]
    tuning, systems = workflow.tuning, list(workflow.systems)
    used = [
        ("host", workflow.host, systems, workflow.where("host")),
        ("target", workflow.target, systems, workflow.where("target")),
    ]
    if tuning is not None:
        used += [
            (key, getattr(tuning, key), names, workflow.where_in_tuning(key))
            for key in ("train_data_config", "eval_data_config")
        ]
    used += [
        (key, value, names, workflow.where("passes", name, key))
        for name, step in workflow.exporting.items()
        for key, value in step.model_dump().items()
        if key.endswith("data_config")
    ]
    repeated = [
        Problem(f"two data sets are called {data.name!r}", workflow.where("data_configs", index, "name"), "rename one")
        for index, data in enumerate(workflow.data_configs)
        if data.name in names[:index]
    ]
    return repeated + [
        Problem(f"{key} names {name!r}, which is not defined", where, f"defined are: {', '.join(defined)}")
        for key, name, defined, where in used
        if name is not None and name not in defined
    ]


def _check_meaning(workflow: Workflow, project: Project) -> list[Problem]:
    """Check what only the values together can tell."""
    problems = _check_export(workflow) + ([] if project.olive else _check_adapter(workflow))
    if not base_model_id(workflow, project):
        message = f"model_path must be ../model-cache/<org>/<name>, not {workflow.input_model.model_path!r}"
        hint = "use the id of a model on the Hub below ../model-cache/"
        problems.append(Problem(message, workflow.where("input_model", "model_path"), hint))
    evaluation = workflow.eval_data
    if evaluation and evaluation.contract != workflow.contract:
        where = workflow.where_contract(evaluation)
        problems.append(Problem("training and evaluation data have different templates", where, "make them equal"))
    return problems


def _check_adapter(workflow: Workflow) -> list[Problem]:
    """Check that an adapter that is not merged changes only what it can change beside the exported model."""
    problems = list[Problem]()
    if workflow.merges or workflow.tuning is None:
        return problems
    for key, value in (("precision", "bf16"), ("use_cuda_bf16", True)):
        if getattr(workflow.builder, key) == value:
            message, where = (
                "an adapter beside a model in bfloat16 cannot be written",
                workflow.where_in_pass("ModelBuilder", key),
            )
            problems.append(Problem(message, where, "add a MergeAdapterWeights pass, or choose int4 or fp16"))
    unfit = [name for name in workflow.tuning.target_modules or () if name.rpartition(".")[2] not in MODULES]
    hint = f"add a MergeAdapterWeights pass before ModelBuilder, or train only {', '.join(MODULES)}"
    where = workflow.where_in_tuning("target_modules")
    return problems + [
        Problem(f"what is trained of {name} cannot stay beside the exported model", where, hint) for name in unfit
    ]


def _check_export(workflow: Workflow) -> list[Problem]:
    """Check that the builder can make what is asked for on the device that is asked for."""
    builder, provider, problems = workflow.builder, workflow.provider, list[Problem]()
    if builder.precision not in PRECISIONS[provider]:
        message = f"the builder makes no {builder.precision} for {provider}"
        hint = f"for {provider} there is {', '.join(PRECISIONS[provider])}"
        problems.append(Problem(message, workflow.where_in_pass("ModelBuilder", "precision"), hint))
    if builder.precision != "int4":
        problems += [
            Problem(
                f"{key} has a meaning with precision int4 only, and this is {builder.precision}",
                workflow.where_in_pass("ModelBuilder", key),
                "remove it",
            )
            for key in sorted(builder.given)
            if key.startswith("int4_") or key in ("use_qdq", "use_cuda_bf16")
        ]
    elif builder.use_cuda_bf16 and provider != "CUDAExecutionProvider":
        where = workflow.where_in_pass("ModelBuilder", "use_cuda_bf16")
        problems.append(Problem(f"use_cuda_bf16 has no meaning for {provider}", where, "remove it"))
    if workflow.gptq and builder.precision != "int4":
        where = workflow.where_in_pass("ModelBuilder", "precision")
        problems.append(Problem(f"what Gptq makes is int4, not {builder.precision}", where, "write int4"))
    return problems


def base_model_id(workflow: Workflow, project: Project) -> str:
    """Return the Hub id of the base model: the path below ``model-cache/``; empty when it is no such path anywhere."""
    # normpath, not resolve: model-cache may be a link to a larger disk.
    path = Path(os.path.normpath(project.config_folder / workflow.input_model.model_path))
    if not path.is_relative_to(project.model_cache):
        return ""
    parts = path.relative_to(project.model_cache).parts
    is_id = len(parts) == 2 and not re.search(r"[\\:\x00-\x1f]", "".join(parts))  # noqa: PLR2004
    return "/".join(parts) if is_id else ""
