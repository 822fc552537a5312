"""Run functions in processes of their own: their memory is their own, and given back when they end."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from edgetune.errors import EdgetuneError, failure

_HINT = "usually memory ran out (code -9): close other programs, and run the same command again"


def in_process(function: Callable[..., Any], *arguments: Any, imports: Sequence[str] = ()) -> Any:
    """Return what ``function`` returns in a new process, or raise what it raises there.

    On Linux, ``imports`` are there already: the process is forked from one that has imported them once (the first
    call decides which). Raises EdgetuneError when the process dies. The process never outlives the call.
    """
    context: Any = multiprocessing.get_context("spawn")
    if imports and sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(imports))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    try:
        with _without_interrupts():  # they are for this process, which ends the other one
            if imports and sys.platform == "linux":
                forkserver.ensure_running()
            else:
                process.start()
        if process.pid is None:
            process.start()
        sender.close()
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise failure(f"a process of this run died with code {process.exitcode}", hint=_HINT) from None
    except BaseException:
        if process.pid is not None:
            process.terminate()
        raise
    finally:
        if process.pid is not None:
            process.join()
    if error is not None:
        raise error
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as tidily as on Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome: tuple[Any, Exception | None] = function(*arguments), None
    except (EdgetuneError, OSError) as error:
        outcome = None, error
    except KeyboardInterrupt:
        return  # the parent was interrupted, and is the one that says so
    with suppress(BrokenPipeError):
        sender.send(outcome)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """Leave when the parent is gone, killed perhaps: nobody would take the result, and the next run may start."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
