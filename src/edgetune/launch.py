"""How many processes a command trains in: what its options ask for, or what a launcher has started already.

One process; several on this machine, which one starts for the training alone; several machines, where every process
runs the command and the first one leads.
"""

import argparse
import os
import signal
from typing import TYPE_CHECKING

from edgetune import options
from edgetune.errors import missing_extra

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgetune.distributed import Launched
    from edgetune.stages import Job
    from edgetune.torchrun import Torchrun


def check(arguments: argparse.Namespace) -> None:
    """Refuse options, or a launcher, that would not count; forget a launcher that has started one process."""
    from edgetune import distributed

    smoke, olive = vars(arguments).get("smoke"), vars(arguments).get("engine") == "olive"
    if smoke and olive:
        arguments.refuse("--smoke tries the native engine: leave out --engine")
    launched = distributed.started()
    machines = [option.partition("=")[0] for option in _for_torchrun(arguments)]
    given = [*(["--nproc"] if arguments.nproc > 1 else []), *machines]
    if olive and (launched or given):
        without = ", ".join(given) or "the launcher"
        arguments.refuse(f"--engine olive is one process: leave out {without}")
    if smoke and (launched or machines):
        arguments.refuse("--smoke is for one machine, where --nproc says how many processes train")
    if launched and given:
        arguments.refuse(
            f"a launcher says how many processes train here: leave out {', '.join(given)} "
            "(Azure ML: process_count_per_instance)"
        )
    if os.environ.get("WORLD_SIZE") == "1":
        distributed.forget_launcher()


def start(
    arguments: argparse.Namespace, lead: "Callable[[Torchrun | Launched | None], None]", join: "Callable[[], Job]"
) -> None:
    """Run a command in as many processes as were asked for, or as a launcher has started.

    ``lead`` runs its steps, with what it trains in; ``join`` returns the job of a process that only trains with the
    others. With options for several machines this process becomes a torchrun, which runs the command again.
    """
    from edgetune import distributed

    if distributed.started():
        _with_others(lead, join)
        return
    if _for_torchrun(arguments):
        _become_torchrun(arguments)
    lead(on_this_machine(arguments))


def on_this_machine(arguments: argparse.Namespace) -> "Torchrun | None":
    """Return what starts the processes that ``--nproc`` asks for; None when it is one."""
    from edgetune.torchrun import Torchrun

    return Torchrun(arguments.nproc) if arguments.nproc > 1 else None


def _with_others(lead: "Callable[[Launched], None]", join: "Callable[[], Job]") -> None:
    from edgetune import worker
    from edgetune.distributed import Launched, Team

    try:
        team = Team.connect()
    except ImportError as error:
        raise missing_extra("train", error) from None
    if team.rank:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            signal.signal(wanted, signal.SIG_DFL)  # the first process is the one that says so
        with team.leaving():
            worker.take_part(join(), team)
        return
    try:
        lead(Launched(team))
    finally:
        team.dismiss()


def _become_torchrun(arguments: argparse.Namespace) -> None:
    from edgetune import torchrun

    command = [arguments.run.__name__, f"--project={arguments.project.absolute()}"]
    if arguments.max_bad is not None:
        command.append(f"--max-bad={arguments.max_bad}")
    if results := vars(arguments).get("copy_results"):
        command.append(f"--copy-results={results.absolute()}")
    if arguments.debug:
        command.append("--debug")
    torchrun.on_machines(_for_torchrun(arguments), arguments.nproc, command)


def _for_torchrun(arguments: argparse.Namespace) -> list[str]:
    """Return the options for torchrun that were given."""
    given = {name: getattr(arguments, name[2:].replace("-", "_")) for name in options.TORCHRUN_OPTIONS}
    return [f"{name}={value}" for name, value in given.items() if value is not None]
