"""Run edgetune in processes that are forked with its imports done: a download takes a tenth of a second, not one."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess

_PRELOAD = ["pytest", "forked", "edgetune.cli", "edgetune.workflow", "huggingface_hub.hf_api"]


@contextmanager
def fork_server(environment: Mapping[str, str]) -> Iterator[ForkServerContext]:
    """Start the process that others are forked from; it is idle until a command is run.

    What the client reads when it is imported (timeouts, its home folder) must be in this environment.
    """
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        (warm_up := context.Process(target=int)).start()
        warm_up.join()
        yield context
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(
    context: ForkServerContext, root: Path, *arguments: str, environment: Mapping[str, str]
) -> CompletedProcess[str]:
    """Run ``edgetune`` in a folder, with both outputs captured (so neither is a terminal)."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_main, args=(root, arguments, dict(environment), outputs))
        process.start()
        process.join()
        texts = [path.read_text(encoding="utf-8") for path in outputs]
    return CompletedProcess(arguments, process.exitcode or 0, *texts)


def _main(root: Path, arguments: tuple[str, ...], environment: dict[str, str], outputs: list[Path]) -> None:
    from edgetune import cli

    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(cli.main(list(arguments)))
