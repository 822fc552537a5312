"""The commands. One function each; the only place that prints errors and sets exit codes."""

import argparse
import io
import os
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgetune import options
from edgetune.console import as_json, encoding, print_finding, show_samples, tell
from edgetune.errors import (
    EXIT_INTERRUPTED,
    EdgetuneError,
    GateError,
    Problem,
    TerminatedError,
    failure,
)
from edgetune.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgetune.distributed import Launched
    from edgetune.schema import Workflow
    from edgetune.stages import Job
    from edgetune.torchrun import Torchrun

_MOST_PROBLEMS = 50


def _start(arguments: argparse.Namespace, load: "Callable[[Project], Workflow] | None" = None) -> "Job":
    from edgetune import config
    from edgetune.stages import Job

    project = Project.find(arguments.project)
    if project.pending_split.exists():
        _finish_split(project)
    if load is None and getattr(arguments, "engine", "native") == "olive":
        project = replace(project, olive=True)
    job = Job.start(project, (load or config.load)(project))
    job.max_bad = getattr(arguments, "max_bad", None)
    return job


def _run_steps(
    arguments: argparse.Namespace, last: str, processes: "Torchrun | Launched | None" = None, **options: Any
) -> "Job":
    from edgetune import workflow

    job = _start(arguments)
    job.processes = processes
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
            print(as_json({"problems": [vars(problem) for problem in error.problems]}))
        raise
    samples = preview.samples(job, arguments.show)
    if arguments.json:
        print(as_json(found | {"problems": [], "samples": samples}))
        return
    for warning in found["warnings"]:
        tell(f"warning: {warning['where']}: {warning['message']}\nhint: {warning['hint']}")
    for line in preview.summary(job, found, bar="█" if encoding() == "utf-8" else "#"):
        print(line)
    show_samples(samples)


def _write_split(arguments: argparse.Namespace) -> None:
    from edgetune.split import write_split

    job = _start(arguments)
    counts = write_split(job, arguments.write_split)
    total = sum(counts.values())
    for role, count in counts.items():
        tell(f"{job.project.name(job.project.split_file(role))}: {count:,} rows, {count / total:.0%}")
    tell(f"{job.project.name(job.project.config)} points there")


def _finish_split(project: Project) -> None:
    from edgetune.split import finish

    if finish(project):
        files = ", ".join(project.name(project.split_file(role)) for role in ("train", "eval"))
        tell(f"the split that was interrupted is finished: {files} and {project.name(project.config)} are the new ones")


def train(arguments: argparse.Namespace) -> None:
    """Train the adapter (after whatever is missing before it)."""
    from edgetune import launch

    launch.check(arguments)
    _tune(arguments, "train")


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
        print(as_json({"rungs": found, "model": job.project.name(model)}))
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
    ladder.check(job)
    workflow.run(job, "merge" if job.workflow.merges else "train" if job.workflow.tuning else "data")
    found = ladder.climb(job, ladder.Wanted(arguments.max_drop, arguments.max_ms_per_token))
    rungs = [vars(one) for one in found]
    refusal = ladder.refusal(job, found)
    if not arguments.json:
        print("\n".join(ladder.table(found)), flush=True)
    elif refusal:
        print(as_json({"rungs": rungs, "model": None}))
    if refusal:
        raise refusal
    return rungs


def verify(arguments: argparse.Namespace) -> None:
    """Prove that the exported model is the one that was trained; publish it, or set it aside."""
    from edgetune import olive, workflow
    from edgetune.verify import Limits, read_verdict

    job, refusal = _start(arguments), None
    check = olive.check if job.project.olive else workflow.check
    try:
        check(job, Limits(arguments.rows, arguments.max_drop))
    except GateError as error:
        refusal = error
    if arguments.json:
        print(as_json(read_verdict(job)))
    elif not refusal:
        _print_result(job, "verify")
    if refusal:
        raise refusal


def finetune(arguments: argparse.Namespace) -> None:
    """Download, check, train, merge, export and verify; each step only if its inputs changed."""
    from edgetune import in_job, launch

    launch.check(arguments)
    mounts = [(source, name) for source, name in arguments.mount]
    given = in_job.JobOptions(
        mounts, arguments.base_model, arguments.hub_token, arguments.copy_results, arguments.engine == "olive"
    )
    with in_job.prepared(Project.find(arguments.project), given, tell):
        _finetune(arguments)


def _finetune(arguments: argparse.Namespace) -> None:
    if arguments.smoke:
        _smoke(arguments)
        return
    if arguments.engine == "native":
        _tune(arguments, "verify")
        return
    from edgetune import config, olive

    job = _start(arguments, config.load_for_olive)
    print(job.project.name(olive.run(job)))


def _tune(arguments: argparse.Namespace, last: str) -> None:
    from edgetune import launch

    launch.start(
        arguments,
        lead=lambda processes: _print_result(_run_steps(arguments, last, processes), last),
        join=lambda: _start(arguments),
    )


def _smoke(arguments: argparse.Namespace) -> None:
    from edgetune import launch, smoke

    job = _start(arguments)
    job.processes = launch.on_this_machine(arguments)
    print("\n".join(smoke.summary(smoke.run(job))))


def infer(arguments: argparse.Namespace) -> None:
    """Ask a model: texts, a JSONL file of rows, or in a chat."""
    from edgetune import ask

    ask.check(arguments)
    ask.run(_start(arguments), arguments)


def adapters(arguments: argparse.Namespace) -> None:
    """List the adapters beside the exported model, or take one from another project."""
    from edgetune import adapters as beside
    from edgetune import config
    from edgetune.backends import folder_of
    from edgetune.infer import stale
    from edgetune.stages import Job

    if arguments.name and not arguments.add:
        arguments.refuse("--name can only be given with --add")
    job = _start(arguments)
    model = folder_of(job, "onnx")
    if arguments.add:
        other = Project.find(arguments.add)
        if not arguments.add.is_dir() or other.root == job.project.root:
            raise failure("this is no other project", where=str(arguments.add), hint="name another project's folder")
        theirs = Job.start(other, config.load(other))
        path = beside.add(job, model, other.stage_folder("train"), arguments.name or other.root.name)
        tell(f"{job.project.name(path)}: ask it with `edgetune infer --adapter {path.stem}`")
        if theirs.workflow.contract != job.workflow.contract:
            tell("warning: it was trained on another template than this project has, which `edgetune infer` asks it in")
        if older := stale(theirs, "adapter"):
            tell(f"warning: it is older than its own project ({older}), where `edgetune finetune` renews it")
    found = beside.found(job, model)
    if arguments.json:
        print(as_json([vars(one) for one in found]))
        return
    for one in found:
        ranks = ", ".join(map(str, one.ranks))
        print(f"{one.name:<20} {one.bytes / 1e6:>8.2f} MB  rank {ranks:<4}  {one.file}  {one.fault}".rstrip())


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure base, adapter, merged and exported model on the evaluation data (after whatever is missing before)."""
    from edgetune import evaluate as measuring

    job = _start(arguments)
    measuring.check_data(job)
    refusal = _tuned(job)
    found = measuring.evaluate(job, arguments.limit)
    print(as_json(found) if arguments.json else "\n".join(measuring.table(found)))
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
    from edgetune import olive, workflow

    if job.project.olive:
        olive.open_job(job)
        return None
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
        tell(f"the same in one file: {job.project.name(job.project.archive)}")


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
            print_finding(finding)
    if arguments.json:
        print(as_json([vars(finding) for finding in found]))
    elif project is None:
        tell("no project here: only the machine was examined")
    if failed := [finding.name for finding in found if finding.state == "fail"]:
        raise failure(
            f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}",
            hint="the line below each says what to do",
        )


def status(arguments: argparse.Namespace) -> None:
    """Tell which steps are up to date, and why not."""
    from edgetune import workflow

    states = workflow.status(_start(arguments))
    if arguments.json:
        print(as_json([vars(state) for state in states]))
        return
    width = max(9, *(len(state.step) for state in states))
    for state in states:
        print(f"{state.step:<{width}} {state.state:<12} {state.folder:<32} {state.detail}".rstrip())


def migrate(arguments: argparse.Namespace) -> None:
    """Turn a workflow file in the style of 2024 into one of today, and tell every change with its reason."""
    from edgetune import migrate as migrating

    result = migrating.migrated(arguments.old)
    if result is None:
        tell(f"{arguments.old} is a workflow file of today already: there is nothing to migrate")
        return
    new = arguments.output or migrating.default_output(arguments.old)
    files = migrating.outputs(new, result)
    for note in result.notes:
        tell(f"{note.where}: {'to do: ' if note.kind == 'to do' else ''}{note.text}")
    by_olive = migrating.check_with_olive(result.text, arguments.old)
    migrating.write(files)
    for line in migrating.summary(new, result, by_olive=by_olive):
        tell(line)
    for path in files:
        print(path)


def submit(arguments: argparse.Namespace) -> None:
    """Fine-tune on Azure ML: send the project as a job, show its log, and bring gen-model/ back."""
    from edgetune import azureml, job_file

    project = Project.find(arguments.project)
    if arguments.dry_run:
        print("\n".join(azureml.dry_run(project)))
        return
    workspace = job_file.Workspace.find() if arguments.attach else job_file.check(project)
    client = azureml.Client.connect(workspace)
    name = arguments.attach or azureml.send(project, client, tell)
    azureml.follow(client, name, tell)
    azureml.fetch(project, client, name)
    print(project.name(project.results))


def _print_result(job: "Job", stage: str) -> None:
    print(job.project.name(job.project.stage_folder(stage)))


def _report(problems: tuple[Problem, ...]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        tell(f"error: {problem.where + ': ' if problem.where else ''}{problem.message}")
        if problem.hint:
            tell(f"hint: {problem.hint}")
    if len(problems) > _MOST_PROBLEMS:
        tell(f"error: … and {len(problems) - _MOST_PROBLEMS} more like these")


def _terminate(_signal: int, _frame: object) -> None:
    raise TerminatedError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    commands = (
        download,
        data,
        finetune,
        train,
        merge,
        export,
        verify,
        infer,
        adapters,
        evaluate,
        report,
        package,
        status,
        doctor,
        migrate,
        submit,
    )
    return options.parser(commands)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 fixable, 2 usage, 3 gate failed, 130 interrupted)."""
    arguments = parser().parse_args(argv)
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
        tell("interrupted; run the same command again to continue")
        return EXIT_INTERRUPTED
    return 0
