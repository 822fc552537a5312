"""The keys of the Olive workflow file that the native engine honours, with Olive's defaults.

A test holds these models against Olive's own schema. Nothing here needs Olive, torch or transformers.
"""

import re
from itertools import takewhile
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from edgetune.contract import Contract
from edgetune.data_schema import DataConfig, Strict, WrongKeyError
from edgetune.source import JsonSource
from edgetune.training_schema import TrainingArguments


class LoadKwargs(Strict):
    """How transformers loads the base model."""

    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _trust_is_for_one_commit(self) -> Self:
        if self.trust_remote_code and not self.trusts_code:
            message = "needs a 40-digit revision beside it: code that may change is never run"
            raise WrongKeyError("trust_remote_code", message)
        return self

    @property
    def trusts_code(self) -> bool:
        """Whether the repository's own Python code may run: pinned to a commit, or not at all."""
        return bool(self.trust_remote_code) and re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None


class InputModel(Strict):
    """The base model."""

    type: Literal["HfModel"]
    model_path: str
    task: Literal["text-generation", "text-generation-with-past"] = "text-generation"
    load_kwargs: LoadKwargs = LoadKwargs()


Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"]

PRECISIONS: dict[str, tuple[str, ...]] = {
    "CPUExecutionProvider": ("int4", "fp32"),
    "CUDAExecutionProvider": ("int4", "fp16", "bf16", "fp32"),
    "DmlExecutionProvider": ("int4", "fp16"),
}
"""What the builder of onnxruntime-genai 0.14.1 makes for each execution provider."""


class Accelerator(Strict):
    """What the exported model runs on."""

    device: Literal["cpu", "gpu"]
    execution_providers: Annotated[list[Provider], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        provider = self.execution_providers[0]
        device = "cpu" if provider == "CPUExecutionProvider" else "gpu"
        if self.device != device:
            raise WrongKeyError("device", f"{provider} belongs to the device {device!r}")
        return self


class System(Strict):
    """A machine; Olive takes one accelerator per system."""

    type: Literal["LocalSystem"]
    accelerators: Annotated[list[Accelerator], Field(min_length=1, max_length=1)]


class _FineTuning(Strict):
    """What Olive's fine-tuning passes have in common."""

    r: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    torch_dtype: Literal["bfloat16", "float32"] | None = None
    """None: what this machine is fastest with, see :func:`edgetune.preflight.chosen`. Olive takes bfloat16."""
    train_data_config: str
    eval_data_config: str | None = None
    training_args: TrainingArguments = TrainingArguments()

    @field_validator("target_modules", mode="before")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        if isinstance(value, str) or value == ["all-linear"]:
            raise ValueError('the layers are named one by one here, as in ["q_proj", "v_proj"]')
        return value


class LoRA(_FineTuning):
    """Olive's LoRA pass."""

    type: Literal["LoRA"]


class DoRA(_FineTuning):
    """Olive's DoRA pass: LoRA for the direction of each row of a matrix, and a trained length for the row."""

    type: Literal["DoRA"]


class QLoRA(_FineTuning):
    """Olive's QLoRA pass: LoRA on a base model in 4 bits."""

    type: Literal["QLoRA"]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """None: as ``torch_dtype``."""


FineTuning = LoRA | QLoRA | DoRA


class MergeAdapterWeights(Strict):
    """Olive's merge pass; it has no options."""

    type: Literal["MergeAdapterWeights"]


class Gptq(Strict):
    """Olive's pass that quantises each column of a matrix so that the next ones make up for its error."""

    type: Literal["Gptq"]
    bits: Literal[4] = 4
    group_size: Literal[16, 32, 64, 128, 256] = 128
    sym: bool = False
    lm_head: bool = False
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    data_config: str


class ModelBuilder(Strict):
    """Olive's pass around onnxruntime-genai's model builder."""

    type: Literal["ModelBuilder"]
    precision: Literal["int4", "fp16", "bf16", "fp32"]
    search: dict[str, Any] = Field(default_factory=dict)
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    int4_accuracy_level: Literal[1, 2, 3, 4] | None = None
    int4_is_symmetric: bool | None = None
    int4_op_types_to_quantize: list[str] | None = None
    int4_nodes_to_exclude: list[str] | None = None
    int4_algo_config: Literal["default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed"] | None = None
    use_qdq: bool | None = None
    use_cuda_bf16: bool | None = None
    include_hidden_states: bool | None = None

    @field_validator("search")
    @classmethod
    def _has_a_usable_length(cls, value: dict[str, Any]) -> dict[str, Any]:
        length = value.get("max_length", 1)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError("max_length must be a whole number of tokens, at least 1")
        return value

    @model_validator(mode="after")
    def _has_no_key_that_the_builder_ignores(self) -> Self:
        given = self.given
        algorithm = self.int4_algo_config or "default"
        if algorithm != "default" and (ignored := sorted(given & {"int4_op_types_to_quantize", "use_qdq"})):
            raise WrongKeyError(ignored[0], f"is read with int4_algo_config default only, and this is {algorithm}")
        # The builder reads embeddings that share the head's weights as if they were symmetric, unless told otherwise.
        if algorithm.startswith("k_quant") and self.int4_is_symmetric is not False:
            raise WrongKeyError("int4_is_symmetric", f"must be false beside {algorithm}, which is not symmetric")
        return self

    @property
    def given(self) -> set[str]:
        """The keys that are in the file."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}

    def builder_options(self) -> dict[str, Any]:
        """Return the options as ``create_model`` of the builder names them."""
        return self.model_dump(exclude={"type", "precision", "search"}, exclude_none=True)


class OtherPass(BaseModel):
    """Any other pass of Olive, which judges its keys."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str


NATIVE: dict[str, type[Strict]] = {
    kind.__name__: kind for kind in (LoRA, QLoRA, DoRA, MergeAdapterWeights, Gptq, ModelBuilder)
}
"""The passes whose keys are known here."""


def _kind(value: Any) -> str | None:
    """Return which of the models below reads a pass; None without a type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return None if not isinstance(kind, str) else kind if kind in NATIVE else "other"


Pass = Annotated[
    Annotated[LoRA, Tag("LoRA")]
    | Annotated[QLoRA, Tag("QLoRA")]
    | Annotated[DoRA, Tag("DoRA")]
    | Annotated[MergeAdapterWeights, Tag("MergeAdapterWeights")]
    | Annotated[Gptq, Tag("Gptq")]
    | Annotated[ModelBuilder, Tag("ModelBuilder")]
    | Annotated[OtherPass, Tag("other")],
    Discriminator(_kind),
]


class Workflow(Strict):
    """The whole file. The keys with defaults at the end are stock Olive's; they do not change a result."""

    input_model: InputModel
    systems: dict[str, System]
    data_configs: Annotated[list[DataConfig], Field(min_length=1)]
    passes: dict[str, Pass]
    host: str | None = None
    target: str
    workflow_id: str = ""
    cache_dir: str = ""
    output_dir: str = ""
    log_severity_level: int = 1
    evaluate_input_model: Literal[False] = False
    _source: JsonSource = PrivateAttr()

    def located(self, source: JsonSource) -> "Workflow":
        """Remember the file the workflow was read from, for :meth:`where`."""
        self._source = source
        return self

    def where(self, *location: str | int) -> str:
        """Return ``file:line`` of a value of the file."""
        return self._source.where(*location)

    def where_in_pass(self, kind: str, *location: str) -> str:
        """Return ``file:line`` of a value of the pass of the given type."""
        name = next(name for name, p in self.passes.items() if p.type == kind)
        return self.where("passes", name, *location)

    def where_in_tuning(self, *location: str) -> str:
        """Return ``file:line`` of a value of the fine-tuning pass."""
        return self.where("passes") if self.tuning is None else self.where_in_pass(self.tuning.type, *location)

    def where_in_data(self, data: "DataConfig", *location: str) -> str:
        """Return ``file:line`` of a value of a data config."""
        return self.where("data_configs", self.data_configs.index(data), *location)

    def where_contract(self, data: "DataConfig") -> str:
        """Return ``file:line`` of the text template or chat template of a data config."""
        return self.where_in_data(data, "pre_process_data_config", data.pre_process_data_config.contract_key)

    @property
    def tuning(self) -> FineTuning | None:
        """The fine-tuning pass; None when the base model is exported as it is."""
        return next((p for p in self.passes.values() if isinstance(p, FineTuning)), None)

    @property
    def trusts_code(self) -> bool:
        """Whether the base model's own Python code may run."""
        return self.input_model.load_kwargs.trusts_code

    @property
    def merges(self) -> bool:
        """Whether there is an adapter that goes into the base weights; otherwise it stays beside the exported model."""
        return any(isinstance(p, MergeAdapterWeights) for p in self.passes.values())

    @property
    def gptq(self) -> Gptq | None:
        """The pass that quantises what is exported; None where the builder does that itself."""
        return next((p for p in self.passes.values() if isinstance(p, Gptq)), None)

    @property
    def exporting(self) -> dict[str, Any]:
        """The passes from the merged model, or the base model, to the exported one."""
        return {n: p for n, p in self.passes.items() if not isinstance(p, FineTuning | MergeAdapterWeights)}

    @property
    def before_export(self) -> list[Any]:
        """The passes that change the weights before the export pass reads them."""
        return list(takewhile(lambda p: not isinstance(p, ModelBuilder), self.exporting.values()))

    def data_of(self, step: Any) -> list[DataConfig]:
        """Return the data sets that a pass names, in keys such as ``data_config``."""
        named = [value for key, value in step.model_dump().items() if key.endswith("data_config")]
        return [data for data in self.data_configs if data.name in named]

    @property
    def calibration_data(self) -> list[DataConfig]:
        """The data that passes on the way to the exported model look at."""
        return [data for step in self.exporting.values() for data in self.data_of(step)]

    @property
    def builder(self) -> ModelBuilder:
        """The export pass."""
        return next(p for p in self.passes.values() if isinstance(p, ModelBuilder))

    @property
    def provider(self) -> Provider:
        """The execution provider the exported model is made for."""
        return self.systems[self.target].accelerators[0].execution_providers[0]

    @property
    def train_data(self) -> DataConfig:
        """The data the adapter is trained on; without a fine-tuning pass, the first in the file."""
        return self.data_configs[0] if self.tuning is None else self._data(self.tuning.train_data_config)

    @property
    def eval_data(self) -> DataConfig | None:
        """The data the models are evaluated on, if the pass names any; without a pass, the second in the file."""
        if self.tuning is None:
            return next((data for data in self.data_configs[1:] if data not in self.calibration_data), None)
        name = self.tuning.eval_data_config
        return None if name is None else self._data(name)

    @property
    def contract(self) -> Contract:
        """The prompt contract."""
        return self.train_data.contract

    def _data(self, name: str) -> DataConfig:
        return next(d for d in self.data_configs if d.name == name)
