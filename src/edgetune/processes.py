"""Run a function in a process of its own: its memory is its own, and given back when it ends."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from edgetune.errors import EdgetuneError, failure


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
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        hint = "a negative code is a signal; -9 usually means that memory ran out: close other programs"
        raise failure(f"a process of this run died with code {process.exitcode}", hint=hint) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if error is not None:
        raise error
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as tidily as on Ctrl-C
    try:
        sender.send((function(*arguments), None))
    except EdgetuneError as error:
        sender.send((None, error))
    except KeyboardInterrupt:
        pass  # the parent is interrupted as well, and is the one that says so
