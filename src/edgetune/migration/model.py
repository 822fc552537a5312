"""The base model: PyTorchModel with hf_config, or any path → HfModel below ``model-cache/``."""

import re
from typing import Any

from edgetune.migration import cloud
from edgetune.migration.cloud import CloudJob
from edgetune.migration.draft import Draft, Old, Part, Section
from edgetune.schema import InputModel, LoadKwargs

_CACHE = "../model-cache/"
_KINDS = ("hfmodel", "pytorchmodel", "ptmodel")


def input_model(draft: Draft, job: CloudJob) -> Part:
    """Return today's ``input_model``."""
    given = Section(draft, ("input_model",), ("config",))
    inner = given.section("hf_config", "config")
    if inner:
        draft.changed(inner.place, "hf_config")
    part = Part(given.place)
    kind = given.take("type")
    if kind and str(kind.value).lower() not in _KINDS:
        draft.refused(kind.place, f"edgetune does not start from a {kind.value}", "it starts from a model of the Hub")
    elif kind and kind.value != "HfModel":
        draft.changed(kind.place, "PyTorchModel")
    part.put("type", "HfModel", kind.place if kind else None)
    _model_path(draft, job, part, given, inner)
    for section in (given, inner):
        if section and (task := section.take("task")):
            part.put("task", task.value, task.place)
    if kwargs := _load_kwargs(draft, given, inner):
        part.put("load_kwargs", kwargs, kwargs.place)
    for section in (given, inner):
        if section:
            section.leave_rest(InputModel.model_fields, "the model says so itself")
    return part


def _model_path(draft: Draft, job: CloudJob, part: Part, given: Section, inner: Section | None) -> None:
    named, path = inner.take("model_name") if inner else None, given.take("model_path")
    source = path or named
    if source is None:
        return  # the schema says that it is missing
    stored = cloud.model_input(draft, job, path.place) if path and isinstance(path.value, dict) else ""
    text = _plain(named) or _plain(path)
    if stored and not named:
        text = f"azureml/{stored}"
        draft.to_do(source.place, "its name stands for the id of the model: write the one on the Hub if there is one")
    new = f"{_CACHE}{_model_id(draft, source, text)}"
    if new != source.value:
        draft.changed(source.place, "model_name" if source is named else "model_path", f"`model_path: {new}`")
    if path and named:
        draft.changed(named.place, "model_name", f"`model_path: {new}`")
        if not stored:
            draft.to_do(path.place, "bring the weights of this folder in with `edgetune download --from FOLDER`")
    part.put("model_path", new, source.place)


def _plain(found: Old | None) -> str:
    """Return the path or name of a resource; empty when it has none."""
    value: Any = found.value if found else ""
    if isinstance(value, dict):
        config: dict[str, Any] = value["config"] if isinstance(value.get("config"), dict) else value
        value = config.get("path") or config.get("name") or ""
    return str(value)


def _model_id(draft: Draft, source: Old, text: str) -> str:
    """Return ``organisation/name`` for a Hub id or a folder."""
    text = text.replace("\\", "/")
    if text.startswith(_CACHE) or re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*", text):
        rest = text.removeprefix(_CACHE)
        if not rest.startswith((".", "model-cache/")):
            return rest
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    if "model-cache" in parts[:-2]:
        parts = parts[parts.index("model-cache") + 1 :]
    is_folder = "/" in text
    what = "bring its weights in with `edgetune download --from FOLDER`" if is_folder else "write its id on the Hub"
    draft.to_do(source.place, f"{text!r} does not name a model as organisation/name: {what}")
    return "/".join((["local", *parts] if len(parts) < 2 else parts)[-2:])  # noqa: PLR2004


def _load_kwargs(draft: Draft, given: Section, inner: Section | None) -> Part | None:
    found: Part | None = None
    for section in (given, inner):
        for key in ("load_kwargs", "from_pretrained_args", "model_loading_args"):
            place = section.places.get(key) if section else None
            if section is None or place is None:
                continue
            old = section.section(key, "extra_args")
            if key != "load_kwargs":
                draft.changed(place, key)
            if old is not None:
                found = found or Part(place)
                _fill(draft, found, old)
    return found


def _fill(draft: Draft, part: Part, old: Section) -> None:
    if (trust := old.take("trust_remote_code")) is not None:
        revision = draft.at(old.places["revision"]) if "revision" in old else ""
        pinned = re.fullmatch("[0-9a-f]{40}", str(revision)) is not None
        if trust.value is True and not pinned:
            draft.changed(trust.place, "trust_remote_code")
        part.put("trust_remote_code", trust.value if trust.value is not True or pinned else False, trust.place)
    old.carry(part, ("revision",))
    old.leave_rest(LoadKwargs.model_fields, "edgetune decides how weights are loaded, by what the machine has")
