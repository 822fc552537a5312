"""The Trainer: batches as configured, each worked through in micro-batches, one mean over its learned tokens."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.batches import BUDGET, IGNORED, Collator, micro_batches
from edgetune.dataset import EVAL, TRAIN, Tokens
from edgetune.loading import device, fine_tuning
from edgetune.stages import MANIFEST, Job, list_outputs, write_json

if TYPE_CHECKING:
    from transformers import Trainer

    from edgetune.distributed import Team
    from edgetune.loss import CompletionLoss


def make_trainer(job: Job, model: Any, arguments: Any, loss: "CompletionLoss", team: "Team | None" = None) -> "Trainer":
    """Make transformers' Trainer with the loss on completions.

    On CUDA a micro-batch has no more rows than ``per_device_train_batch_size``; on a CPU its tokens count. With a
    team, this process works through its share of every batch.
    """
    import torch
    import transformers

    on_cuda = device() == "cuda"
    budget = None if on_cuda else BUDGET
    configured = fine_tuning(job).training_args.per_device_train_batch_size
    evaluated: list[torch.Tensor] = []
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    class MicroBatches(transformers.Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            """Add up the gradients of the micro-batches; return the loss."""
            if num_items_in_batch is None:
                num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum()
            rows = configured if on_cuda else len(inputs["labels"])
            total = torch.zeros((), device=model.device)
            with team.own_randomness() if team else nullcontext():
                for group in micro_batches(share(inputs), budget=budget, rows=rows):
                    total += super().training_step(model, group, num_items_in_batch)
            if team:
                total = team.all_reduce(total)
                if self.accelerator.sync_gradients:  # the last batch before a step of the optimiser
                    team.all_reduce_gradients(trained)
            return total

        def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
            """Return a micro-batch's part of the mean over the learned tokens of the step."""
            return loss.part(model, inputs, num_items_in_batch)

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            """Keep the loss of every learned token; return their mean."""
            groups = micro_batches(share(inputs), budget=budget, rows=len(inputs["labels"]))
            losses = torch.cat([torch.empty(0), *(loss.of_tokens(model, group).cpu() for group in groups)])
            evaluated.append(losses)
            return losses.mean().to(model.device), None, None

        def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
            """Evaluate; the loss is the mean over all learned tokens, where the Trainer's is one over batches."""
            evaluated.clear()
            output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
            losses = torch.cat(evaluated).double()
            total = torch.stack([losses.sum(), torch.tensor(float(len(losses))).double()])
            total = team.all_reduce(total) if team else total
            output.metrics[f"{metric_key_prefix}_loss"] = (total[0] / total[1]).item()
            return output

    def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return team.share(batch) if team else batch

    return MicroBatches(
        model=model,
        args=arguments,
        train_dataset=Tokens(job.project.stage_folder("data"), TRAIN),
        eval_dataset=Tokens(job.project.stage_folder("data"), EVAL) if job.workflow.eval_data else None,
        data_collator=Collator(job.base_folder),
        callbacks=[_report(job)],
    )


def _report(job: Job) -> Any:
    """Make the Trainer callback that reports progress and seals checkpoints."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        loss = ""

        def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            job.progress.say(
                f"{state.max_steps} steps of {batch} rows, learning rate {args.learning_rate:g} ({schedule})"
            )

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "eval_loss" in logs:
                job.progress.say(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}", **logs)
            elif "loss" in logs:
                self.loss = f"loss {float(logs['loss']):.4f}"

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            job.progress.advance(state.global_step, state.max_steps, self.loss)

        def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / MANIFEST, {"key": state.global_step, "outputs": list_outputs(checkpoint)})

    return Report()
