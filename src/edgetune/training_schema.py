"""The keys of ``training_args`` that the native engine honours, with defaults of Olive's."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, field_validator

from edgetune.data_schema import Strict

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
"""Experiment trackers that ``report_to`` may name."""


class _TrainingArguments(Strict):
    """The arguments with a default of Olive's, or that every run needs to be sane."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    lr_scheduler_type: str = "constant"
    report_to: str | list[str] = "none"
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    gradient_checkpointing: bool | None = None

    @field_validator("report_to")
    @classmethod
    def _are_known_trackers(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if wrong := [name for name in names if name not in (*TRACKERS, "none")]:
            raise ValueError(f"{wrong[0]!r} is no tracker; there are {', '.join(TRACKERS)}, or none")
        return value


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

_NUMBERS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "eval_steps",
    "label_smoothing_factor",
    "logging_steps",
    "save_steps",
    "warmup_steps",
    "weight_decay",
)

if TYPE_CHECKING:
    TrainingArguments = _TrainingArguments
else:
    TrainingArguments = create_model(
        "TrainingArguments",
        __base__=_TrainingArguments,
        **{name: (float | None if name in _NUMBERS else Any, None) for name in PASSED_ON_ARGUMENTS},
    )
