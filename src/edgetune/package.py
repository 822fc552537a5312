"""Assemble what is deployed: verified ``gen-model/onnx/``, base licence, measured numbers → ``gen-model/package/``.

The folder holds ``model/``, a model card with the Hub's metadata, the licence files of the base model and
``SHA256SUMS``. No row of a data set goes into it. The same inputs give the same bytes, in the archive too.
"""

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from edgetune import adapters, report, workflow
from edgetune.base_model import DOCUMENTS
from edgetune.contract import Template
from edgetune.errors import Problem, failure, refuse
from edgetune.onnx_backend import GENAI_CONFIG
from edgetune.pages import render
from edgetune.stages import Job, partial_folder, publish, read_json, read_manifest, recover, run_lock, sha256

_LICENCE_FILES = tuple(name.rstrip("*") for name in DOCUMENTS if name != "README.md")
_MODEL = "model"
_SUMS = "SHA256SUMS"
_OLDEST = (1980, 1, 1, 0, 0, 0)  # the zip format knows no earlier time
_FILE_MODE = 0o100644 << 16
_UNIX = 3


def build(job: Job, *, zipped: bool = False) -> Path:
    """Publish the package and return its folder.

    Raises EdgetuneError unless ``verify`` passed this very model, made of the project as it is now.
    """
    folder, archive = job.project.package, job.project.archive
    with run_lock(job.project):
        recover(folder)
        found = report.Results.read(job)
        manifest = _verified(job, found)
        partial = partial_folder(folder)
        shutil.rmtree(partial, ignore_errors=True)
        _copy_model(job, manifest, partial / _MODEL)
        licence = find_licence(job)
        for name, content in licence.files.items():
            (partial / name).write_bytes(content)
        (partial / "README.md").write_text(card(job, found, licence), encoding="utf-8")
        _write_sums(partial)
        archive.unlink(missing_ok=True)  # it must not outlive the folder that it was made of
        publish(partial, folder)
        if zipped:
            _write_archive(folder, archive)
    return folder


def _verified(job: Job, found: report.Results) -> dict[str, Any]:
    """Return the manifest of the model that passed. Raises EdgetuneError when there is none."""
    folder = job.project.stage_folder("verify")
    where, manifest = job.project.name(folder), read_manifest(folder)
    if found.verdict is not None and not found.verdict["passed"]:
        why = job.project.name(job.project.verdict)
        hint = f"{why} says why; change what it names, then run `edgetune finetune`"
        raise failure("the exported model did not pass verification", where=found.verdict["model"], hint=hint)
    if manifest is None:
        raise failure("there is no exported model yet", where=where, hint="run `edgetune finetune` first")
    if found.verdict is None:
        raise failure("the exported model has not been verified", where=where, hint="run `edgetune verify` first")
    if found.verdict["export_key"] != manifest["key"]:
        message = "the exported model is not the one that was verified"
        raise failure(message, where=where, hint="run `edgetune verify` again")
    if stale := workflow.stale(job):  # the card would tell of another prompt or other data
        message = f"the exported model is older than the project ({stale})"
        raise failure(message, where=where, hint="run `edgetune finetune`, or take the changes back")
    return manifest


def _copy_model(job: Job, manifest: dict[str, Any], target: Path) -> None:
    """Copy the published files. Raises EdgetuneError when one is not what was published."""
    source = job.project.stage_folder("verify")
    target.mkdir(parents=True)
    problems = []
    for name, entry in manifest["outputs"].items():
        path = source / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copyfile(path, target / name)
        if not path.is_file() or sha256(target / name) != entry["sha256"]:
            where = job.project.name(path)
            problems.append(Problem(f"{name} is not the file that was verified", where, "run `edgetune finetune`"))
    refuse(problems)


@dataclass(frozen=True)
class Licence:
    """The licence of the base model, as far as it can be known here."""

    id: str | None
    """The Hub's name of it, such as ``mit``."""
    source: str
    """Where that was read."""
    name: str | None = None
    link: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def find_licence(job: Job) -> Licence:
    """Return the licence of the base model: that of its model card, or of edgetune for a built-in model."""
    if report.base_model(job)["source"] == "built-in":
        return _own_licence()
    files = {
        path.name: path.read_bytes()
        for path in sorted(job.base_folder.iterdir())
        if path.is_file() and path.name.upper().startswith(_LICENCE_FILES)
    }
    said = _front_matter(job.base_folder / "README.md")
    known = {key: str(said[key]) for key in ("license", "license_name", "license_link") if said.get(key)}
    link = known.get("license_link")
    if link and "://" not in link and link not in files:
        link = f"https://huggingface.co/{job.base_id}/blob/main/{link}"
    return Licence(known.get("license"), "its model card", known.get("license_name"), link, files)


def _own_licence() -> Licence:
    """Return edgetune's own licence, which the built-in models share."""
    try:
        package = distribution("edgetune")
    except PackageNotFoundError:
        return Licence(None, "edgetune")
    text = package.read_text("licenses/LICENSE")
    files = {"LICENSE": text.encode()} if text else {}
    return Licence(str(package.metadata["License-Expression"]).lower(), "edgetune, which it is a part of", files=files)


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; nothing when there is none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def card(job: Job, found: report.Results, licence: Licence) -> str:
    """Write the model card: the Hub's metadata, then what the model is, how good, and how to run it."""
    facts, exported = report.collect(job), found.manifests["export"] or {}
    settings = read_json(job.project.stage_folder("verify") / GENAI_CONFIG) or {}
    template = render.markdown().get_template("model-card.md.jinja")
    return template.render(
        facts,
        metadata=_metadata(job, facts, licence),
        licence=licence,
        max_length=settings["search"]["max_length"],
        adapter=next((name for name in exported["outputs"] if name.endswith(adapters.SUFFIX)), None),
        runtime=exported["versions"].get("onnxruntime-genai"),
        **_example(job),
    )


def _metadata(job: Job, facts: dict[str, Any], licence: Licence) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence.id or "other",
        license_name=licence.name,
        license_link=licence.link,
        base_model=job.base_id,
        base_model_relation="quantized",
        pipeline_tag="text-generation",
        library_name="onnxruntime-genai",
        datasets=[entry["hub"]["id"] for entry in facts["data"] if entry["hub"] and entry["role"] == "train"] or None,
        tags=["onnx", "onnxruntime", facts["precision"], *(["fine-tuned"] if facts["tuned"] else []), "edgetune"],
    )
    return str(data.to_yaml()).strip()


def _example(job: Job) -> dict[str, Any]:
    """Return what the card's code is made of: a question, and how a prompt is made of one."""
    contract = job.workflow.contract
    question = contract.filled("Write your own text here.")
    if isinstance(contract, Template):
        return {"question": question, "parts": list(_parts(contract)), "prompt": contract.prompt, "chat": None}
    jinja = (job.project.stage_folder("verify") / "chat_template.jinja").is_file()
    chat = {"messages": question[contract.columns[0]], "template": getattr(contract, "chat_template", None)}
    return {"question": question, "parts": [], "prompt": "", "chat": chat | {"file": jinja}}


def _parts(contract: Template) -> Iterator[tuple[str, str | None]]:
    """Yield each text of the prompt with the column after it."""
    from string import Formatter

    for literal, column, _, _ in Formatter().parse(contract.prompt):
        yield literal, column


def _write_sums(folder: Path) -> None:
    """Write sha256 of all files, as ``sha256sum -c`` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / _SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def _write_archive(folder: Path, archive: Path) -> None:
    """Write the folder as one file. Uncompressed: weights hardly shrink, and compression differs between systems."""
    temporary = archive.with_name(archive.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{archive.stem}/{path.relative_to(folder).as_posix()}", _OLDEST)
            entry.create_system, entry.external_attr, entry.file_size = _UNIX, _FILE_MODE, path.stat().st_size
            with path.open("rb") as source, file.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    temporary.replace(archive)
