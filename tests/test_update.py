"""``copier update``: what becomes of a project that a user worked in. `docs/updating.md` has the table."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import copier
import pytest
import yaml  # type: ignore[import-untyped]

from conftest import Sandbox
from edgetune import config
from edgetune.project import Project
from templates import REPOSITORY, commit, copy_template, git, render

WORKFLOW = "fine-tuning/olive-config.json"
TRAIN_SAMPLE = "template/{% if dataset == 'tone' %}datasets{% endif %}/train.jsonl"
RELEASE = {
    "template/Makefile.jinja": ("## Show this list", "## Show all targets"),
    "template/README.md.jinja": ("## What to change where", "## What is changed where"),
    "template/fine-tuning/olive-config.json.jinja": ('"log_severity_level": 1', '"log_severity_level": 2'),
    "template/inferences/prompts.jsonl.jinja": ("phrase", "sentence"),
    "src/edgetune/constraints.txt": ("\nrich==", "\nrich==1"),
    "template/setup/requirements.lock.jinja": ("\nrich==", "\nrich==1"),
    TRAIN_SAMPLE: ("phrase", "sentence"),
}
"""What a new version of the template has changed that no result depends on."""
GPTQ = """    "gptq": {
      "type": "Gptq",
      "group_size": 128,
      "data_config": "train_data"
    },
"""
GENERATED = {
    ".env": "HF_TOKEN=secret\n",
    ".venv/bin/python": "python",
    "gen-model/onnx/model.onnx.data": "weights",
    "inferences/outputs-onnx.jsonl": '{"answer": "joy"}\n',
    "model-cache/edgetune/tiny-phi3/model.safetensors": "weights",
}
OWN = {
    "datasets/own.csv": "phrase,tone\nmine,joy\n",
    "inferences/prompts.jsonl": '{"phrase": "mine"}\n',
    "notes.md": "mine\n",
    "setup/model.lock.json": "{}\n",
}


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository of the template whose only version is v0.1.0; copier keeps its mirrors beside it."""
    monkeypatch.setenv("COPIER_CACHE_DIR", str(tmp_path / "mirrors"))
    repository = copy_template(tmp_path / "edgetune.git")
    commit(repository, "v0.1.0")
    return repository


def replace(path: Path, *changes: tuple[str, str]) -> None:
    """Change texts in a file that has them."""
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, (path, old)
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def release(repository: Path, changes: dict[str, tuple[str, str]], tag: str = "v0.2.0") -> None:
    """Publish another version of the template."""
    for name, change in changes.items():
        replace(repository / name, change)
    commit(repository, tag)


def update(project: Path, **options: Any) -> None:
    """Run ``copier update --defaults``, which trusts nothing."""
    copier.run_update(project, defaults=True, overwrite=True, quiet=True, settings=copier.Settings(), **options)


def write(project: Path, files: dict[str, str]) -> None:
    """Write files into the project."""
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file but git's own."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def workflow_of(project: Path) -> Any:
    """Return the workflow file as parsed JSON."""
    return json.loads((project / WORKFLOW).read_text(encoding="utf-8"))


@pytest.fixture
def worked_in(released: Path, tmp_path: Path) -> Path:
    """Return a committed project: other data, learning rate and passes, weights in ignored folders, own texts."""
    project = render(released.as_uri(), tmp_path / "a space/my-slm")
    replace(
        project / WORKFLOW,
        ('"learning_rate": 0.002', '"learning_rate": 0.0007'),
        ('    "builder": {', GPTQ + '    "builder": {'),
        ('"data_name": "json"', '"data_name": "csv"'),
        ("../datasets/train.jsonl", "../datasets/own.csv"),
        ("../datasets/eval.jsonl", "../datasets/own.csv"),
    )
    for name in ("datasets/train.jsonl", "datasets/eval.jsonl", ".github/workflows/ci.yml"):
        (project / name).unlink()
    with (project / "Makefile").open("a", encoding="utf-8") as file:
        file.write("\nmine: finetune\n\tcp -r gen-model/onnx /srv\n")
    with (project / "inferences/README.md").open("a", encoding="utf-8") as file:
        file.write("\nMine.\n")
    write(project, GENERATED | OWN)
    commit(project)
    return project


def test_nothing_of_the_users_is_lost(released: Path, worked_in: Path) -> None:
    """Settings, passes, data and weights stay beside what is new; what was deleted stays away; git has all the rest."""
    (released / "template/.env.example").unlink()
    (released / "template/inferences/README.md.jinja").unlink()
    release(released, RELEASE)

    update(worked_in)

    files = {name: data.decode() for name, data in content(worked_in).items()}
    assert GENERATED.items() | OWN.items() <= files.items()
    workflow = workflow_of(worked_in)
    assert list(workflow["passes"]) == ["lora", "merge_adapter_weights", "gptq", "builder"]
    assert workflow["passes"]["lora"]["training_args"]["learning_rate"] == 0.0007
    assert workflow["log_severity_level"] == 2
    assert config.load(Project(worked_in)).calibration_data is not None
    assert "## Show all targets" in files["Makefile"]
    assert files["Makefile"].endswith("\nmine: finetune\n\tcp -r gen-model/onnx /srv\n")
    assert "## What is changed where" in files["README.md"]
    assert re.search(f"^edgetune.* @ git\\+{released.as_uri()}@v0.2.0$", files["setup/requirements.txt"], re.MULTILINE)
    assert "\nrich==1" in files["setup/requirements.txt"]
    assert "\nrich==1" in files["setup/requirements.lock"]
    assert not {"datasets/train.jsonl", "datasets/eval.jsonl", ".github/workflows/ci.yml", ".env.example"} & set(files)
    # copier deletes what the template no longer has, changed or not; the commit before the update has it.
    assert "inferences/README.md" not in files
    assert git(worked_in, "show", "HEAD:inferences/README.md").endswith("\nMine.\n")
    assert not [name for name, text in files.items() if name.endswith(".rej") or "<<<<<<<" in text]
    assert findings(worked_in)["conflicts"]["state"] == "ok"


def findings(project: Path) -> dict[str, dict[str, str]]:
    """Return what ``edgetune doctor`` finds, by name."""
    found = json.loads(Sandbox(project).run("doctor", "--json").stdout)
    return {finding["name"]: finding for finding in found}


@pytest.mark.slow
def test_a_second_update_does_nothing(released: Path, worked_in: Path) -> None:
    """Not a byte of the project differs."""
    release(released, RELEASE)
    update(worked_in)
    commit(worked_in)
    before = content(worked_in)

    update(worked_in)

    assert content(worked_in) == before


LEARNING_RATE = {
    "template/fine-tuning/olive-config.json.jinja": (
        '"learning_rate": {{ model.learning_rate }}',
        '"learning_rate": 0.0042',
    )
}
"""What the user of ``worked_in`` has changed, too."""


def test_a_conflict_is_left_open_and_found(released: Path, worked_in: Path) -> None:
    """Where both have changed a line, both versions stand between marks, and are told; git can take all of it back."""
    before = content(worked_in)
    release(released, LEARNING_RATE)

    update(worked_in)

    lines = (worked_in / WORKFLOW).read_text(encoding="utf-8").splitlines()
    mark = lines.index("<<<<<<< before updating") + 1
    assert {'        "learning_rate": 0.0007,', '        "learning_rate": 0.0042,'} <= set(lines[mark:])
    conflicts = findings(worked_in)["conflicts"]
    assert conflicts["state"] == "fail"
    assert conflicts["summary"] == f"left open in {WORKFLOW}:{mark}"
    status = Sandbox(worked_in).run("status")
    assert status.returncode == 1
    assert f"{WORKFLOW}:{mark}: not valid JSON" in status.stderr
    assert "left open by an update or a merge" in status.stderr

    git(worked_in, "reset", "--hard")
    assert content(worked_in) == before


@pytest.mark.slow
def test_conflicts_in_files_of_their_own_are_found(released: Path, worked_in: Path) -> None:
    """With ``--conflict rej`` the project's files stay as they are, and what was not applied stands beside them."""
    release(released, LEARNING_RATE)

    update(worked_in, conflict="rej")

    assert findings(worked_in)["conflicts"]["summary"] == f"left open in {WORKFLOW}.rej"
    assert "0.0007" in (worked_in / f"{WORKFLOW}.rej").read_text(encoding="utf-8")


def test_uncommitted_work_is_not_updated(released: Path, worked_in: Path) -> None:
    """What could not be taken back is not begun."""
    release(released, RELEASE)
    write(worked_in, {"notes.md": "not committed"})
    before = content(worked_in)

    with pytest.raises(copier.errors.UserMessageError, match="dirty"):
        update(worked_in)

    assert content(worked_in) == before


@pytest.mark.slow
def test_results_stay_up_to_date(released: Path, tuned: Sandbox, tmp_path: Path) -> None:
    """After an update of texts, log level and package versions nothing is made again; a new default is."""
    project = Sandbox(render(released.as_uri(), tmp_path / "my-slm"))
    for name in ("gen-model", "model-cache"):
        shutil.copytree(tuned.root / name, project.root / name, dirs_exist_ok=True)
    shutil.copy(tuned.root / "setup/model.lock.json", project.root / "setup")
    commit(project.root)
    assert set(project.steps().values()) == {"up to date"}
    before = project.results()

    release(released, RELEASE)
    update(project.root)

    assert workflow_of(project.root)["log_severity_level"] == 2
    assert set(project.steps().values()) == {"up to date"}
    assert project.results() == before

    commit(project.root)
    release(released, {"template/fine-tuning/olive-config.json.jinja": ('"r": 64', '"r": 32')}, "v0.3.0")
    update(project.root)

    assert project.steps() == dict.fromkeys(("download", "data"), "up to date") | dict.fromkeys(
        ("train", "merge", "export", "verify"), "stale"
    )


@pytest.mark.slow
def test_an_update_from_the_last_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From this repository's last version tag (its last commit, as long as it has none) to the files of today."""
    monkeypatch.setenv("COPIER_CACHE_DIR", str(tmp_path / "mirrors"))
    git(tmp_path, "clone", "--quiet", str(REPOSITORY), "edgetune.git")
    repository = tmp_path / "edgetune.git"
    if not git(repository, "tag", "--list", "v*"):
        git(repository, "tag", "v0.0.1")
    project = render(repository.as_uri(), tmp_path / "my-slm")
    replace(project / WORKFLOW, ('"learning_rate": 0.002', '"learning_rate": 0.0007'))
    write(project, GENERATED | OWN)
    commit(project)
    for name in ("template", "copier.yml", "src"):
        git(repository, "rm", "-r", "--quiet", name)
    copy_template(repository)
    commit(repository, "v99.0.0")

    update(project)

    files = {name: data.decode() for name, data in content(project).items()}
    assert GENERATED.items() | OWN.items() <= files.items()
    assert workflow_of(project)["passes"]["lora"]["training_args"]["learning_rate"] == 0.0007
    assert "v99.0.0" in files["setup/requirements.txt"]
    assert config.load(Project(project))
    assert findings(project)["conflicts"]["state"] == "ok"


def test_an_update_can_choose_other_data(released: Path, tmp_path: Path) -> None:
    """The configuration follows the new answers; rows and prompts of the old ones stay, and none are added."""
    given = {"dataset": "file", "data_file": "mine/own.tsv", "columns": "frage,größe 😀"}
    project = render(released.as_uri(), tmp_path / "my-slm", **given)
    write(project, {"datasets/mine/own.tsv": "frage\tgröße 😀\n"})
    commit(project)

    update(project, data={"dataset": "qa"})

    answers = yaml.safe_load((project / ".copier-answers.yml").read_text(encoding="utf-8"))
    data = workflow_of(project)["data_configs"][0]
    assert answers["dataset"] == "qa"
    assert not {"data_file", "columns"} & set(answers)
    assert data["load_dataset_config"]["data_files"] == "../datasets/train.jsonl"
    assert data["pre_process_data_config"]["text_cols"] == ["Question", "Best Answer"]
    assert '"frage"' in (project / "inferences/prompts.jsonl").read_text(encoding="utf-8")
    assert {path.name for path in (project / "datasets").iterdir()} == {"README.md", "mine"}


def test_copying_again_keeps_data_and_prompts(released: Path, tmp_path: Path) -> None:
    """Rendering over a project, as `copier recopy` does, overwrites no row of the user's."""
    project = render(released, tmp_path / "my-slm")
    own = ["datasets/train.jsonl", "datasets/eval.jsonl", "inferences/prompts.jsonl"]
    write(project, dict.fromkeys(own, "mine\n") | {"Makefile": ""})

    copier.run_copy(str(released), project, defaults=True, overwrite=True, quiet=True, settings=copier.Settings())

    assert all((project / name).read_text(encoding="utf-8") == "mine\n" for name in own)
    assert (project / "Makefile").read_text(encoding="utf-8")
