"""The Olive workflow file as the native engine understands it.

The models name exactly the keys this engine honours, with Olive's defaults; a test holds them against Olive's
own schema. Nothing here needs Olive, torch or transformers to be installed.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
    field_validator,
)

from edgetune.errors import EdgetuneError, Problem
from edgetune.project import Project
from edgetune.prompt import Template
from edgetune.source import JsonSource

BUILDER_DEVICE = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
}
"""Execution provider → the name onnxruntime-genai's builder has for it."""

PRECISIONS = {
    "cpu": ("int4", "fp32"),
    "cuda": ("int4", "fp16", "bf16", "fp32"),
    "dml": ("int4", "fp16"),
}
"""What onnxruntime-genai 0.14.1 can build for a device."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LoadKwargs(_Strict):
    """How transformers loads the base model."""

    revision: str | None = None
    trust_remote_code: Literal[False] = False


class InputModel(_Strict):
    """The base model."""

    type: Literal["HfModel"]
    model_path: str
    task: Literal["text-generation", "text-generation-with-past"] = "text-generation"
    load_kwargs: LoadKwargs = LoadKwargs()


class Accelerator(_Strict):
    """What the exported model runs on."""

    device: Literal["cpu", "gpu"]
    execution_providers: Annotated[
        list[Literal["CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"]],
        Field(min_length=1, max_length=1),
    ]


class System(_Strict):
    """A machine; Olive takes one accelerator per system."""

    type: Literal["LocalSystem"]
    accelerators: Annotated[list[Accelerator], Field(min_length=1, max_length=1)]


class LoadDataset(_Strict):
    """Arguments of ``datasets.load_dataset``. Olive's default split, ``validation``, fits no file."""

    data_name: Literal["json", "csv"]
    data_files: str | list[str]
    split: str


class PreProcess(_Strict):
    """How rows become text. Olive's own defaults join rows and add special tokens, so both must be set."""

    text_template: str
    text_cols: str | list[str] = ["text"]
    strategy: Literal["line-by-line"]
    add_special_tokens: Literal[False]
    max_seq_len: Annotated[int, Field(ge=2)] = 1024
    max_samples: Annotated[int, Field(ge=1)] | None = None
    # These two change only time and memory; the native engine pads each batch to its longest row.
    pad_to_max_len: bool = True
    use_attention_mask: bool = True

    @field_validator("text_template")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        Template.parse(value)
        return value


class DataConfig(_Strict):
    """A named data set."""

    name: str
    type: Literal["HuggingfaceContainer"]
    load_dataset_config: LoadDataset
    pre_process_data_config: PreProcess

    @property
    def template(self) -> Template:
        """The prompt contract of this data."""
        return Template.parse(self.pre_process_data_config.text_template)


class _TrainingArguments(_Strict):
    """The arguments with a default of Olive's, or that every run needs to be sane."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: str = "constant"
    report_to: str | list[str] = "none"
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 42
    gradient_checkpointing: bool | None = None


PASSED_ON_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "average_tokens_across_devices",
    "data_seed",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "full_determinism",
    "gradient_checkpointing_kwargs",
    "greater_is_better",
    "ignore_data_skip",
    "include_num_input_tokens_seen",
    "label_smoothing_factor",
    "liger_kernel_config",
    "load_best_model_at_end",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "lr_scheduler_kwargs",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "project",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "train_sampling_strategy",
    "use_liger_kernel",
    "warmup_steps",
    "weight_decay",
)
"""TrainingArguments of transformers that are handed on as they are. Those missing here either belong to the
runtime (where checkpoints lie, devices, precision) or reach outside the machine (the Hub)."""

TrainingArguments: type[_TrainingArguments] = create_model(
    "TrainingArguments",
    __base__=_TrainingArguments,
    **dict.fromkeys(PASSED_ON_ARGUMENTS, (Any, None)),  # type: ignore[call-overload]
)


class LoRA(_Strict):
    """Olive's LoRA pass."""

    type: Literal["LoRA"]
    r: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train_data_config: str
    eval_data_config: str | None = None
    training_args: TrainingArguments = TrainingArguments()  # type: ignore[valid-type]


class MergeAdapterWeights(_Strict):
    """Olive's merge pass; it has no options."""

    type: Literal["MergeAdapterWeights"]


class ModelBuilder(_Strict):
    """Olive's pass around onnxruntime-genai's model builder."""

    type: Literal["ModelBuilder"]
    precision: Literal["int4", "fp16", "bf16", "fp32"]
    search: dict[str, Any] = {}
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    int4_accuracy_level: Literal[1, 2, 3, 4] | None = None
    int4_is_symmetric: bool | None = None
    int4_op_types_to_quantize: list[str] | None = None
    int4_nodes_to_exclude: list[str] | None = None
    int4_algo_config: Literal["default", "rtn", "k_quant_mixed", "k_quant_last", "rtn_last"] | None = None
    use_qdq: bool | None = None
    use_cuda_bf16: bool | None = None

    @field_validator("search")
    @classmethod
    def _has_a_usable_length(cls, value: dict[str, Any]) -> dict[str, Any]:
        length = value.get("max_length", 1)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError("max_length must be a whole number of tokens, at least 1")
        return value

    def builder_options(self) -> dict[str, Any]:
        """Return the options as ``create_model`` of the builder names them."""
        return self.model_dump(exclude={"type", "precision", "search"}, exclude_none=True)


Pass = Annotated[LoRA | MergeAdapterWeights | ModelBuilder, Field(discriminator="type")]


class Workflow(_Strict):
    """The whole file. The keys with defaults at the end are stock Olive's; they do not change a result."""

    input_model: InputModel
    systems: dict[str, System]
    data_configs: list[DataConfig]
    passes: dict[str, Pass]
    host: str | None = None
    target: str
    workflow_id: str = ""
    cache_dir: str = ""
    output_dir: str = ""
    log_severity_level: int = 1
    evaluate_input_model: bool = False
    _source: JsonSource = PrivateAttr()

    def where(self, *location: str | int) -> str:
        """Return ``file:line`` of a value of the file."""
        return self._source.where(*location)

    def where_in_pass(self, kind: str, *location: str) -> str:
        """Return ``file:line`` of a value of the pass of the given type."""
        name = next(name for name, p in self.passes.items() if p.type == kind)
        return self.where("passes", name, *location)

    def where_in_data(self, data: "DataConfig", *location: str) -> str:
        """Return ``file:line`` of a value of a data config."""
        return self.where("data_configs", self.data_configs.index(data), *location)

    @property
    def lora(self) -> LoRA:
        """The fine-tuning pass."""
        return next(p for p in self.passes.values() if isinstance(p, LoRA))

    @property
    def builder(self) -> ModelBuilder:
        """The export pass."""
        return next(p for p in self.passes.values() if isinstance(p, ModelBuilder))

    @property
    def device(self) -> str:
        """The builder's name of what the model runs on: cpu, cuda or dml."""
        return BUILDER_DEVICE[self.systems[self.target].accelerators[0].execution_providers[0]]

    @property
    def train_data(self) -> DataConfig:
        """The data the adapter is trained on."""
        return self._data(self.lora.train_data_config)

    @property
    def eval_data(self) -> DataConfig | None:
        """The data the adapter is evaluated on, if the pass names any."""
        name = self.lora.eval_data_config
        return None if name is None else self._data(name)

    @property
    def template(self) -> Template:
        """The prompt contract."""
        return self.train_data.template

    def _data(self, name: str) -> DataConfig:
        return next(d for d in self.data_configs if d.name == name)


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
    "MergeAdapterWeights": MergeAdapterWeights,
    "ModelBuilder": ModelBuilder,
}
"""Which keys are valid where, for suggestions."""

_OLIVE = "run with `--engine olive`"


def load(project: Project) -> Workflow:
    """Read and check the project's workflow file.

    Raises EdgetuneError with every problem of the file, each with its line.
    """
    source = JsonSource(project.config, project.name(project.config))
    problems = source.duplicate_problems()
    try:
        workflow = Workflow.model_validate(source.data)
        workflow._source = source  # noqa: SLF001 - an attribute of our own class
    except ValidationError as error:
        problems += [_explain(details, source) for details in error.errors()]
        raise EdgetuneError(problems) from None
    problems += _check_references(workflow)
    if not problems:
        problems += _check_meaning(workflow, project)
    if problems:
        raise EdgetuneError(problems)
    return workflow


def load_for_olive(project: Project) -> Workflow:
    """Read only which base model the file wants; stock Olive judges all the rest.

    Raises EdgetuneError when the file is no JSON object.
    """
    source = JsonSource(project.config, project.name(project.config))
    if not isinstance(source.data, dict):
        raise EdgetuneError([Problem("not a JSON object", source.where())])
    model = source.data.get("input_model")
    model = model if isinstance(model, dict) else {}
    kwargs = model.get("load_kwargs")
    revision = kwargs.get("revision") if isinstance(kwargs, dict) else None
    workflow = Workflow.model_construct(
        input_model=InputModel.model_construct(
            model_path=str(model.get("model_path", "")), load_kwargs=LoadKwargs.model_construct(revision=revision)
        )
    )
    workflow._source = source  # noqa: SLF001 - an attribute of our own class
    return workflow


def _explain(error: Any, source: JsonSource) -> Problem:
    """Turn one of pydantic's errors into a problem with a line and a hint."""
    location: tuple[str | int, ...] = error["loc"]
    # A discriminated union puts its tag into the location; the file knows no such level.
    path = tuple(p for i, p in enumerate(location) if not (i == 2 and location[0] == "passes"))  # noqa: PLR2004
    where, key = source.where(*path), str(location[-1]) if location else "the file"
    owner = next((_SECTIONS[p] for p in reversed(location[:-1]) if p in _SECTIONS), Workflow)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, owner.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"remove it, or {_OLIVE} if stock Olive knows it"
        return Problem(f"the native engine does not know the key {key!r}", where, hint)
    if error["type"] == "missing":
        return Problem(f"the key {key!r} is missing", where)
    if error["type"] == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        return Problem(f"the native engine has no pass of type {tag!r}", where, f"it has {known}; else {_OLIVE}")
    message = error["msg"].removeprefix("Value error, ")
    return Problem(f"{'.'.join(map(str, path))}: {message[0].lower()}{message[1:]}", where)


def _check_references(workflow: Workflow) -> list[Problem]:
    """Check that names used in the file are defined in it, and that the passes are in a usable order."""
    order = [p.type for p in workflow.passes.values()]
    if order != ["LoRA", "MergeAdapterWeights", "ModelBuilder"]:
        hint = f"use LoRA, MergeAdapterWeights, ModelBuilder in this order, or {_OLIVE}"
        return [Problem(f"the native engine does not run these passes: {order}", workflow.where("passes"), hint)]
    names = [data.name for data in workflow.data_configs]
    lora, systems = workflow.lora, list(workflow.systems)
    used = [
        ("host", workflow.host, systems, workflow.where("host")),
        ("target", workflow.target, systems, workflow.where("target")),
        ("train_data_config", lora.train_data_config, names, workflow.where_in_pass("LoRA", "train_data_config")),
        ("eval_data_config", lora.eval_data_config, names, workflow.where_in_pass("LoRA", "eval_data_config")),
    ]
    return [
        Problem(f"{key} names {name!r}, which is not defined", where, f"defined are: {', '.join(defined)}")
        for key, name, defined, where in used
        if name is not None and name not in defined
    ]


def _check_meaning(workflow: Workflow, project: Project) -> list[Problem]:
    """Check what only the values together can tell."""
    problems = []
    if not base_model_id(workflow, project):
        message = f"model_path must be ../model-cache/<org>/<name>, not {workflow.input_model.model_path!r}"
        hint = "use the id of a model on the Hub below ../model-cache/"
        problems.append(Problem(message, workflow.where("input_model", "model_path"), hint))
    evaluation = workflow.eval_data
    if evaluation and evaluation.template != workflow.template:
        where = workflow.where_in_data(evaluation, "pre_process_data_config", "text_template")
        problems.append(Problem("training and evaluation data have different templates", where, "make them equal"))
    if workflow.builder.precision not in PRECISIONS[workflow.device]:
        where = workflow.where_in_pass("ModelBuilder", "precision")
        hint = f"for this execution provider use one of: {', '.join(PRECISIONS[workflow.device])}"
        message = f"precision {workflow.builder.precision} cannot run on {workflow.device}"
        problems.append(Problem(message, where, hint))
    return problems


def base_model_id(workflow: Workflow, project: Project) -> str:
    """Return the Hub id of the base model: the path below ``model-cache/``; empty when it is no such path."""
    # normpath, not resolve: model-cache may be a link to a larger disk.
    path = Path(os.path.normpath(project.config_folder / workflow.input_model.model_path))
    if not path.is_relative_to(project.model_cache):
        return ""
    parts = path.relative_to(project.model_cache).parts
    return "/".join(parts) if len(parts) == 2 else ""  # noqa: PLR2004
