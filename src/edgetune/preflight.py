"""Before weights are loaded: what the steps will take, what the workflow file leaves open, and what cannot work here.

Reads config.json of the base model, the numbers of the data step, the workflow file and the machine's memory.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal

from edgetune import estimate, installed, machine
from edgetune.architectures import BUILDERS_BLOCK, largest_block
from edgetune.base_model import read_config
from edgetune.errors import Problem, missing_extra, refuse
from edgetune.estimate import Dtype, Plan, Shape
from edgetune.loading import fine_tuning
from edgetune.schema import FineTuning
from edgetune.stages import Job, read_manifest

RESERVE = 500_000_000  # bytes for the system
_CLEARLY = 0.8  # an estimate may be too high by a quarter: below that, it is tried
_SHORTEST = 64  # tokens of a row
_TENTH = 100_000_000  # bytes that are worth a digit
_MINUTE, _HOUR = 60, 3600
_KEYS = {
    "method": "type",
    "dtype": "torch_dtype",
    "checkpointing": "gradient_checkpointing",
    "longest": "max_seq_len",
}
"""How the workflow file calls what may be changed."""
_VERBS = {"train": "training", "merge": "merging", "export": "exporting", "verify": "verifying"}


@dataclass(frozen=True)
class Settings:
    """What the workflow file says of the two settings that it may leave open, or what is best here."""

    dtype: Dtype
    gradient_checkpointing: bool
    reasons: tuple[str, ...] = ()
    """Why, for those that were left open."""


def chosen(job: Job) -> Settings:
    """Return the dtype and the gradient checkpointing of training."""
    return _settings(job, _plan(job, job.base_folder))


def _settings(job: Job, plan: Plan | None) -> Settings:
    tuning = fine_tuning(job)
    checkpointing = tuning.training_args.gradient_checkpointing
    if plan is None:  # an architecture of its own
        return Settings(tuning.torch_dtype or "float32", bool(checkpointing))
    available, bf16 = (None, True) if trains_on_gpu() else (limit(), bool(machine.has_bf16()))
    return settle(plan, available, dtype=tuning.torch_dtype, checkpointing=checkpointing, has_bf16=bf16)


def trains_on_gpu() -> bool:
    """Tell whether training will be on CUDA, as far as that is known without torch."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(machine.gpus())
    with suppress(PackageNotFoundError):
        return seen and not version("torch").endswith("+cpu")
    return seen


def settle(
    plan: Plan, available: float | None, *, dtype: Dtype | None, checkpointing: bool | None, has_bf16: bool
) -> Settings:
    """Choose what is None: the fastest that fits into ``available`` bytes (None: unknown, everything fits)."""
    reasons = []
    if dtype is None:
        smallest = replace(plan, dtype="float32", checkpointing=checkpointing is not False)
        dtype = "bfloat16" if has_bf16 or not _fits(smallest, "train", available) else "float32"
        needs = _size(estimate.train_memory(smallest))
        slow = "this processor has no instructions for bfloat16"
        why = "there are instructions for it here" if has_bf16 else f"float32 would need {needs}"
        reasons.append(f"torch_dtype {dtype}: {slow if dtype == 'float32' else why}")
    if checkpointing is None:
        without = replace(plan, dtype=dtype, checkpointing=False)
        checkpointing = not _fits(without, "train", available)
        needs = _size(estimate.train_memory(without))
        why = f"training would need {needs} without it" if checkpointing else "it fits without"
        reasons.append(f"gradient_checkpointing {str(checkpointing).lower()}: {why}")
    return Settings(dtype, checkpointing, tuple(reasons))


def trained_dtype(job: Job) -> Dtype | Literal["auto"]:
    """Return the dtype the adapter was trained with; the one it would be trained with when there is none.

    Without a fine-tuning pass ``auto``: weights are used as they are stored.
    """
    if job.workflow.tuning is None:
        return "auto"
    if job.project.olive:
        return job.workflow.tuning.torch_dtype or "bfloat16"  # Olive's default
    manifest = read_manifest(job.project.stage_folder("train"))
    recorded: Dtype | None = (manifest or {"metrics": {}})["metrics"].get("torch_dtype")
    return recorded or chosen(job).dtype


def check(job: Job, steps: Sequence[str]) -> None:
    """Tell what these steps will take. Raises EdgetuneError when that is clearly more than there is."""
    of_olive = "export" in steps and any(step.type != "ModelBuilder" for step in job.workflow.exporting.values())
    if of_olive and installed.olive_passes() is None:
        raise missing_extra("olive", ImportError(name="olive-ai"))
    plan = _plan(job, job.base_folder)
    if plan is None:
        return
    reasons: tuple[str, ...] = ()
    if job.workflow.tuning:
        decided = _settings(job, plan)
        plan = replace(plan, dtype=decided.dtype, checkpointing=decided.gradient_checkpointing)
        reasons = decided.reasons if "train" in steps else ()
    available, free = limit(), machine.disk_free(job.project.results)
    problems = [*_memory_problems(job, plan, steps, available, _CLEARLY), *_disk_problems(job, plan, steps, free)]
    if "export" in steps:
        problems += [*_block_problems(job), *(_device_problems(job) if "train" in steps else ())]
    refuse(problems)
    job.progress.say(f"preflight {_summary(plan, steps)}")
    for reason in reasons:
        job.progress.say(f"preflight {reason}")
    for problem in _memory_problems(job, plan, steps, available, 1):
        job.progress.say(f"preflight warning: {problem.where}: {problem.message}; {problem.hint}")


def download_problems(job: Job, folder: Path) -> list[Problem]:
    """Return what cannot work with the base model whose config.json is in ``folder``, however short the rows are."""
    plan = _plan(job, folder) if job.ahead else None
    if plan is None:
        return []
    dtype = _settings(job, plan).dtype if job.workflow.tuning else plan.dtype
    plan = replace(plan, dtype=dtype, checkpointing=True, batch=1, accumulation=1, longest=1)
    return _memory_problems(job, plan, job.ahead, limit(), _CLEARLY)


def limit() -> float | None:
    """Return how much memory a step may take here; None where the machine does not say. Swap does not count."""
    memory = machine.memory_bytes()
    return None if memory is None else memory.total - RESERVE


def _fits(plan: Plan, step: str, available: float | None, share: float = 1) -> bool:
    return available is None or share * estimate.MEMORY[step](plan) <= available


def alternatives(plan: Plan) -> Iterator[Plan]:
    """Yield plans with ever more of the settings that save memory in training.

    The batch is not one of them: its rows are worked through in micro-batches of a limited size. What costs least
    comes first: time, then precision, then rows.
    """
    if plan.method == "none":
        return
    if not plan.checkpointing:
        yield (plan := replace(plan, checkpointing=True))
    if plan.dtype == "float32":
        yield (plan := replace(plan, dtype="bfloat16"))
    quantised = replace(plan, method="QLoRA")
    if plan.method == "LoRA" and estimate.train_memory(quantised) < estimate.train_memory(plan):
        yield (plan := quantised)
    while plan.longest > _SHORTEST:
        yield (plan := replace(plan, longest=max(plan.longest // 2, _SHORTEST)))


def fitting(plan: Plan, step: str, available: float) -> Plan | None:
    """Return the first of the alternatives that fits, without those of its settings that are not needed for it."""
    found = next((changed for changed in alternatives(plan) if _fits(changed, step, available)), None)
    if found is not None:
        for name in ("checkpointing", "dtype", "method"):
            reverted = replace(found, **{name: getattr(plan, name)})
            found = reverted if _fits(reverted, step, available) else found
    return found


def changed_keys(plan: Plan, changed: Plan) -> dict[str, str]:
    """Return the keys and values of the workflow file that make one plan the other."""
    return {
        key: str(getattr(changed, name)).replace("True", "true")
        for name, key in _KEYS.items()
        if getattr(changed, name) != getattr(plan, name)
    }


def _memory_problems(
    job: Job, plan: Plan, steps: Sequence[str], available: float | None, share: float
) -> list[Problem]:
    if trains_on_gpu():  # the memory there is not known here
        steps = [step for step in steps if step != "train"]
    return [
        Problem(
            f"{_VERBS[step]} {job.base_id} needs about {_size(estimate.MEMORY[step](plan))} of memory, "
            f"of which this machine can give {_size(available or 0)}",
            _where(job, step),
            remedy(plan, step, available or 0),
        )
        for step in steps
        if step in estimate.MEMORY and not _fits(plan, step, available, share)
    ]


def remedy(plan: Plan, step: str, available: float) -> str:
    """Return which settings make a step fit, or else which memory would."""
    for fewer in range(plan.processes - 1, 0, -1):
        if _fits(replace(plan, processes=fewer), step, available):
            return f"it fits with --nproc {fewer}"
    if (found := fitting(plan, step, available)) is not None:
        named = ", ".join(f"{key} {value}" for key, value in changed_keys(plan, found).items())
        shorter = " (longer rows are left out)" if found.longest != plan.longest else ""
        return f"it fits ({_size(estimate.MEMORY[step](found))}) with {named}{shorter}"
    least = min(estimate.MEMORY[step](changed) for changed in (plan, *alternatives(plan))) + RESERVE
    return f"no setting makes it fit: take a smaller base model, or a machine with {_size(least)}"


def _where(job: Job, step: str) -> str:
    if step == "train":
        return job.workflow.where_in_tuning("training_args", "per_device_train_batch_size")
    return job.workflow.where("input_model", "model_path")


def _device_problems(job: Job) -> list[Problem]:
    """Return whether the exported model could not be loaded here, which would show after training only."""
    provider = job.workflow.provider
    device = installed.DEVICES[provider]
    if device == "cpu" or device in installed.flavours()["onnxruntime-genai"].values():
        return []
    hint = (
        "install what setup/requirements.txt names for it, or `edgetune train` here and do the rest where there is one"
    )
    message = f"the model is for {provider}, and onnxruntime-genai for it is not installed"
    return [Problem(message, job.workflow.where("systems"), hint)]


def _block_problems(job: Job) -> list[Problem]:
    """Return whether the exported model could not be run for its block size, which only its first token would show."""
    builder, config = job.workflow.builder, read_config(job.base_folder)
    block = builder.int4_block_size or BUILDERS_BLOCK
    shared = config.get("tie_word_embeddings") and (builder.int4_algo_config or "default") != "default"
    if not shared or largest_block(config, block) == block:
        return []
    message = (
        f"int4_block_size {block} does not divide the {config['hidden_size']} numbers of an embedding, which is the "
        f"output layer, too: {builder.int4_algo_config} cannot quantise it"
    )
    where = job.workflow.where_in_pass("ModelBuilder", "int4_block_size")
    return [Problem(message, where, f"write {largest_block(config, block)}, or leave out int4_algo_config")]


def _disk_problems(job: Job, plan: Plan, steps: Sequence[str], free: int) -> list[Problem]:
    needed = _disk(plan, steps)
    if needed <= free:
        return []
    results = job.project.name(job.project.results)
    message = f"the results need about {_size(needed)} of disk space, {_size(free)} are free"
    return [Problem(message, results, f"free some space, or make {results} a link to a larger disk")]


def _disk(plan: Plan, steps: Sequence[str]) -> float:
    return sum(estimate.DISK[step](plan) for step in steps if step in estimate.DISK)


def _summary(plan: Plan, steps: Sequence[str]) -> str:
    memory = machine.memory_bytes()
    total = f" of {_size(memory.total)} memory" if memory else " of memory"
    parts = [f"{step} {_size(estimate.MEMORY[step](plan))}" for step in steps if step in estimate.MEMORY]
    rate = machine.cores() * estimate.gflops(plan.dtype, machine.cpu_features() or ())
    times = estimate.seconds(plan, rate)
    time = _duration(sum(times.get(step, 0) for step in steps))
    return f"about {', '.join(parts)}{total}; {_size(_disk(plan, steps))} of disk; {time} to train and export"


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return "less than a minute"
    return f"about {seconds / _MINUTE:.0f} min" if seconds < _HOUR else f"about {seconds / _HOUR:.1f} h"


def _targets(tuning: FineTuning, *, fused: bool) -> tuple[str, ...]:
    """Return the last part of the names of the matrices that get an adapter: those named, or the defaults."""
    if tuning.target_modules:
        return tuple({name.rpartition(".")[2]: None for name in tuning.target_modules})
    if tuning.type != "QLoRA":  # PEFT's choice
        return ("qkv_proj",) if fused else ("q_proj", "v_proj")
    if fused:
        return "qkv_proj", "o_proj", "gate_up_proj", "down_proj"
    return "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def _size(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= _TENTH else decimal(round(amount))


def _plan(job: Job, folder: Path) -> Plan | None:
    """Return what the workflow file asks for, with the rows that the data step found.

    None for a base model of unknown architecture.
    """
    config = read_config(folder)
    shape = Shape.of(config)
    if shape is None:
        return None
    builder = job.workflow.builder
    exported: dict[str, Any] = {"precision": builder.precision, "block": builder.int4_block_size or BUILDERS_BLOCK}
    exported["streamed"] = not (
        job.workflow.before_export or builder.use_qdq or set(builder.int4_op_types_to_quantize or ()) - {"MatMul"}
    )
    if (tuning := job.workflow.tuning) is None:
        return Plan(shape, "none", "float32" if shape.dtype == "float32" else "bfloat16", **exported)
    arguments: Any = tuning.training_args
    sets = (read_manifest(job.project.stage_folder("data")) or {"metrics": {"sets": {}}})["metrics"]["sets"]
    rows = sets.get("train", {})
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    samples = rows.get("samples", 0)
    share = arguments.num_train_epochs
    if arguments.max_steps > 0 and samples:
        share = arguments.max_steps * batch / samples
    return Plan(
        shape,
        method=tuning.type,
        dtype=tuning.torch_dtype or "float32",
        r=tuning.r,
        targets=_targets(tuning, fused=config.get("model_type") == "phi3"),
        dropout=tuning.lora_dropout > 0,
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        checkpointing=bool(arguments.gradient_checkpointing),
        longest=rows.get("longest", 1),
        processes=job.processes.here if job.processes else 1,
        rows=samples,
        tokens=round(share * rows.get("tokens", 0)),
        learned=round(share * rows.get("learned_tokens", 0)),
        **exported,
    )
