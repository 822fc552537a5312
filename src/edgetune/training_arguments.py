"""What transformers' Trainer is told: the file's arguments, Olive's defaults, and what is the runtime's to decide."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune import trackers
from edgetune.errors import failure, first_line
from edgetune.loading import device, fine_tuning
from edgetune.preflight import Settings
from edgetune.schema import QLoRA
from edgetune.stages import Job

_SAVES_PER_RUN = 10
_LOGGING_STEPS = 500  # of transformers, which evaluates as often unless told otherwise


def training_arguments(job: Job, output: Path, settings: Settings, *, leads: bool) -> Any:
    """Make transformers' TrainingArguments for a training that leaves checkpoints in ``output``.

    A process that does not lead neither saves nor reports. Raises EdgetuneError for what transformers refuses.
    """
    from transformers import TrainingArguments

    given = fine_tuning(job).training_args.model_dump(exclude_none=True)
    if job.workflow.eval_data is None:
        given["eval_strategy"] = "no"
    given.setdefault("eval_strategy", "steps")
    if given.get("load_best_model_at_end"):
        given |= _save_when_evaluated(given)
    # Checkpoints are for resuming after an interruption: a share of the run, whatever its length.
    given.setdefault("save_steps", 1 / _SAVES_PER_RUN)
    given.setdefault("save_total_limit", 2)
    given["gradient_checkpointing"] = settings.gradient_checkpointing
    if isinstance(fine_tuning(job), QLoRA) and device() == "cuda":
        given.setdefault("optim", "paged_adamw_32bit")  # Olive's default; there is none for a CPU
    given.setdefault("run_name", trackers.run_name(job))
    given.setdefault("project", job.project.root.name)
    given.setdefault("dataloader_pin_memory", False)
    if not given.get("dataloader_drop_last"):
        # The rows of an optimiser step together: they are the same ones, and can be cut where it is best.
        given["per_device_train_batch_size"] *= given["gradient_accumulation_steps"]
        given["gradient_accumulation_steps"] = 1
    if not leads:
        given |= {"report_to": "none", "save_strategy": "no", "load_best_model_at_end": False}
    with argument_errors(job):
        arguments = TrainingArguments(
            output_dir=str(output),
            use_cpu=device() == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            **given,
        )
    if arguments.world_size > 1:
        hint = "torchrun can start `edgetune train` and `edgetune finetune`; other commands and launchers cannot"
        raise failure("training was started in several processes", hint=hint)
    # With several GPUs in sight, transformers would split every micro-batch over them (DataParallel); there is no
    # argument against it.
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001
    return arguments


def check_best_checkpoint(job: Job) -> None:
    """Raise EdgetuneError when nothing could tell which checkpoint is the best."""
    given = fine_tuning(job).training_args.model_dump(exclude_none=True)
    if not given.get("load_best_model_at_end"):
        return
    problem = None
    if job.workflow.eval_data is None:
        hint = "`edgetune data --write-split 0.1` sets some rows aside; name them in eval_data_config"
        problem = "load_best_model_at_end", "there are no evaluation data to tell which is best", hint
    elif given.get("eval_strategy") == "no":
        problem = "load_best_model_at_end", "nothing is evaluated", 'set eval_strategy to "epoch" or "steps"'
    elif given.get("metric_for_best_model", "loss") not in ("loss", "eval_loss"):
        problem = "metric_for_best_model", "training measures the loss only", 'write "loss"'
    if problem:
        key, what, hint = problem
        raise failure(f"{key}: {what}", where=job.workflow.where_in_tuning("training_args", key), hint=hint)


def _save_when_evaluated(given: dict[str, Any]) -> dict[str, Any]:
    """Return when to save so that the best checkpoint can be gone back to, unless the file says when."""
    steps = given.get("eval_steps", given.get("logging_steps", _LOGGING_STEPS))
    return {"save_strategy": given["eval_strategy"], "save_steps": steps} | given


@contextmanager
def argument_errors(job: Job) -> Iterator[None]:
    """Turn what transformers says of an unusable training argument into an error with its place."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        where = job.workflow.where_in_tuning("training_args")
        raise failure(
            f"training_args: {first_line(error)}", where=where, hint="correct the argument or remove it"
        ) from error
