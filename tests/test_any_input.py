"""Whatever stands in the workflow file and the data files: no traceback, every problem with its place and a hint."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Sandbox
from edgetune import config, dataset
from edgetune.errors import EdgetuneError, Problem
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.stages import Job

MANY: Any = {
    "derandomize": True,  # the same cases everywhere
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
PLACE = re.compile(r"(fine-tuning/olive-config\.json|datasets/[^:]*)(:\d+( \(row \d+\))?)?")
COUNT = re.compile(r"[\d,]+ of [\d,]+ rows cannot be learned from")
ODD = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["", ".", "..", "/etc/passwd", "../../x", "{phrase}", "{}", "train[", "\0", "nul", "-1", "\ufeff", "json", "csv"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD, inner, max_size=3),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries({}, optional={"phrase": VALUES, "tone": VALUES, "other": VALUES})


@pytest.fixture(scope="module")
def place(rendered: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Render a project with few rows."""
    sandbox = Sandbox(shutil.copytree(rendered.root, tmp_path_factory.mktemp("any") / "my slm"))
    for name in ("train", "eval"):
        rows = sandbox.root / f"datasets/{name}.jsonl"
        rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    return sandbox


def checked(root: Path) -> None:
    """Read the workflow file and check every row, as each command does first; what is wrong must have its place."""
    project = Project.find(root)
    found: tuple[Problem, ...] = ()
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            dataset.check_rows(Job.start(project, config.load(project), Progress(project.events)))
        except EdgetuneError as error:
            found = error.problems
    assert not found or any(problem.hint for problem in found)
    for problem in found:
        assert PLACE.fullmatch(problem.where) or COUNT.fullmatch(problem.message), problem


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@pytest.mark.slow
@settings(max_examples=5000, **MANY)
@given(data=st.data())
def test_any_workflow_file(place: Sandbox, data: st.DataObject) -> None:
    """The rendered file with values deleted, renamed, exchanged and replaced, and now and then broken as JSON."""
    rendered = place.config.read_bytes()
    content = json.loads(rendered)
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        action = data.draw(st.sampled_from(["delete", "replace", "rename", "copy", "wrap"]))
        if action == "delete":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[data.draw(ODD)] = container.pop(key)
        elif action == "copy":
            other, place_of_it = found[data.draw(st.integers(0, len(found) - 1))]
            with contextlib.suppress(LookupError):
                container[key] = json.loads(json.dumps(other[place_of_it]))
        elif action == "wrap":
            container[key] = data.draw(st.sampled_from([[container[key]], {"value": container[key]}]))
        else:
            container[key] = data.draw(VALUES)
    text = json.dumps(content, indent=2, ensure_ascii=data.draw(st.booleans()))
    if data.draw(st.integers(0, 9)) == 0:
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(ODD) + text[at + data.draw(st.integers(0, 3)) :]
    place.config.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        checked(place.root)
    finally:
        place.config.write_bytes(rendered)


@pytest.mark.slow
@settings(max_examples=5000, **MANY)
@given(
    st.lists(ROWS.map(json.dumps) | VALUES.map(json.dumps) | ODD, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n", "", ","]),
    st.binary(max_size=4),
)
def test_any_data_file(place: Sandbox, rows: list[str], between: str, end: bytes) -> None:
    """Rows of any shape, lines that are none, and bytes that are no text."""
    file = place.root / "datasets/train.jsonl"
    before = file.read_bytes()
    file.write_bytes(between.join(rows).encode("utf-8") + between.encode() + end)
    try:
        checked(place.root)
    finally:
        file.write_bytes(before)
