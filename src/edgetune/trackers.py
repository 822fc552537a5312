"""Experiment trackers, named in ``report_to``: those that keep files keep them in ``gen-model/logs/<tracker>/``.

transformers has the integrations. Left alone, they write into the folder of checkpoints, which is removed, or
wherever the command was started. What the user has set in the environment always counts.
"""

import netrc
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgetune.errors import EdgetuneError, Problem, failure, first_line, refuse
from edgetune.stages import Job

_RUN_DIGITS = 8


def chosen(job: Job) -> list[str]:
    """Return the trackers that the training arguments name."""
    tuning = job.workflow.tuning
    given = tuning.training_args.report_to if tuning else "none"
    return [name for name in ([given] if isinstance(given, str) else given) if name != "none"]


def check(job: Job) -> None:
    """Raise EdgetuneError when a tracker is not installed."""
    where = job.workflow.where_in_tuning("training_args", "report_to")
    refuse(
        Problem(
            f"report_to: the package {name} is not installed",
            where,
            f"run `pip install {name}` in this environment; a line in setup/requirements.txt keeps it there",
        )
        for name in chosen(job)
        if find_spec(name) is None
    )


def run_name(job: Job) -> str:
    """Name a training: one that continues keeps its name, and another configuration has another."""
    return f"{job.project.root.name}-{job.keys['train'][:_RUN_DIGITS]}"


def prepare(job: Job) -> None:
    """Point the chosen trackers at the project's folder of logs, and say where they write."""
    for name in chosen(job):
        wanted = _environment(job, name)
        for variable, value in wanted.items():
            os.environ.setdefault(variable, value)
        folder = job.project.tracker_folder(name)
        kept_here = bool(wanted) and all(os.environ[variable] == value for variable, value in wanted.items())
        if kept_here:
            folder.mkdir(parents=True, exist_ok=True)
        there = job.project.name(folder) if kept_here else "where the environment says"
        job.progress.say(f"reports to {name}: {there}")


def guard(job: Job, trainer: Any) -> None:
    """Keep trackers from ending a training: one that cannot begin does so before the first step, as an error.

    One that is lost later is told, and left out for the rest.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    for name in chosen(job):
        [kind] = get_reporting_integration_callbacks(name)
        guarded = _Guarded(job, name)
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is kind:
                for event in (attribute for attribute in dir(callback) if attribute.startswith("on_")):
                    setattr(callback, event, guarded.event(event, getattr(callback, event)))


class _Guarded:
    """A tracker that may fail."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name, self.is_lost = job, name, False

    def event(self, event: str, report: Callable[..., None]) -> Callable[..., None]:
        """Return what reports an event of the training as long as that goes well."""

        def guarded(*arguments: Any, **options: Any) -> None:
            if self.is_lost:
                return
            try:
                report(*arguments, **options)
            except Exception as error:
                self.is_lost = True
                if event == "on_train_begin":
                    raise self._refusal(error) from error
                self.job.progress.say(
                    f"warning: {self.name} gets no more of this training, which goes on: {first_line(error)}"
                )

        return guarded

    def _refusal(self, error: Exception) -> EdgetuneError:
        return failure(
            f"report_to: {self.name} cannot be reported to: {first_line(error)}",
            where=self.job.workflow.where_in_tuning("training_args", "report_to"),
            hint=f"see that it can be reached where the environment says, or take {self.name} out of report_to",
        )


def finish(job: Job) -> None:
    """Close what transformers leaves open: W&B would end its run, and print, when the program is long past this."""
    if "wandb" in chosen(job):
        import wandb

        wandb.finish()


def _environment(job: Job, name: str) -> dict[str, str]:
    folder, project = job.project.tracker_folder(name), job.project.root.name
    match name:
        case "tensorboard":
            return {"TENSORBOARD_LOGGING_DIR": str(folder / run_name(job))}
        case "mlflow" if "MLFLOW_TRACKING_URI" not in os.environ:
            return {
                "MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').as_posix()}",
                "MLFLOW_EXPERIMENT_NAME": project,
            }
        case "wandb":
            offline = {} if _has_wandb_key(os.environ) else {"WANDB_MODE": "offline"}  # it would ask for a key
            return {"WANDB_DIR": str(folder.parent), "WANDB_PROJECT": project, **offline}
        case "trackio":
            return {"TRACKIO_DIR": str(folder)}
    return {}


def _has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Tell whether W&B can be reached without a question: by a key in the environment, or by ``wandb login``."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    names = [environment["NETRC"]] if environment.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
