"""Train the adapter: base model + tokenised data + fine-tuning pass → ``gen-model/adapter/``.

PEFT's LoRA on a transformers Trainer, with the loss on completions only; for QLoRA the base model is in 4 bits. An
interrupted run continues from its last whole checkpoint.
"""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import machine, preflight, trackers
from edgetune.download import digests
from edgetune.dropout import replace_dropout
from edgetune.errors import Problem, failure, first_line, missing_extra, refuse
from edgetune.loading import device, fine_tuning, load_base
from edgetune.loss import CompletionLoss
from edgetune.memory import peak_memory_mb, release_memory
from edgetune.quantised import Quantisation
from edgetune.schema import QLoRA
from edgetune.stages import Hashes, Job, Stage, is_intact, published, read_json, read_manifest, write_json
from edgetune.tensors import read_folder
from edgetune.trainer import make_trainer
from edgetune.training_arguments import argument_errors, check_best_checkpoint, training_arguments

if TYPE_CHECKING:
    from transformers import Trainer

    from edgetune.distributed import Team

CHECKPOINTS = "checkpoints"
"""The subfolder for what an interrupted training continues from; removed when the adapter is complete."""
_SETTINGS = "settings.json"  # in it


def inputs(job: Job) -> dict[str, Any]:
    """Return what the adapter depends on."""
    tuning = fine_tuning(job).model_dump(exclude={"train_data_config", "eval_data_config"}, exclude_none=True)
    arguments = tuning["training_args"]
    for name in _ONLY_TIME_AND_LOGS:
        arguments.pop(name, None)
    if not arguments.get("dataloader_drop_last"):  # or only their product counts
        rows = arguments.pop("per_device_train_batch_size") * arguments.pop("gradient_accumulation_steps")
        arguments["rows_of_a_step"] = rows
    return {
        "base": digests(job, weights=True),
        "data": [job.keys["data"], published(job.project.stage_folder("data"))],
        "pass": tuning,
    }


_ONLY_TIME_AND_LOGS = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "per_device_eval_batch_size",
    "torch_empty_cache_steps",
    "gradient_checkpointing",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "project",
    "report_to",
    "run_name",
    "save_total_limit",
}
"""Training arguments that change no weight: editing them does not train again."""


def build(job: Job, folder: Path) -> dict[str, Any]:
    """Train and save the adapter into ``folder``. Raises EdgetuneError for a configuration that cannot work."""
    check_target_modules(job)
    check_best_checkpoint(job)
    trackers.check(job)
    settings = _as_begun(folder / CHECKPOINTS / _SETTINGS, preflight.chosen(job))
    return job.processes.train(job, folder, settings) if job.processes else fit(job, folder, settings)


def fit(job: Job, folder: Path, settings: preflight.Settings, team: "Team | None" = None) -> dict[str, Any]:
    """Train as the only process, or as one of a team, whose first one saves the adapter and returns the metrics.

    The others keep in ``folder`` what they need while they train. Raises EdgetuneError.
    """
    job.progress.advance(0, 1, "loading torch and the base model")
    try:
        import torch  # noqa: F401 - or the error would name what needs it
        import transformers
    except ImportError as error:
        raise missing_extra("train", error) from None
    transformers.utils.logging.set_verbosity_error()
    with team.joined(device()) if team else nullcontext():
        return _fit(job, folder, settings, team)


def _fit(job: Job, folder: Path, settings: preflight.Settings, team: "Team | None") -> dict[str, Any]:
    import torch
    import transformers

    leads = team is None or team.rank == 0
    _set_threads(team)
    if leads:
        trackers.prepare(job)
    arguments = training_arguments(job, folder / CHECKPOINTS, settings, leads=leads)
    if team:
        job.progress.say(f"{team.size} processes, {team.here} of them on this machine, share the rows of a step")
    transformers.set_seed(arguments.seed)  # LoRA's own initialisation draws from it
    wanted = Quantisation.wanted(fine_tuning(job), settings.dtype)
    base = load_base(job, settings.dtype, wanted)
    quantisation = wanted and wanted.of(base)
    model = _with_adapter(job, base, settings.dtype)
    release_memory()
    loss = CompletionLoss(model, smoothing=arguments.label_smoothing_factor, plain=arguments.torch_compile)
    if loss.parts is None:
        job.progress.say("logits are computed at all positions, which takes more time and memory")
    with argument_errors(job):
        trainer = make_trainer(job, model, arguments, loss, team)
        trainer.create_optimizer()
    if job.workflow.eval_data is None:
        job.progress.say("no evaluation data: `edgetune data --write-split 0.1` sets some rows aside")
    trainer.remove_callback(transformers.PrinterCallback)
    if leads:
        trackers.guard(job, trainer)
    checkpoint = _last_whole_checkpoint(job, folder / CHECKPOINTS) if leads else None
    if team:
        team.broadcast([weight for weight in model.parameters() if weight.requires_grad])
        checkpoint = team.broadcast_files(checkpoint, folder / CHECKPOINTS / f"of-process-{team.rank}")
    result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    metrics = _metrics(trainer, result.metrics) | {"torch_dtype": settings.dtype}
    if team:
        peak = team.all_reduce(torch.tensor(peak_memory_mb())).item()
        metrics |= {"processes": team.size, "peak_rss_mb": round(peak, 1)}
    if leads:
        _save(job, folder, trainer, quantisation, metrics)
    return metrics


def _save(
    job: Job, folder: Path, trainer: "Trainer", quantisation: Quantisation | None, metrics: dict[str, Any]
) -> None:
    """Write the adapter into ``folder``. Raises EdgetuneError when it holds values that are not numbers."""
    import torch

    model: Any = trainer.model
    trackers.finish(job)
    if metrics["best_step"]:
        job.progress.say(
            f"the adapter of step {metrics['best_step']} is the best: eval loss {metrics['eval_loss']:.4f}"
        )
    if not all(torch.isfinite(weight).all() for weight in model.parameters() if weight.requires_grad):
        # The checkpoints hold the same; without them, the next run starts over.
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        raise failure(
            "training diverged: the adapter holds values that are not numbers",
            where=job.workflow.where_in_tuning("training_args", "learning_rate"),
            hint="lower learning_rate (a tenth of it is a good try)",
        )
    # PEFT has put the local path there, which says nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = job.base_id
    model.save_pretrained(folder, save_embedding_layers=False)
    if quantisation:
        quantisation.write(folder)
    write_json(folder / "loss.json", trainer.state.log_history)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


STAGE = Stage("train", 2, inputs, build)


def _as_begun(path: Path, settings: preflight.Settings) -> preflight.Settings:
    """Return the settings with the dtype that an interrupted run began with: memory may be another one now."""
    begun = read_json(path)
    if begun is not None:
        return replace(settings, dtype=begun["dtype"])
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"dtype": settings.dtype})
    return settings


def check_target_modules(job: Job) -> None:
    """Raise EdgetuneError when a name in ``target_modules`` matches no linear layer, or not that of every layer."""
    modules = {
        name.removesuffix(".weight")
        for name, tensor in read_folder(job.base_folder).items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and "embed" not in name  # noqa: PLR2004 - a linear layer
    }
    where = job.workflow.where_in_tuning("target_modules")
    wanted = fine_tuning(job).target_modules or []
    refuse(problem for name in wanted if (problem := _mismatch(job, name, modules, where)))


def _mismatch(job: Job, name: str, modules: set[str], where: str) -> Problem | None:
    """Say what is wrong with a name: PEFT takes it for the end of a module's path."""
    matched = {module for module in modules if f".{module}".endswith(f".{name}")}
    leaf = name.rpartition(".")[2]
    alike = {module for module in modules if module.rpartition(".")[2] == leaf}
    if not matched:
        leaves = sorted({module.rpartition(".")[2] for module in modules})
        hint = f"its linear layers are: {', '.join(leaves)}"
        return Problem(f"target_modules: {name!r} matches no linear layer of {job.base_id}", where, hint)
    if matched != alike:
        message = f"target_modules: {name!r} matches {len(matched)} of the {len(alike)} layers {leaf!r}"
        return Problem(message, where, f"write {leaf!r} to train it in every layer")
    return None


def _set_threads(team: "Team | None") -> None:
    """Use all cores of this machine, and no more: torch does not see a container's quota, nor other processes."""
    import torch

    if team:
        torch.set_num_threads(max(min(machine.physical_cores(), machine.cores()) // team.here, 1))
    else:
        torch.set_num_threads(min(torch.get_num_threads(), machine.cores()))


def _with_adapter(job: Job, base: Any, dtype: str) -> Any:
    """Put fresh LoRA layers (float32) on the base model."""
    import torch
    from peft import LoraConfig, get_peft_model

    tuning = fine_tuning(job)
    base.config.use_cache = False
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.lora_dropout,
        # Stock Olive trains every layer it has put into 4 bits.
        target_modules=tuning.target_modules or ("all-linear" if isinstance(tuning, QLoRA) else None),
        use_dora=tuning.type == "DoRA",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        where = job.workflow.where_in_tuning("target_modules")
        raise failure(first_line(error), where=where, hint="name the layers in target_modules") from None
    if device() == "cpu":
        replace_dropout(model)
    trained, total = model.get_nb_trainable_parameters()
    precision = f"{tuning.quant_type} in {dtype}" if isinstance(tuning, QLoRA) else dtype
    modules = {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules}
    count = torch.get_num_threads()
    job.progress.say(
        f"{tuning.type} r {tuning.r} on {', '.join(sorted(modules))}: "
        f"{trained:,} of {total:,} parameters; {precision} on {device()}, {count} thread{'s' if count > 1 else ''}"
    )
    return model


def _last_whole_checkpoint(job: Job, folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; remove the others."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    unknown = Hashes(folder / "no-cache")
    for checkpoint in reversed(checkpoints):
        manifest = read_manifest(checkpoint)
        if manifest is not None and is_intact(checkpoint, manifest["outputs"], unknown):
            job.progress.say(f"continuing from step {manifest['key']} of an interrupted run")
            return checkpoint
        job.progress.say(f"skipping {checkpoint.name}: it was not written completely")
        shutil.rmtree(checkpoint)
    return None


def _metrics(trainer: "Trainer", result: dict[str, float]) -> dict[str, Any]:
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return {
        "steps": trainer.state.global_step,
        "best_step": best,
        "loss": result["train_loss"],
        "eval_loss": evaluations.get(best or max(evaluations, default=0)),
        "rows_per_second": result.get("train_samples_per_second"),
    }
