"""Stock Olive in a process of its own, and whether it failed: Olive itself exits 0."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, Problem, failure, missing_extra
from edgetune.hub import load_dotenv
from edgetune.stages import Job, read_json

OF_OLIVE = {"footprint.json", "model_config.json", "output_footprint.json", "run_history.txt"}
"""What Olive writes about its run beside the model."""

_PASS = re.compile(r"Running pass .*")
_BAR = re.compile(r"^(?P<text>.*?):?\s*\d+%\|.*?\| *(?P<done>\d+)/(?P<total>\d+) \[")
_IGNORED = re.compile(r"Keys (?P<keys>\{.*\}) are not part of (?P<owner>\w+)\. Ignoring them")
_ERROR = re.compile(r"\[ERROR\]|^\w*(Error|Exception)\b.*: ")
_PRUNED = re.compile(r":validate_config\] |is pruned due to")
"""Why a pass does not take its settings, which is no error to Olive."""
_LOGGED = re.compile(r"^\[.*?\] \[[A-Z]+\] \[.*?\] ")
_MOST_ERRORS = 5


def is_installed() -> bool:
    """Tell whether Olive is there; it is not imported."""
    return find_spec("olive") is not None


def check_installed() -> None:
    """Raise EdgetuneError without Olive."""
    if not is_installed():
        raise missing_extra("olive", ImportError(name="olive-ai"))


def run_olive(job: Job, config: Path, output: Path, where: str = "") -> dict[str, Any]:
    """Run a workflow file; return what Olive says about the model it put into ``output``, as the file tells it to.

    Relative paths in it count from the folder of the project's own. What Olive prints goes to the stage's log. Raises
    EdgetuneError with Olive's error lines when no model came out, whatever its exit code; if ``where`` says where its
    keys stand, also when it ignores one of them.
    """
    check_installed()
    command = [sys.executable, "-m", "olive", "run", "--config", str(config)]
    lines: list[str] = []
    shown: tuple[str, ...] = ()
    with subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
        command,
        cwd=job.project.config_folder,
        env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"} | _hub_access(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                sys.stdout.write(line)  # which is the stage's log
                lines.append(line.rstrip())
                if (bar := _BAR.search(line)) is None:
                    _show(job, line, where)
                elif bar.groups() != shown:  # written again whenever something is printed beside it
                    shown = bar.groups()
                    job.progress.advance(int(bar["done"]), int(bar["total"]), bar["text"].strip())
        except BaseException:
            process.terminate()
            process.wait()  # after Ctrl-C, Popen's own waiting is short
            raise
    made = read_json(output / "model_config.json")
    if process.returncode != 0 or made is None:
        raise _failed(job, lines, process.returncode)
    return made


def _show(job: Job, line: str, where: str) -> None:
    """Tell which pass begins. Raises EdgetuneError for keys that are ignored, if ``where`` is given."""
    if found := _PASS.search(line):
        job.progress.say(found[0])
    elif found := _IGNORED.search(line):
        said = f"Olive ignores {found['keys']}: {found['owner']} has no such keys"
        if where:
            raise failure(said, where=where, hint="correct or remove them; --engine olive runs without them")
        job.progress.say(f"warning: {said}")


def _hub_access(job: Job) -> dict[str, str]:
    """Let Olive ask the Hub only where data come from it: the base model is here."""
    if any(data.load_dataset_config.is_hub for data in job.workflow.data_configs):
        load_dotenv(job.project.dotenv)
        return {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return {"HF_HUB_OFFLINE": "1"}


def _failed(job: Job, lines: list[str], code: int) -> EdgetuneError:
    found = [*_errors(lines, _ERROR)] or [*_errors(lines, _PRUNED)] or lines[-1:] or ["nothing"]
    errors = list(dict.fromkeys(found))[-_MOST_ERRORS:]
    where = job.project.name(job.project.log(job.progress.stage))
    *others, last = errors
    message = f"stock Olive produced no model (its exit code was {code}); it said: {last}"
    return EdgetuneError(
        [
            *(Problem(f"Olive said: {line}", where) for line in others),
            Problem(message, where, "the log has all it printed"),
        ]
    )


def _errors(lines: list[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Yield the lines that match, each with those that belong to it."""
    for number, line in enumerate(lines):
        if pattern.search(line):
            more = takewhile(lambda text: text.startswith("  - "), lines[number + 1 :])
            yield " ".join([_LOGGED.sub("", line), *map(str.strip, more)])
