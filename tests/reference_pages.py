"""docs/cli.md and docs/configuration.md, made from the code; `python tests/reference_pages.py` writes them anew.

What is read is what the program itself goes by: its argument parser, the models of the workflow file, and transformers'
arguments. What a key does is written by hand, in the last column of the page's own tables, and kept.
"""

import argparse
import ast
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetune import cli
from edgetune.schema import Workflow
from edgetune.training_schema import PASSED_ON_ARGUMENTS

ROOT = Path(__file__).parent.parent
CLI = ROOT / "docs/cli.md"
CONFIGURATION = ROOT / "docs/configuration.md"
SCHEMA = Workflow.model_json_schema()
MODELS: dict[str, Any] = {**SCHEMA["$defs"], SCHEMA["title"]: SCHEMA}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    choices: dict[str, argparse.ArgumentParser] = next(
        action.choices
        for action in cli.parser()._actions  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    return choices


def make_targets(makefile: Path) -> dict[str, str]:
    """Return the recipe of each target of a Makefile: its first line, without the command and what variables add."""
    text = makefile.read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^([a-z][a-z-]*):.*(?:\n\t(?:\$\(EDGETUNE\) )?(.*?)(?:\$\(if .*)?$)?", text))


def command_tables() -> str:
    """Return a section for each command: what it does, its make target, its arguments."""
    parsers = commands()
    targets = {recipe: name for name, recipe in make_targets(ROOT / "template/Makefile.jinja").items()}
    in_all = set.intersection(*({_spelling(action) for action in _arguments(one)} for one in parsers.values()))
    parts = []
    for name, parser in parsers.items():
        made = {recipe: target for recipe, target in targets.items() if recipe.partition(" ")[0] == name}
        named = "; ".join(f"`make {target}` is `edgetune {recipe}`" for recipe, target in made.items())
        parts += [f"### `edgetune {name}`", parser.description or ""] + ([f"In a project, {named}."] if named else [])
        lines = [_row(action) for action in _arguments(parser) if _spelling(action) not in in_all]
        if lines:
            parts.append("\n".join(["| argument | meaning |", "|---|---|", *lines]))
    common = [_row(action) for action in _arguments(next(iter(parsers.values()))) if _spelling(action) in in_all]
    parts += ["### All commands", "\n".join(["| argument | meaning |", "|---|---|", *common])]
    return "\n\n".join(parts)


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]  # noqa: SLF001


def _spelling(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"{action.metavar or action.dest.upper()}{' …' if action.nargs == '*' else ''}"
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def _row(action: argparse.Action) -> str:
    several = "; may be given several times" if isinstance(action, argparse._AppendAction) else ""  # noqa: SLF001
    return f"| `{_in_cell(_spelling(action))}` | {_in_cell(action.help or '')}{several} |"


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|")


def key_table(model: str, without: str | None, explained: dict[str, str]) -> str:
    """Return the keys of a model of the workflow file, those of another model left out."""
    properties = MODELS[model]["properties"]
    known = MODELS[without]["properties"] if without else {}
    lines = ["| key | value | default | what it does |", "|---|---|---|---|"]
    for key in sorted(properties, key=lambda key: key != "type"):  # the order of the code otherwise
        if properties[key] != known.get(key):
            schema, words = properties[key], explained.get(key, "")
            if model == "TrainingArguments" and key in PASSED_ON_ARGUMENTS:
                # A default of edgetune's own is told in words.
                schema = transformers_arguments()[key] | ({"default": None} if "Absent:" in words else {})
            default = _default(schema, required=key in MODELS[model].get("required", ()))
            lines.append(f"| `{key}` | {_in_words(schema)} | {default} | {words} |")
    return "\n".join(lines)


@cache
def transformers_arguments() -> dict[str, dict[str, Any]]:
    """Return type and default of each of transformers' TrainingArguments, in the words of a JSON schema.

    Read from its source: to import it takes seconds.
    """
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    classes = {part.name: part for part in ast.parse(source).body if isinstance(part, ast.ClassDef)}
    found = {}
    for part in classes["TrainingArguments"].body:
        match part:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.Call(keywords=given)):
                default = next((word.value for word in given if word.arg == "default"), None)
                kinds = [kind.partition("[")[0] for kind in ast.unparse(annotation).split(" | ")]
                found[name] = {
                    "anyOf": [{"type": _KINDS[kind]} for kind in kinds if kind in _KINDS],
                    "default": default.value if isinstance(default, ast.Constant) else None,
                }
    return found


_KINDS = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object"}


def _default(schema: Any, *, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "not set" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def _in_words(schema: Any) -> str:
    """Say what a key takes."""
    words = ""
    match schema:
        case {"const": value}:
            words = f"`{json.dumps(value)}`"
        case {"enum": values}:
            words = ", ".join(f"`{json.dumps(value)}`" for value in values)
        case {"anyOf": kinds}:
            words = " or ".join(_in_words(kind) for kind in kinds if kind != {"type": "null"})
        case {"type": "array", "items": items}:
            one = _in_words(items)
            several = {"a block": "blocks", "text": "texts"}.get(one, one)
            words = f"a list of one: {one}" if schema.get("maxItems") == 1 else f"a list of {several}"
        case {"type": "integer" | "number" as kind}:
            words = ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
        case {"type": "string" | "boolean" as kind}:
            words = {"string": "text", "boolean": "`true`, `false`"}[kind]
        case {"$ref": _} | {"type": "object"}:
            words = "a block"
    return words


def _bounds(schema: Any) -> str:
    words = {
        "minimum": "{} or more",
        "exclusiveMinimum": "above {}",
        "maximum": "{} or less",
        "exclusiveMaximum": "below {}",
    }
    found = [text.format(schema[bound]) for bound, text in words.items() if bound in schema]
    return ": " + ", ".join(found) if found else ""


def cli_page() -> str:
    """Return docs/cli.md with its generated part as it ought to be."""
    marks = "<!-- commands -->", "<!-- end of commands -->"
    before, _, rest = CLI.read_text(encoding="utf-8").partition(marks[0])
    return f"{before}{marks[0]}\n\n{command_tables()}\n\n{marks[1]}{rest.partition(marks[1])[2]}"


TABLE = re.compile(r"(?s)(<!-- keys of (\w+)(?: without (\w+))? -->\n).*?(\n<!-- end of keys -->)")


def configuration_page() -> str:
    """Return docs/configuration.md with its tables as they ought to be."""

    def renewed(found: re.Match[str]) -> str:
        explained = dict(re.findall(r"(?m)^\| `(\w+)` \|.*\| (.*) \|$", found[0]))
        return found[1] + key_table(found[2], found[3], explained) + found[4]

    return TABLE.sub(renewed, CONFIGURATION.read_text(encoding="utf-8"))


if __name__ == "__main__":
    CLI.write_text(cli_page(), encoding="utf-8")
    CONFIGURATION.write_text(configuration_page(), encoding="utf-8")
