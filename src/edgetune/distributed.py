"""Several processes that train one adapter: each works through its share of the rows of every step.

Gradients are added up once a step, over gloo on CPUs and NCCL on GPUs, so every process makes the same step of the
optimiser. For transformers' Trainer each is a process of its own that sees all rows: the order of the rows, schedules
and checkpoints are those of one process.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.batches import share
from edgetune.errors import EdgetuneError, Problem, failure, first_line
from edgetune.preflight import Settings
from edgetune.stages import Job

if TYPE_CHECKING:
    import torch

_STARTING = timedelta(minutes=30)
"""How long the other processes are waited for: machines in a cluster do not start at the same time."""
_WORKING = timedelta(minutes=30)
"""How long the others may take to come to the same point of the training."""
_PREPARING = timedelta(hours=6)
"""How long another machine may take to get the base model, and the first process for what follows the training."""
_LOOK = 0.2  # seconds
_LEAVING = timedelta(seconds=20)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR")
_SEEDS = 2**31


class LostError(EdgetuneError):
    """Another process has died, or cannot be reached."""


def started(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a launcher (torchrun, a job in a cloud) has started this command as one of several processes."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys() and environment["WORLD_SIZE"] != "1"


def forget_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove a launcher's variables, or transformers would split batches and gather results as well."""
    for name in _VARIABLES:
        environment.pop(name, None)


class Team:
    """All processes, as one of them sees them."""

    def __init__(self, store: Any, rank: int, size: int, local_rank: int) -> None:
        self.store, self.rank, self.size, self.local_rank = store, rank, size, local_rank
        hosts = self._told("host", socket.gethostname(), _STARTING)
        self.here = hosts.count(hosts[rank])
        """How many of them are on this machine."""

    @classmethod
    def connect(cls, environment: MutableMapping[str, str] = os.environ) -> "Team":
        """Find the others as the launcher's variables say, and take the GPU of this process.

        The variables are removed. Raises EdgetuneError when not all processes are there in time.
        """
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=_STARTING))
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            team = cls(PrefixStore(f"edgetune/{attempt}", store), rank, size, int(environment.get("LOCAL_RANK", 0)))
        except (RuntimeError, ValueError) as error:
            hint = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment say how many there are, and where"
            raise failure(f"not all processes could be reached: {first_line(error)}", hint=hint) from error
        forget_launcher(environment)
        # Libraries take the first GPU that they see.
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(team.local_rank)] if visible is None else visible.split(",")[team.local_rank :][:1]
        environment["CUDA_VISIBLE_DEVICES"] = "".join(gpus)
        return team

    def begin(self, settings: Settings, key: str) -> None:
        """Call the other processes to the training; the first process does."""
        self.store.set("task", json.dumps([settings.dtype, settings.gradient_checkpointing, key]))
        self.passed("prepared")

    def wait(self) -> tuple[Settings, str] | None:
        """Wait until there is something to train; return how, and its key. None: there is nothing to do.

        Raises EdgetuneError when the first process is gone.
        """
        with _in_touch():
            while not self.store.check(["task"]):  # it may be busy with a download for hours
                if self.store.check(["ended"]):
                    return None
                time.sleep(_LOOK)
            task = json.loads(self.store.get("task"))
        return Settings(*task[:2]), task[2]

    def stay(self) -> None:
        """Wait for the end of the first process, one on each machine: its launcher may need the launcher of this one.

        Raises EdgetuneError when the first process is gone.
        """
        if self.local_rank == 0:
            with _in_touch():
                self._await(["ended"], _PREPARING)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Tell the first process that this one ends, and why when that is an error: it would wait for hours."""
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):
                if not self.store.check(["failed"]):
                    self.store.set("failed", f"process {self.rank} on {socket.gethostname()}: {first_line(error)}")
            raise
        finally:
            with suppress(RuntimeError):
                self.store.set(f"left/{self.rank}", "")

    def dismiss(self) -> None:
        """Let the other processes end."""
        with suppress(RuntimeError):  # they may have died
            self.store.set("ended", "")
            self.store.wait([f"left/{rank}" for rank in range(1, self.size)], _LEAVING)

    def passed(self, point: str) -> None:
        """Let the other processes of this machine pass :meth:`until_first`."""
        self.store.set(f"{point}/{self.rank}", "")

    def until_first(self, point: str) -> None:
        """Wait for the first process of this machine."""
        with _in_touch():
            self._await([f"{point}/{self.rank - self.local_rank}"], _PREPARING)

    def _told(self, what: str, value: str, limit: timedelta = _PREPARING) -> list[str]:
        """Tell the others something, return what every process told."""
        self.store.set(f"{what}/{self.rank}", value)
        self._await([f"{what}/{rank}" for rank in range(self.size)], limit)
        return [self.store.get(f"{what}/{rank}").decode() for rank in range(self.size)]

    def _await(self, keys: list[str], limit: timedelta) -> None:
        """Wait until the others have set all keys. Raises LostError when one of them has failed or the first is done.

        Raises RuntimeError when they cannot be reached, or take longer.
        """
        end, is_over = time.monotonic() + limit.total_seconds(), False
        while not self.store.check(keys):
            if is_over:
                raise RuntimeError("the others have ended, or take too long")
            if self.store.check(["failed"]):
                hint = "that process has said more; mend it, and run the same command again on every machine"
                raise LostError([Problem(self.store.get("failed").decode(), hint=hint)])
            time.sleep(_LOOK)
            is_over = self.store.check(["ended"]) or time.monotonic() > end

    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Have the collectives below ready in the block. Raises EdgetuneError when a process has no GPU of its own."""
        from torch import distributed

        with _in_touch():
            devices = self._told("device", device)
        if "cpu" in devices and "cuda" in devices:
            gpus = devices.count("cuda")
            message = f"{self.size} processes have {gpus} GPU{'s' if gpus > 1 else ''} together"
            raise failure(message, hint="start as many processes on each machine as it has GPUs")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        with _in_touch():
            distributed.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=_WORKING
            )
        yield
        distributed.destroy_process_group()  # not after an error: NCCL would wait for those that are gone

    def share(self, batch: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        """Return the rows of a batch that are for this process; there may be none."""
        return share(batch, self.rank, self.size)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw other random numbers than the other processes, whose rows are other ones; then the same ones again."""
        import torch

        seed = int(torch.randint(_SEEDS, ()))
        with torch.random.fork_rng():
            torch.manual_seed((seed + self.rank) % _SEEDS)
            yield

    def all_reduce(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum over all processes, the same bits in each."""
        from torch import distributed

        with _in_touch():
            distributed.all_reduce(values)
        return values

    def all_reduce_gradients(self, parameters: Sequence["torch.Tensor"]) -> None:
        """Give every parameter the sum of its gradients, in one message. Processes without rows have none."""
        import torch

        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
        total = self.all_reduce(torch.cat([part.flatten() for part in parts]))
        sizes = [part.numel() for part in parts]
        for weight, part in zip(parameters, torch.split(total, sizes), strict=True):
            weight.grad = part.view_as(weight)

    def broadcast(self, parameters: Sequence["torch.Tensor"]) -> None:
        """Give every parameter the value it has in the first process."""
        from torch import distributed

        with _in_touch():
            for weight in parameters:
                distributed.broadcast(weight.data, src=0)

    def broadcast_files(self, folder: Path | None, copy: Path) -> Path | None:
        """Return a folder with what the first process has in ``folder``: in the others ``copy``, which is made."""
        from torch import distributed

        message: list[dict[str, bytes] | None] = [None]
        if folder is not None:
            message = [{path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}]
        with _in_touch():
            distributed.broadcast_object_list(message, src=0)
        (files,) = message
        if self.rank == 0 or files is None:
            return folder
        shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed
        copy.mkdir(parents=True)
        for name, content in files.items():
            (copy / name).write_bytes(content)
        return copy


@dataclass(frozen=True)
class Launched:
    """The command is the first of the processes that a launcher has started: it calls the others to train."""

    team: Team

    @property
    def here(self) -> int:
        """Processes on this machine."""
        return self.team.here

    def train(self, job: Job, folder: Path, settings: Settings) -> dict[str, Any]:
        """Train with the others; return the metrics."""
        import torch

        from edgetune.train import fit

        self.team.begin(settings, job.keys["train"])
        threads = torch.get_num_threads()
        try:
            return fit(job, folder, settings, self.team)
        finally:
            torch.set_num_threads(threads)  # the other steps have the machine for themselves


@contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        message = "another process of the training died, or cannot be reached"
        hint = "the same command continues from the last checkpoint; with --debug it shows what the connection said"
        raise LostError([Problem(message, hint=hint)]) from error
