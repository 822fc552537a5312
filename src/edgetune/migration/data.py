"""Data configs: where rows come from, what text is made of them, and which of them are for evaluation."""

import copy
import posixpath
import re
from typing import Any

from edgetune.data_schema import FILE_FORMATS, LoadDataset
from edgetune.migration import cloud
from edgetune.migration.cloud import CloudJob
from edgetune.migration.draft import Draft, Old, Part, Section, free_name
from edgetune.migration.text import pre_process
from edgetune.source import Location

_CONTAINER = "HuggingfaceContainer"
_DATASETS = "../datasets/"
_PARTS = ("load_dataset", "pre_process_data", "post_process_data", "dataloader")


def data_sets(draft: Draft, job: CloudJob, top: Section, model: str) -> tuple[list[Part], dict[str, str]]:
    """Return today's ``data_configs``, and the new name of each old one; ``model`` is the id of the base model."""
    found = top.take("data_configs")
    entries: Any = [] if found is None else found.value
    keys = list(entries) if isinstance(entries, dict) else range(len(entries)) if isinstance(entries, list) else []
    if found and isinstance(entries, dict):
        draft.changed(found.place, "data_configs", "a list", "each data set has its name inside")
    new, names = [], dict[str, str]()
    for key in keys:
        place: Location = (*found.place, key) if found else ()
        given = Section(draft, place)
        name = given.take("name")
        old_name = str(name.value if name else key)
        kind = given.take("type")
        if kind and str(kind.value).lower() != _CONTAINER.lower():
            draft.left_out(kind.place, f"{old_name!r} holds no rows: it was for measuring")
            continue
        names[old_name] = re.sub(r"\W", "_", old_name, flags=re.ASCII)
        if names[old_name] != old_name:
            draft.changed(name.place if name else place, "name", names[old_name], "Olive takes letters, digits and _")
        new.append(_data_set(draft, job, given, names[old_name], model))
    return new, names


def _data_set(draft: Draft, job: CloudJob, given: Section, name: str, model: str) -> Part:
    load, process = _sections(given)
    part = Part(given.place)
    part.put("name", name)
    part.put("type", _CONTAINER)
    part.put("load_dataset_config", _load(draft, job, load, name), load.place)
    part.put("pre_process_data_config", pre_process(draft, process, model), process.place)
    for section in (load, given):
        section.leave_rest(LoadDataset.model_fields, "edgetune reads rows without it")
    return part


def _sections(given: Section) -> tuple[Section, Section]:
    """Return the keys for loading and for making text, wherever the old file has them."""
    draft = given.draft
    empty = [Section(draft, given.place) for _ in range(2)]
    for section in empty:
        section.places.clear()
    load, process = empty
    for role, place in _blocks(given):
        if role in ("post_process_data", "dataloader"):
            draft.left_out(place, "" if f"{role}_config" == place[-1] else "batch sizes stand in training_args")
            continue
        section = load if role == "load_dataset" else process
        section.place = place
        section.absorb(place, ("params",))
        if kind := section.take("type"):
            draft.left_out(kind.place, "the container decides on it")
    return load, process


def _blocks(given: Section) -> list[tuple[str, Location]]:
    found = [(role, old.place) for role in _PARTS if (old := given.take(f"{role}_config"))]
    for key in ("components", "params_config"):
        if (outer := given.section(key)) is None:
            continue
        given.draft.changed(outer.place, key)
        inner = outer.section("component_kwargs") if key == "params_config" else outer
        if key == "params_config":
            found.append(("load_dataset", outer.place))
        found += [(role, old.place) for role in _PARTS if inner and (old := inner.take(role))]
    return found


def _load(draft: Draft, job: CloudJob, given: Section, name: str) -> Part:
    given.take("component_kwargs")  # read already
    part = Part(given.place)
    given.carry(part, ("data_name", "subset", "revision", "encoding"))
    if delimiter := given.take("delimiter", "sep"):
        part.put("delimiter", delimiter.value, delimiter.place)
    split = given.take("split")
    wanted = str(split.value) if split else "validation"
    files = given.take("data_files")
    if files is not None:
        whole, _, cut = wanted.partition("[")
        mapping = isinstance(files.value, dict) and "type" not in files.value
        if mapping and whole in files.value:
            draft.changed(files.place, "data_files", f"the file of {whole!r}", "each data set names its own files")
            files = Old(files.value[whole], (*files.place, whole))
        part.put("data_files", _files(draft, job, files, name, str(part.get("data_name"))), files.place)
        if part.get("data_name") in FILE_FORMATS:
            if split is None or whole != "train":
                place = split.place if split else given.place
                draft.changed(place, "split", "`split: train`", "the rows of a file are called so")
            wanted = "train" + (f"[{cut}" if cut else "")
    elif split is None:
        draft.changed(given.place, "split", "`split: validation`", "that is what Olive takes when nothing is said")
    part.put("split", wanted, split.place if split else None)
    return part


def _files(draft: Draft, job: CloudJob, files: Old, name: str, kind: str) -> Any:
    """Return the path or paths of a file, a list of files, or a resource."""
    if isinstance(files.value, list):
        many = [Old(value, (*files.place, number)) for number, value in enumerate(files.value)]
        return [_files(draft, job, one, f"{name}_{one.place[-1]}", kind) for one in many]
    if isinstance(files.value, dict):
        return _resource(draft, job, files, name, kind)
    path = str(files.value)
    new = _in_datasets(path)
    if new != path:
        draft.changed(files.place, "data_files", f"`data_files: {new}`")
        what = "download the file to" if "://" in path else "have the file in"
        draft.to_do(files.place, f"{what} {new.removeprefix('../')}")
    return new


def _resource(draft: Draft, job: CloudJob, files: Old, name: str, kind: str) -> Any:
    config = files.value.get("config") if isinstance(files.value.get("config"), dict) else files.value
    path = next((str(config[key]) for key in ("path", "relative_path", "datastore_url", "name") if config.get(key)), "")
    file = posixpath.basename(path.replace("\\", "/"))
    new = _DATASETS + (file if re.search(r"\.(jsonl?|csv|tsv|parquet)$", file) else f"{name}.{kind}")
    if not cloud.data_input(draft, job, files.place, name, new.removeprefix("../")):
        draft.changed(files.place, "data_files", f"`data_files: {new}`")
        draft.to_do(files.place, f"have the file in {new.removeprefix('../')}")
    return new


def _in_datasets(path: str) -> str:
    """Return a path below the project's ``datasets/``; an absolute path stays."""
    clean = path.replace("\\", "/")
    if clean.startswith(_DATASETS) or re.match(r"/|[A-Za-z]:/", clean):
        return path
    if "://" in clean:
        return _DATASETS + posixpath.basename(clean.partition("?")[0])
    parts = [part for part in clean.split("/") if part not in ("", ".", "..")]
    if parts[0] in ("data", "dataset", "datasets") and len(parts) > 1:
        parts = parts[1:]
    return _DATASETS + "/".join(parts)


def split_off(draft: Draft, data: Part, size: Old, taken: set[str]) -> Part | None:
    """Cut the rows for evaluation off the end of a data set, and return them as one of their own.

    ``size`` is a share below 1 or a number of rows, as ``eval_dataset_size`` was. Returns None, with a note of what
    to do, where a slice cannot say that.
    """
    load: Part = data["load_dataset_config"]
    cut = _cut(str(load["split"]), size.value)
    if cut is None:
        draft.left_out(size.place, f"no slice of {load['split']!r} says {size.value!r}")
        draft.to_do(size.place, "set rows aside with `edgetune data --write-split 0.1`")
        return None
    evaluation = copy.deepcopy(data)
    name = data["name"].replace("train", "eval") if "train" in data["name"] else f"{data['name']}_eval"
    evaluation["name"] = free_name(name, taken)
    load["split"], evaluation["load_dataset_config"]["split"] = cut
    said = f"`eval_data_config: {evaluation['name']}`, its split {cut[1]} beside {cut[0]}"
    draft.changed(size.place, "eval_dataset_size", said)
    draft.to_do(size.place, "rows are cut off as they stand: if they are sorted, use `edgetune data --write-split 0.1`")
    return evaluation


def _cut(split: str, size: Any) -> tuple[str, str] | None:
    """Return the slices for training and for evaluation."""
    found = re.fullmatch(r"([^\[]+)(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if found is None or isinstance(size, bool) or not isinstance(size, (int, float)) or size <= 0:
        return None
    whole, start, start_unit, stop, stop_unit = (text or "" for text in found.groups())
    unit = start_unit or stop_unit
    if size < 1 and (unit or not start + stop):
        first, last = int(start or 0), int(stop or 100)
        middle = last - max(1, round((last - first) * size))
        ends = (f"{first}%" if first else "", f"{middle}%", f"{last}%" if stop else "")
        valid = first < middle
    elif stop and not unit:
        first, last = int(start or 0), int(stop)
        middle = last - (max(1, round((last - first) * size)) if size < 1 else int(size))
        ends, valid = (start, str(middle), stop), first < middle
    else:
        ends, valid = (start, f"-{int(size)}", ""), size >= 1 and not unit
    return (f"{whole}[{ends[0]}:{ends[1]}]", f"{whole}[{ends[1]}:{ends[2]}]") if valid else None
