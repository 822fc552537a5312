"""The documentation: generated pages are up to date, quoted errors exist, commands parse, links lead somewhere."""

import argparse
import ast
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import reference_pages
from conftest import Sandbox

ROOT = reference_pages.ROOT
QUESTIONS = yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("examples/**/*.md"),
]


def test_the_command_reference_is_what_the_parser_says() -> None:
    """docs/cli.md shows every command and argument with its help (`make docs` writes it)."""
    page = reference_pages.CLI.read_text(encoding="utf-8")

    assert page == reference_pages.cli_page()
    assert not re.findall(r"(?m)^\| `(.*)` \|  \|$", page), "arguments without help"


def test_the_configuration_reference_is_what_the_schema_says() -> None:
    """docs/configuration.md has every key of the workflow file (`make docs`), each explained in its last column."""
    page = reference_pages.CONFIGURATION.read_text(encoding="utf-8")

    assert page == reference_pages.configuration_page()
    assert {found[2] for found in reference_pages.TABLE.finditer(page)} == reference_pages.MODELS.keys()
    assert not re.findall(r"(?m)^\| `(\w+)` \|.*\|  \|$", page), "keys without an explanation"


def test_the_design_names_every_module() -> None:
    """docs/design.md has a table in which a newcomer finds each module, or the folder it lies in."""
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## Where is what")[2].partition("\n## ")[0]
    package = ROOT / "src/edgetune"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}

    assert {*re.findall(r"\[`([\w/.]+)`\]", table)} == modules | folders


def test_quoted_errors_are_in_the_source() -> None:
    """Every heading of docs/troubleshooting.md that quotes an error quotes what the code, the template or make says."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"(?m)^### `(.*)`$", page)
    known = messages()

    assert len(quotes) >= 25
    assert [quote for quote in quotes if not any(quote in message for message in known)] == []


def messages() -> set[str]:
    """Return every text of the code, the template's questions and its Makefile, with … for what is filled in."""
    files = [ROOT / "copier.yml", ROOT / "template/Makefile.jinja"]
    found = {re.sub(r"\{\{.*?\}\}|\$\(.*?\)", "…", path.read_text(encoding="utf-8")) for path in files}
    for path in (ROOT / "src/edgetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                found.update(wordings(node))
    return found


def wordings(node: ast.expr) -> set[str]:
    """Return what a text of the code may say: both ways where a condition decides, … for other values."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.JoinedStr(values=parts):
            return {"".join(words) for words in itertools.product(*map(wordings, parts))}
        case ast.FormattedValue(value=ast.IfExp(body=ast.Constant() as one, orelse=ast.Constant() as other)):
            return wordings(one) | wordings(other)
    return {"…"}


def named(page: Path) -> str:
    """Return a page's path as test ids show it."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_can_be_typed(page: Path) -> None:
    """Every command of edgetune, make and copier that a page shows has arguments that its program knows."""
    wrong = [f"{' '.join(words)}: {fault}" for words in commands(page) if (fault := FAULTS[words[0]](words[1:]))]

    assert wrong == []


def test_the_check_of_commands_finds_what_is_wrong() -> None:
    """A misspelt command, option, choice, target, variable, question or answer is a fault."""
    assert ["make", "finetune"] in commands(ROOT / "README.md")
    assert not edgetune_fault(["infer", "a text", "--backend", "merged"])
    assert edgetune_fault(["infre"])
    assert edgetune_fault(["infer", "--bakend", "merged"])
    assert edgetune_fault(["infer", "--backend", "fused"])
    assert not make_fault(["test", "TORCH_INDEX=x"])
    assert make_fault(["fine-tune"])
    assert make_fault(["test", "INDEX=x"])
    assert not copier_fault(["update", "--data", "method=qlora"])
    assert copier_fault(["update", "--data", "method=lore"])
    assert copier_fault(["update", "--data", "methods=qlora"])
    assert copier_fault(["copy", "--dat", "method=qlora"])
    assert copier_fault(["updat"])


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the commands in the code of a page that are edgetune's, make's or copier's, word by word."""
    text = page.read_text(encoding="utf-8").replace(r"\|", "|")
    lines = re.findall(r"`([^`\n]+)`", prose(text))
    for block in re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```$", text):
        typed = re.findall(r"(?m)^\$ (.*)", block)  # in a transcript, the rest is output
        lines += typed or block.splitlines()
    for line in lines:
        if not re.search(r"(^|&& |\| )(uvx |pipx run |\S*/)?(edgetune|make|copier)( |$)", line):
            continue
        plain = re.sub(r"<[^>]*>", "PLACE", re.sub(r", [^\"]*$", "", line))
        lexer = shlex.shlex(plain, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for operator, words in itertools.groupby(lexer, lambda word: word in ("&&", "|", ">")):
            command = [word for word in words if word not in ("…", "uvx", "pipx", "run")]
            program = Path(command[0]).name if command else ""
            if not operator and program in FAULTS:
                yield [program, *command[1:]]


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def edgetune_fault(words: list[str]) -> str:
    """Return what the parser says against the words; whether a value is of the right type is not looked at."""
    if words[:1] in ([], ["COMMAND"], ["--help"], ["--version"]):
        return ""
    parser = lenient_parsers().get(words[0])
    if parser is None:
        return "no such command"
    try:
        unknown = parser.parse_known_args([word for word in words[1:] if word != "--help"])[1]
    except argparse.ArgumentError as error:
        return str(error)
    return f"unknown: {unknown}" if unknown else ""


@cache
def lenient_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the commands' parsers, which also take N for a number, and miss nothing that a sentence leaves out."""
    parsers = reference_pages.commands()
    for parser in parsers.values():
        parser.exit_on_error = False
        for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
            action.type = None
            if not action.option_strings:
                action.nargs = "*"
    return parsers


def make_fault(words: list[str]) -> str:
    """Return which word is neither a target nor a variable of one of the two Makefiles."""
    makefiles = [ROOT / "Makefile", ROOT / "template/Makefile.jinja"]
    targets = {target for makefile in makefiles for target in reference_pages.make_targets(makefile)}
    variables = {name for makefile in makefiles for name in re.findall(r"(?m)^(\w+) \?=", makefile.read_text("utf-8"))}
    return next((word for word in words if word not in targets and word.partition("=")[0] not in variables), "")


def copier_fault(words: list[str]) -> str:
    """Return which option copier does not know, or which answer the template does not take."""
    if words[:1] in ([], ["--version"]):
        return ""
    if words[0] not in ("copy", "update"):
        return "no such command"
    for option, value in itertools.zip_longest(words, words[1:], fillvalue=""):
        if option.startswith("-") and not re.search(rf"(?m)^\s+.*{option}\b", copier_help(words[0])):
            return f"unknown: {option}"
        name, _, answer = value.partition("=")
        if option == "--data" and name not in QUESTIONS:
            return f"no question: {name}"
        choices = QUESTIONS.get(name, {}).get("choices") if option == "--data" else None
        if isinstance(choices, dict) and answer not in ("…", *(str(choice) for choice in choices.values())):
            return f"no answer: {value}"
    return ""


@cache
def copier_help(command: str) -> str:
    """Return what a command of copier says of its options."""
    asked = [sys.executable, "-m", "copier", command, "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


FAULTS = {"edgetune": edgetune_fault, "make": make_fault, "copier": copier_fault}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file that is there, and to a heading that is in it."""
    broken = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", [*ROOT.glob("template/**/*.md.jinja")], ids=named)
def test_links_of_the_template_lead_somewhere(page: Path) -> None:
    """Every link of the template's pages that holds for all answers leads to a file of the template."""
    files = [page.parent / link.partition("#")[0] for link in links(page) if "{" not in link]

    assert [file for file in files if not file.exists() and not file.with_name(f"{file.name}.jinja").exists()] == []


def links(page: Path) -> list[str]:
    """Return the relative links of a page."""
    text = re.sub(r"`[^`\n]*`", "", prose(page.read_text(encoding="utf-8")))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that a code host gives to the headings of a page."""
    found = set[str]()
    for heading in re.findall(r"(?m)^#+ (.*)$", prose(page.read_text(encoding="utf-8"))):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(n for n in itertools.count() if (f"{words}-{n}" if n else words) not in found)
        found.add(f"{words}-{number}" if number else words)
    return found


@pytest.mark.slow
def test_the_tutorial_shows_what_is_printed(fresh: Sandbox, project: Sandbox) -> None:
    """Numbers of rows and tokens, answers, states and errors in docs/tutorial.md are those that the commands print."""
    checked, broken = shown("make data")
    _, idle, misspelt = shown("make finetune")
    assert missing(checked, fresh.run("data")) == []
    assert missing(idle, project.run("finetune")) == []
    assert missing(shown("make infer")[0][:4], project.run("infer", "--prompts", "inferences/prompts.jsonl")) == []

    project.edit(lambda config: config["passes"]["builder"].update(int4_block_size=32))
    states = [" ".join(line.split()[:4]) for line in project.run("status").stdout.splitlines()]
    assert states == [" ".join(line.split()[:4]) for line in shown("make status")[0]]

    fresh.config.write_text(fresh.config.read_text(encoding="utf-8").replace('"alpha"', '"alhpa"'), encoding="utf-8")
    assert missing(misspelt, fresh.run("finetune")) == []

    train, evaluation = (project.root / f"datasets/{name}.jsonl" for name in ("train", "eval"))
    rows = train.read_text(encoding="utf-8").splitlines()
    rows[4] = rows[4].replace('"tone"', '"tune"')
    rows.append(evaluation.read_text(encoding="utf-8").splitlines()[2])
    train.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert missing(broken, project.run("data")) == []


def shown(command: str) -> list[list[str]]:
    """Return what the tutorial shows below each of its calls of a command, without make's own lines and gaps."""
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    outputs = re.findall(rf"(?ms)^\$ {command}\n(.*?)(?=^```|^\$ |^$)", page)
    return [
        [line for line in output.splitlines() if "…" not in line and not line.startswith(".venv")] for output in outputs
    ]


def missing(lines: list[str], result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return which lines a command has not printed; there has to be one at least."""
    return [line for line in lines if line not in result.stdout + result.stderr] if lines else ["nothing is shown"]
