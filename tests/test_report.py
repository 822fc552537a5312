"""What a user sees of ``edgetune report`` and gets from ``edgetune package``."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import ENVIRONMENT, Sandbox
from edgetune import config
from edgetune import report as reporting
from edgetune.package import card, find_licence
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.report import Results
from edgetune.stages import Job

VOID = {"meta", "br", "link", "img", "input", "hr"}
NASTY = '<script>alert("1")</script> a|b\n# *c* `d` [e](http://example.com)'
LABELS = ["fear", "joy", "sadness", "surprise", "(other)"]


class Page(HTMLParser):
    """An HTML page: its elements with their attributes, its visible text, and whether all that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element without content."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect the text."""
        if self._open[-1:] != ["style"]:
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        """Return all values of these attributes."""
        return [value or "" for _, found in self.elements for name, value in found.items() if name in names]


def write(path: Path, content: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def model_key(project: Sandbox) -> str:
    """Return the key of the exported model."""
    manifest = json.loads((project.root / "gen-model/onnx/manifest.json").read_text(encoding="utf-8"))
    return str(manifest["key"])


def write_verdict(project: Sandbox, **changed: Any) -> None:
    """Write what ``verify`` would."""
    checks = [
        {"name": "adapter", "title": "The adapter learned", "passed": True, "summary": "loss 4.8 → 0.04", "cause": ""},
        {"name": "files", "title": "Nothing is missing", "passed": None, "summary": "does not apply", "cause": ""},
    ]
    verdict = {
        "key": "12" * 32,
        "export_key": model_key(project),
        "passed": True,
        "model": "gen-model/onnx",
        "limits": {"rows": 256, "max_drop": 2.0},
        "checks": checks,
        "seconds": 11.2,
        "peak_rss_mb": 900.1,
        "versions": {"python": "3.11.2"},
    }
    write(project.root / "gen-model/verify.json", verdict | changed)


def backend(right: int, **changed: Any) -> dict[str, Any]:
    """Return what ``evaluate`` would say of a model with ``right`` of 240 answers right."""
    counts = [[right // 4 if row == column else 0 for column in range(4)] + [60 - right // 4] for row in range(4)]
    speed = {"load_seconds": 0.4, "prompt_tokens": 128, "prefill_tokens_per_second": 5210.4}
    return {
        "folder": "gen-model/x",
        "bytes": 4_419_562,
        "metrics": {"accuracy": right / 240, "macro_f1": right / 240, "perplexity": 1.044, "ended": 1.0},
        "confusion": {"labels": LABELS, "counts": [*counts, [0] * 5]},
        "speed": speed | {"answer_tokens": 32, "decode_tokens_per_second": None},
        "peak_rss_mb": 812.2,
        "seconds": 7.1,
    } | changed


def write_metrics(project: Sandbox, **changed: Any) -> None:
    """Write what ``evaluate`` would."""
    pair = {"metric": "accuracy", "before": 0.0, "after": 0.983, "better": 236, "worse": 0}
    metrics = {
        "key": "34" * 32,
        "limit": None,
        "data": {"name": "eval_data", "rows": 240, "asked": 240},
        "metric": "accuracy",
        "labels": LABELS[:-1],
        "backends": {"base": backend(0), "merged": backend(236), "onnx": backend(236)},
        "comparisons": [{"from": "base", "to": "merged", **pair, "p": 1e-70, "verdict": "better"}],
        "exported_from": "merged",
        "flipped": [
            {"where": "datasets/eval.jsonl:12", "question": NASTY, "expected": NASTY, "before": NASTY, "onnx": "joy"}
        ],
        "versions": {"python": "3.11.2"},
    }
    write(project.root / "gen-model/report/metrics.json", metrics | changed)


@pytest.fixture
def exported(project: Sandbox) -> Sandbox:
    """Return a fine-tuned project of which nothing has been verified or measured."""
    (project.root / "gen-model/verify.json").unlink(missing_ok=True)
    shutil.rmtree(project.root / "gen-model/report", ignore_errors=True)
    return project


@pytest.fixture
def measured(exported: Sandbox) -> Sandbox:
    """Return a fine-tuned project that was verified and measured."""
    write_verdict(exported)
    write_metrics(exported)
    return exported


def job_of(project: Sandbox) -> Job:
    """Return what the stages of a run are given."""
    found = Project(project.root)
    return Job.start(found, config.load(found), Progress(found.events))


def report(project: Sandbox) -> tuple[Page, str]:
    """Write the report and return it as a page and as Markdown."""
    folder = reporting.write(job_of(project)).parent
    assert {path.name for path in folder.iterdir()} <= {"metrics.json", "report.html", "report.md"}
    return Page((folder / "report.html").read_text(encoding="utf-8")), (folder / "report.md").read_text(
        encoding="utf-8"
    )


def package(project: Sandbox, *options: str) -> Path:
    """Build the package and return its folder."""
    result = project.run("package", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "gen-model/package\n"
    return project.root / "gen-model/package"


def test_make_report_tells_the_numbers_that_were_measured(evaluated: Sandbox) -> None:
    """The page has the accuracy of the evaluation and the checks of the verification, in both forms."""
    result = evaluated.make("report")

    assert result.returncode == 0, result.stderr
    assert "\ngen-model/report/report.html\n" in result.stdout
    folder = evaluated.root / "gen-model/report"
    numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["backends"]
    page = Page((folder / "report.html").read_text(encoding="utf-8")).text.replace("\N{NO-BREAK SPACE}", " ")
    for text in (page, (folder / "report.md").read_text(encoding="utf-8")):
        assert "It passed every check." in text
        for backend in numbers.values():
            assert f"{backend['metrics']['accuracy']:.1%}".replace("%", " %") in text
        for check in json.loads((evaluated.root / "gen-model/verify.json").read_text(encoding="utf-8"))["checks"]:
            assert check["title"] in text.replace("\\", "")


def test_the_size_does_not_change_with_the_evaluation(tuned: Sandbox, evaluated: Sandbox) -> None:
    """What the report calls the model's size is that of its weights, before they are measured and after."""
    before, after = (Results.read(job_of(project)).size for project in (tuned, evaluated))

    assert before == after
    assert (
        before
        == (tuned.root / "gen-model/onnx/model.onnx.data").stat().st_size
        + (tuned.root / "gen-model/onnx/model.onnx").stat().st_size
    )


def test_report_is_one_page_that_loads_nothing(measured: Sandbox) -> None:
    """No scripts, nothing fetched, every link leads somewhere in the page, every id is there once."""
    page, _ = report(measured)

    tags = Counter(tag for tag, _ in page.elements)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(tags)
    assert tags["svg"] == 4  # two charts, each for a wide and for a narrow screen
    assert page.attributes("src", "srcset", "data", "action", "xlink:href") == []
    ids = Counter(page.attributes("id"))
    assert set(ids.values()) == {1}
    assert {href.removeprefix("#") for href in page.attributes("href")} <= set(ids)
    text = (measured.root / "gen-model/report/report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "#0a0b" not in text  # the placeholders of the charts' colours


def test_report_tells_what_was_trained_measured_and_checked(measured: Sandbox) -> None:
    """Both forms say the same: quality, verdict, size, data with hashes, speed, settings, versions, revision."""
    page, markdown = report(measured)

    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    digest = hashlib.sha256((measured.root / "datasets/train.jsonl").read_bytes()).hexdigest()
    headline = "Accuracy on 240 evaluation rows: 0 % with the base model, 98.3 % with the int4 ONNX model"
    said = (headline, "4.4 MB", "It passed every check.", "1,280", "29,203", digest, "5,210", "812 MB", "1.044")
    for fact in (*said, "The adapter learned", "0.40 s", "LoRA"):
        assert fact in text, fact
        assert fact in markdown.replace("\\", ""), fact
    assert "better" in text
    assert "learning_rate" in markdown


@pytest.mark.parametrize("form", ["html", "md"])
def test_texts_of_rows_stay_texts(measured: Sandbox, form: str) -> None:
    """A row with HTML, Markdown, a bar and a line break is shown as it is and changes nothing around it."""
    page, markdown = report(measured)

    if form == "html":
        assert " ".join(NASTY.split()) in page.text
        return
    lines = [line for line in markdown.splitlines() if "alert" in line]
    assert len(lines) == 1
    assert len(re.findall(r"(?<!\\)\|", lines[0])) == 6  # five cells
    assert not re.search(r"(?<!\\)[<`\[*]", lines[0])


def test_same_results_give_the_same_report(measured: Sandbox) -> None:
    """Writing it again changes no byte."""
    report(measured)
    paths = [measured.root / f"gen-model/report/report.{kind}" for kind in ("html", "md")]
    before = [path.read_bytes() for path in paths]

    report(measured)

    assert [path.read_bytes() for path in paths] == before


def test_report_of_a_fresh_project_names_the_commands(fresh: Sandbox) -> None:
    """What has not been done is said, with the command that does it; nothing heavy is needed for that."""
    page, markdown = report(fresh)

    for command in ("edgetune finetune", "edgetune verify", "edgetune evaluate", "edgetune data"):
        assert command in page.text
        assert command in markdown
    assert "There is no exported model yet." in page.text


def test_a_failed_check_stands_in_the_headline_with_its_cause(exported: Sandbox) -> None:
    """A refused model is called so at the top, and the likely cause is told."""
    check = {"name": "quantisation", "title": "int4 keeps the quality", "passed": False, "summary": "98 % → 20 %"}
    checks = [check | {"cause": "blocks are too large"}]
    write_verdict(exported, passed=False, model="gen-model/onnx.rejected", checks=checks)
    (exported.root / "gen-model/onnx").rename(exported.root / "gen-model/onnx.rejected")

    page, markdown = report(exported)

    for text in (page.text.replace("\N{NO-BREAK SPACE}", " "), markdown):
        assert "It failed 1 check: int4 keeps the quality." in text
        assert "Likely cause: blocks are too large" in text


def test_numbers_of_another_model_are_not_shown(measured: Sandbox) -> None:
    """A verdict or measurement that belongs to an earlier export does not count for this one."""
    write_verdict(measured, export_key="0" * 64)
    write_metrics(measured, export_key="0" * 64)

    page, _ = report(measured)

    assert "It has not been verified since it was made." in page.text
    assert "Its quality has not been measured yet." in page.text


def test_package_holds_the_verified_model_and_its_sums(measured: Sandbox) -> None:
    """The model's files without its manifest, a card, the licence, and sums that ``sha256sum -c`` accepts."""
    folder = package(measured)

    published = json.loads((measured.root / "gen-model/onnx/manifest.json").read_text(encoding="utf-8"))["outputs"]
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }
    assert set(digests) == {"README.md", "LICENSE", *(f"model/{name}" for name in published)}
    assert all(digests[f"model/{name}"] == entry["sha256"] for name, entry in published.items())
    sums = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert sums == [f"{digest}  {name}" for name, digest in sorted(digests.items())]


def test_the_card_has_the_metadata_of_the_hub_and_no_row(measured: Sandbox) -> None:
    """Licence, base model and relation are in the front matter; no text of a data set is anywhere in the card."""
    from huggingface_hub import metadata_load

    path = package(measured) / "README.md"

    metadata, text = metadata_load(path), path.read_text(encoding="utf-8")
    assert metadata is not None
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "edgetune/tiny-phi3"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "| int4 ONNX | 98.3 %" in text
    assert "| The adapter learned | passed |" in text
    assert "alert" not in text
    rows = [json.loads(line) for line in (measured.root / "datasets/eval.jsonl").read_text("utf-8").splitlines()]
    assert not [row for row in rows if row["phrase"] in text]


def chat(workflow: Any) -> None:
    """Make the data sets chats in the chat template of the base model."""
    for data in workflow["data_configs"]:
        data["pre_process_data_config"] = {
            "chat_template": True,
            "strategy": "line-by-line",
            "add_special_tokens": False,
        }


def answer_of(card: str, folder: Path) -> str:
    """Run the Python block of a model card in the package, with a text of the user's own."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "Write your own text here." in code
    result = subprocess.run(
        [sys.executable, "-c", code.replace("Write your own text here.", "I cried all evening.")],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python_of_the_card_runs_and_answers(measured: Sandbox) -> None:
    """The code block makes the prompt of the text template and prints what the model says."""
    folder = package(measured)

    assert answer_of((folder / "README.md").read_text(encoding="utf-8"), folder) == "sadness\n"


def test_python_of_a_chats_card_runs_and_answers(measured: Sandbox) -> None:
    """Where the data sets are chats, the code block applies the chat template."""
    folder = package(measured)
    measured.edit(chat)
    job = job_of(measured)

    text = card(job, Results.read(job), find_licence(job))

    assert "apply_chat_template" in text
    assert answer_of(text, folder) == "sadness\n"


def test_the_base_models_own_card_and_files_tell_its_licence(measured: Sandbox) -> None:
    """For a base model from elsewhere, its front matter and licence files count; without them nothing is claimed."""
    lock = measured.root / "setup/model.lock.json"
    lock.write_text(lock.read_text(encoding="utf-8").replace('"built-in"', '"local"'), encoding="utf-8")
    unknown = (package(measured) / "README.md").read_text(encoding="utf-8")
    base = measured.root / "model-cache/edgetune/tiny-phi3"
    front = "---\nlicense: other\nlicense_name: own-licence\nlicense_link: LICENSE.txt\n---\n# a model\n"
    (base / "README.md").write_text(front, encoding="utf-8")
    (base / "NOTICE").write_text("made by somebody", encoding="utf-8")

    folder = package(measured)

    known = (folder / "README.md").read_text(encoding="utf-8")
    assert "Its licence is not known here" in unknown
    assert "license_name: own-licence" in known
    assert "license_link: https://huggingface.co/edgetune/tiny-phi3/blob/main/LICENSE.txt" in known
    assert (folder / "NOTICE").read_text(encoding="utf-8") == "made by somebody"
    assert not (folder / "LICENSE").exists()


def test_archive_is_the_same_for_the_same_package(measured: Sandbox) -> None:
    """Names and bytes of the .zip do not depend on when it was made; a later package without it removes it."""
    archive = measured.root / "gen-model" / f"{measured.root.name}.zip"
    folder = package(measured, "--zip")
    first = archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        assert file.testzip() is None
    for path in (measured.root / "gen-model/onnx").iterdir():
        os.utime(path, (0, 0))

    package(measured, "--zip")

    assert archive.read_bytes() == first
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert names == [f"{measured.root.name}/{path.relative_to(folder).as_posix()}" for path in files]
    package(measured)
    assert not archive.exists()


@pytest.mark.parametrize(
    ("verdict", "message", "hint"),
    [
        (None, "has not been verified", "edgetune verify"),
        ({"passed": False}, "did not pass verification", "edgetune finetune"),
        ({"export_key": "0" * 64}, "is not the one that was verified", "edgetune verify"),
    ],
)
def test_only_a_verified_model_is_packaged(
    exported: Sandbox, verdict: dict[str, Any] | None, message: str, hint: str
) -> None:
    """Without a verdict on this very model that says passed, there is no package."""
    if verdict is not None:
        write_verdict(exported, **verdict)

    result = exported.run("package")

    assert result.returncode == 1
    assert message in result.stderr
    assert hint in result.stderr.partition("hint:")[2]
    assert not (exported.root / "gen-model/package").exists()


def test_a_changed_file_is_not_packaged(measured: Sandbox) -> None:
    """A model whose bytes are not those that were verified is refused, and the earlier package stays."""
    before = package(measured) / "model/genai_config.json"
    content = before.read_bytes()
    (measured.root / "gen-model/onnx/genai_config.json").write_text("{}", encoding="utf-8")

    result = measured.run("package")

    assert result.returncode == 1
    assert "export: its files were changed or removed" in result.stderr
    assert before.read_bytes() == content


def test_a_model_older_than_the_project_is_not_packaged(measured: Sandbox) -> None:
    """After a change of the prompt the card would be wrong, so the model has to be made again first."""
    measured.edit(chat)

    result = measured.run("package")

    assert result.returncode == 1
    assert "is older than the project (data: changed: config" in result.stderr
    assert "edgetune finetune" in result.stderr.partition("hint:")[2]
