"""The options of the commands, and what they take."""

import argparse
import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

TORCHRUN_OPTIONS = {
    "--nnodes": ("N", "how many machines train"),
    "--node-rank": ("N", "which of them this is, from 0"),
    "--rdzv-backend": ("NAME", "how they find one another, such as c10d"),
    "--rdzv-endpoint": ("HOST:PORT", "where they find one another"),
    "--rdzv-id": ("ID", "what this training is called among others there"),
    "--rdzv-conf": ("KEY=VALUE", "more about that, separated by commas"),
}
"""What torchrun has to know to bring machines together: the value, and what it means."""

Command = Callable[[argparse.Namespace], None]

_BACKENDS = ("base", "adapter", "merged", "onnx")  # as in backends.py, which --help has no time to import


def parser(commands: Iterable[Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line: each command is called what its function is."""
    whole = argparse.ArgumentParser(
        prog="edgetune", description="Fine-tune a small language model and ship it as int4 ONNX."
    )
    whole.add_argument("--version", action="version", version=f"edgetune {version('edgetune')}")
    added = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for run in commands:
        text = run.__doc__ or ""
        command = added.add_parser(run.__name__, help=text.rstrip("."), description=text)
        command.set_defaults(run=run, refuse=command.error)
        command.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="the project (default: here)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if run.__name__ in _OPTIONS:
            _OPTIONS[run.__name__](command)
    return whole


def _of_download(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="copy the base model from a folder")
    command.add_argument("--update-lock", action="store_true", help="accept other bytes than the locked ones")


def _of_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--show", type=_count, default=1, metavar="N", help="print N samples token by token (default: 1)"
    )
    command.add_argument(
        "--write-split", type=_share, metavar="SHARE", help="set a share of all rows aside for evaluation, such as 0.1"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _of_steps(command)


def _of_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-bad", type=_count, metavar="N", help="leave out up to N rows that are bad")


def _of_train(command: argparse.ArgumentParser) -> None:
    _of_steps(command)
    command.add_argument(
        "--nproc", type=_positive, default=1, metavar="N", help="train with N processes on this machine (default: 1)"
    )
    machines = command.add_argument_group(
        "training on more than one machine", "Handed on to torchrun; the same command is run on each machine."
    )
    for name, (metavar, meaning) in TORCHRUN_OPTIONS.items():
        machines.add_argument(name, metavar=metavar, help=meaning)


def _of_finetune(command: argparse.ArgumentParser) -> None:
    _of_train(command)
    command.add_argument(
        "--smoke", action="store_true", help="try all steps with two optimiser steps, and tell what a full run takes"
    )
    _of_engine(command, "who runs the workflow file (default: native)")
    _of_job(command)


def _of_job(command: argparse.ArgumentParser) -> None:
    job = command.add_argument_group("in a job of Azure ML", "fine-tuning/azureml-job.yml gives these.")
    job.add_argument(
        "--mount",
        nargs=2,
        action="append",
        default=[],
        metavar=("INPUT", "NAME"),
        help="link an input to a name in the project, such as datasets/train.jsonl",
    )
    job.add_argument(
        "--base-model", type=Path, metavar="FOLDER", help="take the base model from a folder, an MLflow model's too"
    )
    job.add_argument(
        "--hub-token", default="", metavar="VAULT/SECRET", help="take the token of the Hub from an Azure key vault"
    )
    job.add_argument("--copy-results", type=Path, metavar="FOLDER", help="copy gen-model/ to a folder in the end")


def _of_submit(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check, and print what would be sent")
    what.add_argument("--attach", metavar="JOB", help="follow a job that was sent before, and get its results")


def _of_engine(command: argparse.ArgumentParser, text: str = "whose models (default: native)") -> None:
    command.add_argument("--engine", choices=("native", "olive"), default="native", help=text)


def _of_export(command: argparse.ArgumentParser) -> None:
    _of_steps(command)
    ladder = command.add_argument_group(
        "the smallest int4 model that holds", "Its settings are written into the workflow file."
    )
    ladder.add_argument("--auto", action="store_true", help="try more and more careful ways until one holds")
    ladder.add_argument(
        "--max-drop",
        type=_drop,
        metavar="P",
        help="it may cost P points of accuracy (default: 2), or P per cent of perplexity (default: 5); "
        "more if that is noise",
    )
    ladder.add_argument(
        "--max-ms-per-token", type=_milliseconds, metavar="T", help="a token of an answer may take T ms here"
    )
    ladder.add_argument("--json", action="store_true", help="print what was found as JSON")


def _of_verify(command: argparse.ArgumentParser) -> None:
    _of_engine(command)
    command.add_argument("--rows", type=_positive, metavar="N", help="examine up to N rows (default: 256)")
    command.add_argument(
        "--max-drop",
        type=_drop,
        metavar="X",
        help="let int4 cost up to X points of accuracy (default: 2), or X per cent of perplexity (default: 5); "
        "more if that is noise",
    )
    command.add_argument("--json", action="store_true", help="print what was found as JSON")


def _of_infer(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", nargs="*", help="fills the prompt column; - is the standard input")
    command.add_argument(
        "--set", action="append", default=[], metavar="COLUMN=VALUE", help="fill a column of the prompt"
    )
    command.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="rows with the prompt columns; - is the standard input"
    )
    command.add_argument("--chat", action="store_true", help="ask line by line")
    command.add_argument("--backend", choices=_BACKENDS, default="onnx", help="the model that answers (default: onnx)")
    command.add_argument("--adapter", metavar="NAME", help="with this adapter beside the onnx model (default: its own)")
    _of_engine(command)
    command.add_argument("--output", type=Path, metavar="FILE.jsonl", help="where answers are written")
    command.add_argument("--json", action="store_true", help="print JSON lines")
    how = command.add_argument_group(
        "how the next token is chosen", "The most likely one, unless one of the first three is given."
    )
    how.add_argument("--temperature", type=_temperature, metavar="T", help="below 1 more, above 1 less predictable")
    how.add_argument("--top-p", type=_top_p, metavar="P", help="among the likeliest tokens that make up this share")
    how.add_argument("--top-k", type=_positive, metavar="K", help="among the K likeliest tokens")
    how.add_argument(
        "--repetition-penalty", type=_penalty, default=1.0, metavar="X", help="above 1 against repetitions"
    )
    how.add_argument("--seed", type=_seed, metavar="N", help="the same answer every time")
    how.add_argument("--max-new-tokens", type=_positive, metavar="N", help="limit of an answer's length")


def _of_adapters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--add", type=Path, metavar="PROJECT", help="take the adapter that another project trained")
    command.add_argument("--name", metavar="NAME", help="what it is called here (default: the other project's folder)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _of_evaluate(command: argparse.ArgumentParser) -> None:
    _of_engine(command)
    command.add_argument("--limit", type=_positive, metavar="N", help="ask N rows only, always the same ones")
    command.add_argument("--json", action="store_true", help="print JSON")


def _of_package(command: argparse.ArgumentParser) -> None:
    command.add_argument("--zip", action="store_true", help="write it as one .zip file too")


def _of_status(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _of_migrate(command: argparse.ArgumentParser) -> None:
    command.add_argument("old", type=Path, metavar="OLD.json", help="the workflow file in the style of 2024")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="NEW.json",
        help="where the new one is written (default: OLD-migrated.json beside the old one)",
    )


_OPTIONS = {
    "download": _of_download,
    "data": _of_data,
    "finetune": _of_finetune,
    "train": _of_train,
    "merge": _of_steps,
    "export": _of_export,
    "verify": _of_verify,
    "infer": _of_infer,
    "adapters": _of_adapters,
    "evaluate": _of_evaluate,
    "package": _of_package,
    "status": _of_status,
    "doctor": _of_status,
    "migrate": _of_migrate,
    "submit": _of_submit,
}


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _drop(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "a number of 0 or more")


def _milliseconds(text: str) -> float:
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.1 for a tenth")


def _temperature(text: str) -> float:
    words = "a temperature from 0.001 to 100; for the likeliest token, leave it out"
    return _number(text, lambda value: 0.001 <= value <= 100, words)  # noqa: PLR2004 - beyond, probabilities vanish


def _top_p(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a share above 0, and 1 at most")


def _penalty(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 100, "a number above 0, and 100 at most; 1 is none")  # noqa: PLR2004


def _seed(text: str) -> int:
    words = "a whole number from 0 to 2147483647"
    return int(_number(text, lambda value: text.isdigit() and value < 2**31, words))


def _number(text: str, fits: Callable[[float], bool], words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value
