"""The ways to ask: texts of the command line, a pipe, a file of rows, a chat; answers are printed as they come."""

import argparse
import sys
from dataclasses import fields
from functools import partial

from edgetune import chat
from edgetune import infer as asking
from edgetune.console import as_json, encoding, line_reader, standard_input, tell, write
from edgetune.contract import Contract
from edgetune.errors import failure
from edgetune.generation import Sampling
from edgetune.infer import Record
from edgetune.row import Row
from edgetune.stages import Job


def check(arguments: argparse.Namespace) -> None:
    """End with a usage error when options exclude each other."""
    given = {
        "a text": arguments.text,
        "--prompts": arguments.prompts,
        "--set": arguments.set,
        "--output": arguments.output,
        "--json": arguments.json,
    }
    if arguments.adapter and arguments.backend != "onnx":
        arguments.refuse(f"--adapter is for --backend onnx, not {arguments.backend}")
    if arguments.adapter and arguments.engine == "olive":
        arguments.refuse("--adapter is for the model of the native engine: leave out --engine")
    if arguments.chat and (wrong := [name for name in given if given[name] and name != "--set"]):
        arguments.refuse(f"--chat asks for lines itself: leave out {', '.join(wrong)}")
    if arguments.prompts and (wrong := [name for name in ("a text", "--set") if given[name]]):
        arguments.refuse(f"--prompts brings whole rows: leave out {', '.join(wrong)}")
    if arguments.output and arguments.output.is_dir():
        raise failure(f"{arguments.output} is a folder", hint="--output takes the name of a file")


def run(job: Job, arguments: argparse.Namespace) -> None:
    """Ask, and print the answers. Raises EdgetuneError."""
    given = asking.given_columns(arguments.set)
    if arguments.chat:
        _chat(job, arguments, given)
        return
    rows = _questions(job.workflow.contract, arguments, given)
    _warn_of_old_results(job, arguments.backend)
    records = _ask(job, arguments, rows)
    said = asking.summary(records)
    asked = "-".join(filter(None, (arguments.backend, arguments.adapter)))
    output = arguments.output or (job.project.outputs(asked) if arguments.prompts else None)
    if output:
        asking.write_records(output, records)
        said += f"; written to {job.project.name(output.absolute())}"
    tell(said)


def _questions(contract: Contract, arguments: argparse.Namespace, given: dict[str, str]) -> list[Row]:
    """Read what is asked, from the command line, a file or the standard input."""
    if arguments.prompts:
        return asking.rows_from_file(contract, arguments.prompts, standard_input())
    texts = arguments.text
    if not texts and given.keys() >= set(contract.prompt_columns):
        return asking.rows_from_texts(contract, [None], given)
    if not texts and standard_input().isatty():
        arguments.refuse("nothing to ask: give a text, --prompts FILE.jsonl or --chat")
    if asking.STDIN in (texts or [asking.STDIN]):
        contract.question("", given)  # before a person types in vain
        piped = asking.text_from(standard_input())
        texts = [piped if text == asking.STDIN else text for text in texts or [asking.STDIN]]
    return asking.rows_from_texts(contract, texts, given)


def _ask(job: Job, arguments: argparse.Namespace, rows: list[Row]) -> list[Record]:
    """Answer and print. What libraries print meanwhile goes to the log, so this keeps to the real output."""
    screen = sys.stdout
    streamed = screen.isatty() and not arguments.prompts and not arguments.json
    held = screen.isatty() and job.progress.live and not streamed  # a progress bar and answers would mix
    line = partial(_answer_line, arguments, job.workflow.contract, encoding())
    records: list[Record] = []
    asker = asking.Asker.open(job, arguments.backend, arguments.adapter)
    with job.progress.running("infer", job.project.log("infer")):
        stream = partial(write, screen) if streamed else None
        for row, record in zip(rows, asking.answers(job, asker, rows, _sampling(arguments), stream), strict=True):
            records.append(record)
            if not held:
                print("" if streamed else line(row, record), file=screen, flush=True)
    for row, record in zip(rows, records, strict=True) if held else ():
        print(line(row, record))
    return records


def _answer_line(arguments: argparse.Namespace, contract: Contract, output: str, row: Row, record: Record) -> str:
    if arguments.json:
        return as_json(record, indent=None, output=output)
    return f"{contract.shown(row.values)} → {record['answer']}" if arguments.prompts else str(record["answer"])


def _chat(job: Job, arguments: argparse.Namespace, given: dict[str, str]) -> None:
    chat.check(job.workflow.contract, given)
    _warn_of_old_results(job, arguments.backend)
    asker = asking.Asker.open(job, arguments.backend, arguments.adapter)
    sampling = _sampling(arguments)
    chat.Chat(asker, sampling, given, write=partial(write, sys.stdout), tell=tell).run(line_reader())


def _sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})


def _warn_of_old_results(job: Job, backend: str) -> None:
    if not job.project.olive and (stale := asking.stale(job, backend)):
        tell(f"warning: the {backend} model is older than the project ({stale}); `edgetune finetune` renews it")
