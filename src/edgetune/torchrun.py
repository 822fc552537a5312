"""Start the processes of a training with torchrun, and tell what the first of them tells."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

from edgetune import machine
from edgetune.errors import EdgetuneError, failure, missing_extra
from edgetune.preflight import Settings
from edgetune.stages import Job
from edgetune.train import CHECKPOINTS

_TORCHRUN = ("-m", "torch.distributed.run")


@dataclass(frozen=True)
class Torchrun:
    """Training is done by ``here`` processes on this machine; all else by this one, which waits for them."""

    here: int

    def train(self, job: Job, folder: Path, settings: Settings) -> dict[str, Any]:
        """Train in processes of their own; return the metrics. Raises what the first of them raises.

        Raises EdgetuneError when one of them dies. None of them outlives this process.
        """
        _check_torch()
        task, log = folder / CHECKPOINTS / "task.pickle", job.project.log("train")
        fields = {name: value for name, value in vars(job).items() if name not in ("progress", "processes")}
        task.write_bytes(pickle.dumps((fields, folder, settings)))
        workers = ("--standalone", f"--nproc-per-node={self.here}", "-m", "edgetune.worker", str(task))
        threads = max(machine.physical_cores() // self.here, 1)
        with (
            log.open("ab") as file,
            subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
                [sys.executable, *_TORCHRUN, *workers],
                stdin=subprocess.PIPE,  # it ends with this process: that is how they know
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            ) as process,
        ):
            try:
                outcome = _relay(process.stdout, job)
            except BaseException:
                process.terminate()
                process.wait()  # the context manager does not wait after Ctrl-C
                raise
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            raise _died(job, log)
        return outcome


def on_machines(options: Sequence[str], count: int, command: Sequence[str]) -> NoReturn:
    """Become a torchrun with these options, whose processes run this edgetune command. Raises EdgetuneError."""
    _check_torch()
    whole = [sys.executable, *_TORCHRUN, *options, f"--nproc-per-node={count}", "-m", "edgetune", *command]
    os.execv(sys.executable, whole)  # noqa: S606 - our own interpreter, no shell


def _check_torch() -> None:
    if find_spec("torch") is None:
        raise missing_extra("train", ImportError(name="torch"))


def _relay(stream: IO[bytes] | None, job: Job) -> dict[str, Any] | Exception | None:
    """Repeat what the processes report; return the metrics, or the first error, or None when there was neither."""
    assert stream is not None  # noqa: S101 - it is a pipe
    outcome = None
    while True:
        try:
            kind, *content = pickle.load(stream)  # noqa: S301 - from processes of our own
        except (EOFError, pickle.UnpicklingError):  # or cut off by its end
            return outcome
        if kind in ("say", "advance"):
            arguments, fields = content
            getattr(job.progress, kind)(*arguments, **fields)
        else:
            outcome = outcome or content[0]


def _died(job: Job, log: Path) -> EdgetuneError:
    """Say with which code a process died, which torchrun writes at its end: those it ended itself come later."""
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", log.read_text(encoding="utf-8", errors="replace"))
    code = next((code for code in codes if code.startswith("-")), codes[-1] if codes else "unknown")
    return failure(
        f"a process of the training died with code {code}",
        where=job.project.name(log),
        hint="the same command continues from the last checkpoint; code -9 mostly means that memory ran out",
    )
