"""The commands. One function each; the only place that prints results and errors and sets exit codes."""

import argparse
import codecs
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, Problem, failure
from edgetune.project import Project

if TYPE_CHECKING:
    from edgetune.schema import Workflow
    from edgetune.stages import Job

EXIT_INTERRUPTED = 130
_MOST_PROBLEMS = 50


def _start(arguments: argparse.Namespace, load: "Callable[[Project], Workflow] | None" = None) -> "Job":
    from edgetune import config
    from edgetune.progress import Progress
    from edgetune.stages import Job

    project = Project.find(arguments.project)
    return Job.start(project, (load or config.load)(project), Progress(project.events))


def _run_steps(arguments: argparse.Namespace, last: str, **options: Any) -> "Job":
    from edgetune import workflow

    job = _start(arguments)
    job.max_bad = getattr(arguments, "max_bad", None)
    workflow.run(job, last, **options)
    return job


def download(arguments: argparse.Namespace) -> None:
    """Bring the base model into model-cache/ and pin its bytes in setup/model.lock.json."""
    source = arguments.source and arguments.source.absolute()
    job = _run_steps(arguments, "download", source=source, update_lock=arguments.update_lock)
    print(job.project.name(job.base_folder))


def data(arguments: argparse.Namespace) -> None:
    """Check and tokenise the datasets, and show what is trained on."""
    from edgetune import dataset, preview

    try:
        if arguments.write_split:
            _write_split(arguments)
        job = _run_steps(arguments, "data")
        found = dataset.metrics(job)
    except EdgetuneError as error:
        if arguments.json:
            print(_json({"problems": [vars(problem) for problem in error.problems]}))
        raise
    samples = preview.samples(job, arguments.show)
    if arguments.json:
        print(_json(found | {"problems": [], "samples": samples}))
        return
    for warning in found["warnings"]:
        _tell(f"warning: {warning['where']}: {warning['message']}\nhint: {warning['hint']}")
    for line in preview.summary(job, found, bar="█" if _encoding() == "utf-8" else "#"):
        print(line)
    _show(samples)


def _show(samples: list[Any]) -> None:
    from edgetune import preview

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    write: Callable[[Any], None] = print
    if colour:
        from rich.console import Console

        write = partial(Console().print, soft_wrap=True)
    show = preview.coloured if colour else preview.bracketed
    if samples:
        print("\nsamples as they are trained on, in these marks:", end=" ")
        write(show(preview.LEGEND))
    for number, tokens in enumerate(samples, start=1):
        print(f"\n{number}. {len(tokens)} tokens, {sum(token['learned'] for token in tokens)} of them learned")
        write(show(tokens))


def _write_split(arguments: argparse.Namespace) -> None:
    from edgetune.split import write_split

    job = _start(arguments)
    job.max_bad = arguments.max_bad
    counts = write_split(job, arguments.write_split)
    total = sum(counts.values())
    for role, count in counts.items():
        _tell(f"{job.project.name(job.project.split_file(role))}: {count:,} rows, {count / total:.0%}")
    _tell(f"{job.project.name(job.project.config)} points there")


def train(arguments: argparse.Namespace) -> None:
    """Train the adapter (after whatever is missing before it)."""
    _print_result(_run_steps(arguments, "train"), "train")


def merge(arguments: argparse.Namespace) -> None:
    """Merge the adapter into the base model (after whatever is missing before it)."""
    _print_result(_run_steps(arguments, "merge"), "merge")


def export(arguments: argparse.Namespace) -> None:
    """Export the merged model to ONNX (after whatever is missing before it)."""
    _print_result(_run_steps(arguments, "export"), "export")


def finetune(arguments: argparse.Namespace) -> None:
    """Download, check, train, merge and export; each step only if its inputs changed."""
    if arguments.engine == "native":
        _print_result(_run_steps(arguments, "export"), "export")
        return
    from edgetune import config, olive

    job = _start(arguments, config.load_for_olive)
    print(job.project.name(olive.run(job)))


def infer(arguments: argparse.Namespace) -> None:
    """Ask the exported model: texts, or a JSONL file of rows."""
    from edgetune import infer as asking
    from edgetune import workflow as steps
    from edgetune.prompt import Encoder

    if bool(arguments.text) == bool(arguments.prompts):
        raise failure(
            "nothing to ask" if not arguments.text else "texts and --prompts exclude each other",
            hint='edgetune infer "some text", or edgetune infer --prompts inferences/prompts.jsonl',
        )
    if arguments.output and arguments.output.is_dir():
        raise failure(f"{arguments.output} is a folder", hint="--output takes the name of a file")
    job = _start(arguments)
    project, workflow = job.project, job.workflow
    if arguments.prompts:
        rows = asking.rows_from_file(workflow, arguments.prompts)
    else:
        rows = asking.rows_from_texts(workflow, arguments.text)
    backend = asking.open_backend(project)
    encoder = Encoder(workflow.contract, project.stage_folder("export"))
    if stale := steps.stale(job):
        _tell(f"warning: the exported model is older than the project ({stale}); `edgetune finetune` renews it")
    stream = _write if sys.stdout.isatty() and arguments.text and not arguments.json else None
    started, records = time.monotonic(), []
    for row, answer in asking.answers(encoder, backend, rows, max_new_tokens=arguments.max_new_tokens, on_text=stream):
        records.append(asking.as_record(row, answer))
        if arguments.json:
            print(_json(records[-1], indent=None), flush=True)
        elif arguments.prompts:
            print(workflow.contract.shown(row), "→", answer.text, flush=True)
        else:
            print("" if stream else answer.text, flush=True)
    said = asking.summary(records, time.monotonic() - started)
    output = arguments.output or (project.outputs("onnx") if arguments.prompts else None)
    if output:
        asking.write_records(output, records)
        said += f"; written to {project.name(output.absolute())}"
    _tell(said)


def status(arguments: argparse.Namespace) -> None:
    """Tell which steps are up to date, and why not."""
    from edgetune import workflow

    states = workflow.status(_start(arguments))
    if arguments.json:
        print(_json([vars(state) for state in states]))
        return
    for state in states:
        print(f"{state.step:<9} {state.state:<12} {state.folder:<32} {state.detail}".rstrip())


def _print_result(job: "Job", stage: str) -> None:
    print(job.project.name(job.project.stage_folder(stage)))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="edgetune", description="Fine-tune a small language model and ship it as int4 ONNX."
    )
    parser.add_argument("--version", action="version", version=f"edgetune {version('edgetune')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        text = run.__doc__ or ""
        added = commands.add_parser(run.__name__, help=text.rstrip("."), description=text)
        added.set_defaults(run=run)
        added.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="the project (default: here)")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    get = command(download)
    get.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="copy the base model from a folder")
    get.add_argument("--update-lock", action="store_true", help="accept other bytes than the locked ones")
    check = command(data)
    check.add_argument(
        "--show", type=_count, default=1, metavar="N", help="print N samples token by token (default: 1)"
    )
    check.add_argument(
        "--write-split", type=_share, metavar="SHARE", help="set a share of all rows aside for evaluation, such as 0.1"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    tune = command(finetune)
    for step in (check, tune, *map(command, (train, merge, export))):
        step.add_argument("--max-bad", type=_count, metavar="N", help="leave out up to N rows that are bad")
    tune.add_argument(
        "--engine",
        choices=("native", "olive"),
        default="native",
        help="who runs the workflow file (default: native)",
    )
    ask = command(infer)
    ask.add_argument("text", nargs="*", help="fills the prompt column")
    ask.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="rows with the prompt columns")
    ask.add_argument("--output", type=Path, metavar="FILE.jsonl", help="where answers are written")
    ask.add_argument("--max-new-tokens", type=_positive, metavar="N", help="limit of an answer's length")
    ask.add_argument("--backend", choices=("onnx",), default="onnx", help="the model that answers (default: onnx)")
    ask.add_argument("--json", action="store_true", help="print JSON lines")
    command(status).add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, such as 0.1 for a tenth")
    return value


def _json(content: Any, indent: int | None = 2) -> str:
    """Write JSON that stays JSON on an output of another encoding than UTF-8."""
    return json.dumps(content, indent=indent, ensure_ascii=_encoding() != "utf-8")


def _encoding() -> str:
    return codecs.lookup(sys.stdout.encoding or "ascii").name


def _report(problems: tuple[Problem, ...]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        _tell(f"error: {problem.where + ': ' if problem.where else ''}{problem.message}")
        if problem.hint:
            _tell(f"hint: {problem.hint}")
    if len(problems) > _MOST_PROBLEMS:
        _tell(f"error: … and {len(problems) - _MOST_PROBLEMS} more like these")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 fixable, 2 usage, 3 gate failed, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console of another encoding is no reason to stop
    try:
        arguments.run(arguments)
    except EdgetuneError as error:
        if arguments.debug:
            raise
        _report(error.problems)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 1
    except OSError as error:  # a full disk, missing rights: the operating system's own words are the best
        if arguments.debug or not error.strerror:
            raise
        _report((Problem(error.strerror, str(error.filename or ""), "mend that and run the same command again"),))
        return 1
    except KeyboardInterrupt:
        _tell("interrupted; run the same command again to continue")
        return EXIT_INTERRUPTED
    return 0
