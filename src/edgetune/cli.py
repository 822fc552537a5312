"""The commands. One function each; the only place that prints results and errors and sets exit codes."""

import argparse
import codecs
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from edgetune import options
from edgetune.errors import EdgetuneError, GateError, Problem, TerminatedError, failure
from edgetune.project import Project

if TYPE_CHECKING:
    from edgetune.contract import Contract
    from edgetune.generation import Sampling
    from edgetune.infer import Record
    from edgetune.row import Row
    from edgetune.schema import Workflow
    from edgetune.stages import Job
    from edgetune.surroundings import Finding

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

    colour = _is_coloured()
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


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


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
    from edgetune.verify import exported

    _check_ladder_options(arguments)
    found = _climb(arguments) if arguments.auto else None
    job = _run_steps(arguments, "export")
    model = exported(job, job.keys["export"]) or job.project.stage_folder("export")  # verify may have moved it on
    if arguments.json:
        print(_json({"rungs": found, "model": job.project.name(model)}))
    else:
        print(job.project.name(model))


def _check_ladder_options(arguments: argparse.Namespace) -> None:
    given = {
        "--max-drop": arguments.max_drop is not None,
        "--max-ms-per-token": arguments.max_ms_per_token is not None,
        "--json": arguments.json,
    }
    if not arguments.auto and (alone := [name for name in given if given[name]]):
        arguments.refuse(f"{', '.join(alone)} can only be given with --auto")


def _climb(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Find the settings of the export, print what was tried; raises GateError when nothing is good enough."""
    from edgetune import ladder, workflow

    job = _start(arguments)
    workflow.run(job, "merge" if job.workflow.tuning else "data")
    found = ladder.climb(job, ladder.Wanted(arguments.max_drop, arguments.max_ms_per_token))
    rungs = [vars(one) for one in found]
    refusal = ladder.refusal(job, found)
    if not arguments.json:
        print("\n".join(ladder.table(found)), flush=True)
    elif refusal:
        print(_json({"rungs": rungs, "model": None}))
    if refusal:
        raise refusal
    return rungs


def verify(arguments: argparse.Namespace) -> None:
    """Prove that the exported model is the one that was trained; publish it, or set it aside."""
    from edgetune import workflow
    from edgetune.verify import Limits, read_verdict

    job, refusal = _start(arguments), None
    try:
        workflow.check(job, Limits(arguments.rows, arguments.max_drop))
    except GateError as error:
        refusal = error
    if arguments.json:
        print(_json(read_verdict(job)))
    elif not refusal:
        _print_result(job, "verify")
    if refusal:
        raise refusal


def finetune(arguments: argparse.Namespace) -> None:
    """Download, check, train, merge, export and verify; each step only if its inputs changed."""
    if arguments.smoke:
        _smoke(arguments)
        return
    if arguments.engine == "native":
        _print_result(_run_steps(arguments, "verify"), "verify")
        return
    from edgetune import config, olive

    job = _start(arguments, config.load_for_olive)
    print(job.project.name(olive.run(job)))


def _smoke(arguments: argparse.Namespace) -> None:
    from edgetune import smoke

    if arguments.engine != "native":
        arguments.refuse("--smoke tries the native engine: leave out --engine")
    job = _start(arguments)
    job.max_bad = arguments.max_bad
    print("\n".join(smoke.summary(smoke.run(job))))


def infer(arguments: argparse.Namespace) -> None:
    """Ask a model: texts, a JSONL file of rows, or in a chat."""
    from edgetune import infer as asking

    _check_ways_to_ask(arguments)
    job = _start(arguments)
    given = asking.settings(arguments.set)
    if arguments.chat:
        _chat(job, arguments, given)
        return
    rows = _questions(job.workflow.contract, arguments, given)
    _warn_of_old_results(job, arguments.backend)
    records = _ask(job, arguments, rows)
    said = asking.summary(records)
    output = arguments.output or (job.project.outputs(arguments.backend) if arguments.prompts else None)
    if output:
        asking.write_records(output, records)
        said += f"; written to {job.project.name(output.absolute())}"
    _tell(said)


def _check_ways_to_ask(arguments: argparse.Namespace) -> None:
    """End with a usage error when options exclude each other."""
    given = {
        "a text": arguments.text,
        "--prompts": arguments.prompts,
        "--set": arguments.set,
        "--output": arguments.output,
        "--json": arguments.json,
    }
    if arguments.chat and (wrong := [name for name in given if given[name] and name != "--set"]):
        arguments.refuse(f"--chat asks for lines itself: leave out {', '.join(wrong)}")
    if arguments.prompts and (wrong := [name for name in ("a text", "--set") if given[name]]):
        arguments.refuse(f"--prompts brings whole rows: leave out {', '.join(wrong)}")
    if arguments.output and arguments.output.is_dir():
        raise failure(f"{arguments.output} is a folder", hint="--output takes the name of a file")


def _questions(contract: "Contract", arguments: argparse.Namespace, given: dict[str, str]) -> "list[Row]":
    """Read what is asked, from the command line, a file or the standard input."""
    from edgetune import infer as asking

    if arguments.prompts:
        return asking.rows_from_file(contract, arguments.prompts, _stdin())
    texts = arguments.text
    if not texts and given.keys() >= set(contract.prompt_columns):
        return asking.rows_from_texts(contract, [None], given)
    if not texts and _stdin().isatty():
        arguments.refuse("nothing to ask: give a text, --prompts FILE.jsonl or --chat")
    if asking.STDIN in (texts or [asking.STDIN]):
        contract.question("", given)  # before a person types in vain
        piped = asking.text_from(_stdin())
        texts = [piped if text == asking.STDIN else text for text in texts or [asking.STDIN]]
    return asking.rows_from_texts(contract, texts, given)


def _ask(job: "Job", arguments: argparse.Namespace, rows: "list[Row]") -> "list[Record]":
    """Answer and print. What libraries print meanwhile goes to the log, so this keeps to the real output."""
    from edgetune import infer as asking

    screen = sys.stdout
    streamed = screen.isatty() and not arguments.prompts and not arguments.json
    held = screen.isatty() and job.progress.live and not streamed  # a progress bar and answers would mix
    line = partial(_answer_line, arguments, job.workflow.contract, _encoding())
    records: list[Record] = []
    asker = asking.Asker.open(job, arguments.backend)
    with job.progress.running("infer", job.project.log("infer")):
        stream = partial(_write, screen) if streamed else None
        for row, record in zip(rows, asking.answers(job, asker, rows, _sampling(arguments), stream), strict=True):
            records.append(record)
            if not held:
                print("" if streamed else line(row, record), file=screen, flush=True)
    for row, record in zip(rows, records, strict=True) if held else ():
        print(line(row, record))
    return records


def _answer_line(
    arguments: argparse.Namespace, contract: "Contract", encoding: str, row: "Row", record: "Record"
) -> str:
    if arguments.json:
        return _json(record, indent=None, encoding=encoding)
    return f"{contract.shown(row.values)} → {record['answer']}" if arguments.prompts else str(record["answer"])


def _chat(job: "Job", arguments: argparse.Namespace, given: dict[str, str]) -> None:
    from edgetune import chat
    from edgetune import infer as asking

    chat.check(job.workflow.contract, given)
    _warn_of_old_results(job, arguments.backend)
    asker = asking.Asker.open(job, arguments.backend)
    sampling = _sampling(arguments)
    chat.Chat(asker, sampling, given, write=partial(_write, sys.stdout), tell=_tell).run(_line_reader())


def _stdin() -> BinaryIO:
    return sys.stdin.buffer if sys.stdin is not None else io.BytesIO()  # the standard input may be closed


def _line_reader() -> Callable[[], str]:
    """Return what reads a line: behind a prompt with history on a terminal, plainly from a pipe."""
    if _stdin().isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history
        return partial(input, "> ")
    lines = io.TextIOWrapper(_stdin(), encoding="utf-8", errors="surrogateescape")

    def read() -> str:
        if line := lines.readline():
            return line.rstrip("\r\n")
        raise EOFError

    return read


def _sampling(arguments: argparse.Namespace) -> "Sampling":
    from dataclasses import fields

    from edgetune.generation import Sampling

    return Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})


def _warn_of_old_results(job: "Job", backend: str) -> None:
    from edgetune import infer as asking

    if stale := asking.stale(job, backend):
        _tell(f"warning: the {backend} model is older than the project ({stale}); `edgetune finetune` renews it")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure base, adapter, merged and exported model on the evaluation data (after whatever is missing before)."""
    from edgetune import evaluate as measuring

    job = _start(arguments)
    measuring.check_data(job)
    refusal = _tuned(job)
    found = measuring.evaluate(job, arguments.limit)
    print(_json(found) if arguments.json else "\n".join(measuring.table(found)))
    if refusal:
        raise refusal


def report(arguments: argparse.Namespace) -> None:
    """Write the report (after whatever is missing for it): training, data, quality, checks, speed and versions."""
    from edgetune import evaluate as measuring
    from edgetune import report as reporting

    job = _start(arguments)
    refusal = _tuned(job)
    if job.workflow.eval_data:
        measuring.evaluate(job, measuring.last_limit(job))
    print(job.project.name(reporting.write(job)))
    if refusal:
        raise refusal


def _tuned(job: "Job") -> GateError | None:
    """Run what is missing; a model that verify sets aside is what one wants to look into, so go on with it.

    Raises EdgetuneError when there is an adapter that would be trained again: who measures does not ask for that.
    """
    from edgetune import workflow

    adapter = next((state for state in workflow.status(job) if state.step == "train"), None)
    if adapter and adapter.state == "stale":
        hint = "run `edgetune finetune` to train again, or take the changes back"
        raise failure(f"the adapter is older than the project ({adapter.detail})", where=adapter.folder, hint=hint)
    try:
        workflow.run(job, "verify")
    except GateError as error:
        return error
    return None


def package(arguments: argparse.Namespace) -> None:
    """Assemble what is deployed: the verified model, its card, licences and checksums."""
    from edgetune import package as packing

    job = _start(arguments)
    print(job.project.name(packing.build(job, zipped=arguments.zip)))
    if arguments.zip:
        _tell(f"the same in one file: {job.project.name(job.project.archive)}")


def doctor(arguments: argparse.Namespace) -> None:
    """Examine machine, packages, Hub and project: what would keep a run from working, and what to do about it."""
    from edgetune import doctor as examining

    try:
        project: Project | None = Project.find(arguments.project)
    except EdgetuneError:
        project = None
    found = []
    for finding in examining.findings(project):
        found.append(finding)
        if not arguments.json:
            _print_finding(finding)
    if arguments.json:
        print(_json([vars(finding) for finding in found]))
    elif project is None:
        _tell("no project here: only the machine was examined")
    if failed := [finding.name for finding in found if finding.state == "fail"]:
        raise failure(
            f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}",
            hint="the line below each says what to do",
        )


def _print_finding(finding: "Finding") -> None:
    said = f"{finding.name:<12}{finding.summary}" + (f"\n{'':<17}{finding.remedy}" if finding.remedy else "")
    if not _is_coloured():
        print(f"{finding.state:<5}{said}")
        return
    from rich.console import Console
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}[finding.state]
    Console().print(Text.assemble((f"{finding.state:<5}", colour), said), soft_wrap=True)


def status(arguments: argparse.Namespace) -> None:
    """Tell which steps are up to date, and why not."""
    from edgetune import workflow

    states = workflow.status(_start(arguments))
    if arguments.json:
        print(_json([vars(state) for state in states]))
        return
    for state in states:
        print(f"{state.step:<9} {state.state:<12} {state.folder:<32} {state.detail}".rstrip())


def migrate(arguments: argparse.Namespace) -> None:
    """Turn a workflow file in the style of 2024 into one of today, and tell every change with its reason."""
    from edgetune import migrate as migrating

    result = migrating.migrated(arguments.old)
    if result is None:
        _tell(f"{arguments.old} is a workflow file of today already: there is nothing to migrate")
        return
    new = arguments.output or migrating.default_output(arguments.old)
    files = migrating.outputs(new, result)
    for note in result.notes:
        _tell(f"{note.where}: {'to do: ' if note.kind == 'to do' else ''}{note.text}")
    by_olive = migrating.check_with_olive(result.text, arguments.old)
    migrating.write(files)
    for line in migrating.summary(new, result, by_olive=by_olive):
        _tell(line)
    for path in files:
        print(path)


def _print_result(job: "Job", stage: str) -> None:
    print(job.project.name(job.project.stage_folder(stage)))


def _write(screen: TextIO, text: str) -> None:
    screen.write(text)
    screen.flush()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _json(content: Any, indent: int | None = 2, encoding: str = "") -> str:
    """Write JSON that stays JSON on an output of another encoding than UTF-8."""
    return json.dumps(content, indent=indent, ensure_ascii=(encoding or _encoding()) != "utf-8")


def _encoding() -> str:
    return codecs.lookup(sys.stdout.encoding or "ascii").name


def _report(problems: tuple[Problem, ...]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        _tell(f"error: {problem.where + ': ' if problem.where else ''}{problem.message}")
        if problem.hint:
            _tell(f"hint: {problem.hint}")
    if len(problems) > _MOST_PROBLEMS:
        _tell(f"error: … and {len(problems) - _MOST_PROBLEMS} more like these")


def _terminate(_signal: int, _frame: object) -> None:
    raise TerminatedError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 fixable, 2 usage, 3 gate failed, 130 interrupted)."""
    commands = (
        download,
        data,
        finetune,
        train,
        merge,
        export,
        verify,
        infer,
        evaluate,
        report,
        package,
        status,
        doctor,
        migrate,
    )
    arguments = options.parser(commands).parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
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
