"""Run edgetune in processes that are forked with its imports done: a tenth of a second, not half of one."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess

_PRELOAD = ["pytest", "forked", "edgetune.cli", "edgetune.workflow", "huggingface_hub.hf_api"]


@cache
def _server() -> ForkServerContext:
    """Start the process that others are forked from; it is idle until a command is run.

    The Hub's client reads these settings when it is imported: it waits a second, and finds nobody logged in.
    """
    before = dict(os.environ)
    home = tempfile.mkdtemp(prefix="hf-home-")
    os.environ.update(HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_OFFLINE="0", HF_HOME=home)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        (warm_up := context.Process(target=int)).start()
        warm_up.join()
        return context
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(root: Path, *arguments: str, environment: Mapping[str, str]) -> CompletedProcess[str]:
    """Run ``edgetune`` in a folder, with both outputs captured (so neither is a terminal) and nothing to read."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _server().Process(target=_main, args=(root, arguments, dict(environment), outputs))
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
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.exit(cli.main(list(arguments)))
