"""What the processes of a training do that are not the ones to run the other stages."""

import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgetune import train, workflow
from edgetune.distributed import LostError, Team
from edgetune.errors import EdgetuneError, failure
from edgetune.memory import release_memory
from edgetune.progress import Progress, Silent
from edgetune.stages import Job

_GRACE = 20  # seconds in which torchrun ends this process, and tells who died first


def take_part(job: Job, team: Team) -> None:
    """Train with the first process if it calls for that; on another machine, get base model and data ready before.

    Ends when the first process has done everything. Raises EdgetuneError when what there is to train on is not what
    the first process has.
    """
    task = team.wait()
    if task is None:
        return
    settings, key = task
    if team.local_rank:
        team.until_first("prepared")
    if workflow.training_key(job) != key and not team.local_rank:
        workflow.run(job, "data")
    if workflow.training_key(job) != key:
        raise failure(
            f"process {team.rank} would train something else than the first one",
            where=job.project.name(job.project.config),
            hint="every machine needs the same workflow file, datasets, base model and version of edgetune",
        )
    team.passed("prepared")
    job.keys["train"] = key
    job.progress = Silent(job.project.events)
    with tempfile.TemporaryDirectory() as folder:
        train.fit(job, Path(folder), settings, team)
    release_memory()
    team.stay()


class _Relay(Progress):
    """Hands what a stage reports to the process that waits for it."""

    def __init__(self, events: Path, channel: IO[bytes]) -> None:
        super().__init__(events)
        self.channel = channel

    def say(self, *arguments: Any, **fields: Any) -> None:
        _send(self.channel, "say", arguments, fields)

    def advance(self, *arguments: Any, **fields: Any) -> None:
        _send(self.channel, "advance", arguments, fields)


def _send(channel: IO[bytes], *message: Any) -> None:
    channel.write(pickle.dumps(message))
    channel.flush()


def main() -> int:
    """Train as one of the processes of :class:`edgetune.torchrun.Torchrun`; return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    send = partial(_send, channel)
    try:
        fields, folder, settings = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - written by the parent
        team = Team.connect()
        events = fields["project"].events
        job = Job(**fields, progress=Silent(events) if team.rank else _Relay(events, channel))
        metrics = train.fit(job, folder, settings, team)
    except LostError:
        traceback.print_exc()
        time.sleep(_GRACE)
        return 1
    except (EdgetuneError, OSError) as error:
        send("error", error)
        return 1
    if team.rank == 0:
        send("done", metrics)
    return 0


def _end_with_parent() -> None:
    """Leave when the command that started the training is gone: the next one may begin."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
