"""Systems, and the keys of ``engine``: where a workflow ran and where its model is to run."""

from typing import Any, get_args

from edgetune.migration import cloud
from edgetune.migration.cloud import CloudJob
from edgetune.migration.draft import Draft, Old, Part, Section
from edgetune.schema import Provider
from edgetune.source import Location

_PROVIDERS: tuple[str, ...] = get_args(Provider)
_OF_DEVICE = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
_KEPT = ("workflow_id", "log_severity_level")
_FOLDERS = {"cache_dir": "cache", "output_dir": "../gen-model/olive"}
_LOCAL = "local_system"


def machines(draft: Draft, job: CloudJob, top: Section) -> Part:
    """Return ``systems``, ``host``, ``target`` and the other keys at the end of today's file."""
    part = Part(top.place)
    host, target = top.take("host"), top.take("target")
    providers = top.take("execution_providers")
    if providers:
        draft.changed(providers.place, "execution_providers")
    used = [old.value for old in (host, target) if old and isinstance(old.value, str)]
    systems = Part(top.places.get("systems", ()))
    names = _systems(job, top, systems, used, providers)
    for role, old in (("host", host), ("target", target)):
        if old and isinstance(old.value, dict):
            names[role] = _add(draft, job, systems, Section(draft, old.place, ("config",)), providers)
            part.put(role, names[role], old.place)
            draft.changed(old.place, "", f"`{role}: {names[role]}`", "systems stand together under `systems`")
        elif old:
            part.put(role, names.get(str(old.value), old.value), old.place)
            if part[role] != old.value:
                draft.changed(old.place, "", f"`{role}: {part[role]}`", "the system's new name")
    if not systems:
        accelerator = _accelerator(draft, None, providers, ())
        systems.put(_LOCAL, _local_system((), accelerator))
        if not providers:
            draft.to_do((), "the old file names no machine, which is a CPU to Olive: `systems` is where to change that")
    if "target" not in part:
        part.put("target", part.get("host", next(iter(systems))), part.places.get("host", ()))
    part.put("systems", systems, systems.place)
    _settings(draft, top, part)
    return part


def _systems(job: CloudJob, top: Section, systems: Part, used: list[str], providers: Old | None) -> dict[str, str]:
    """Convert each system; return the new name of each old one that is still there."""
    draft, found = top.draft, top.take("systems")
    if found is None:
        return {}
    given = Section(draft, found.place)
    names = {}
    for name in sorted(given.places, key=lambda name: name not in used):  # the job is made of the one that is used
        if name in used or not _is_cloud(draft, given.places[name]):
            names[name] = _add(draft, job, systems, Section(draft, given.places[name], ("config",)), providers)
        else:
            cloud.other_system(draft, job, given.places[name])
    return names


def _is_cloud(draft: Draft, place: Location) -> bool:
    system = draft.at(place)
    return isinstance(system, dict) and str(system.get("type")).lower() == "azureml"


def _add(draft: Draft, job: CloudJob, systems: Part, system: Section, providers: Old | None) -> str:
    """Add today's form of a system; return its name."""
    name = str(system.place[-1])
    kind = system.take("type")
    if kind and _is_cloud(draft, system.place):
        draft.changed(kind.place, "AzureML", "`LocalSystem` and `azureml-job.yml`")
        cloud.system(draft, job, system)
        others = draft.source.data.get("systems") or {}
        name = name if _LOCAL in systems or _LOCAL in others else _LOCAL
    elif kind and kind.value != "LocalSystem":
        draft.changed(kind.place, "", "`LocalSystem`", "edgetune runs in the environment it is installed in")
    accelerator = _accelerator(draft, system.take("accelerators"), providers, system.place)
    systems.put(name, _local_system(system.place, accelerator), system.place)
    system.leave_rest(("accelerators",), "edgetune runs in the environment it is installed in")
    return name


def _local_system(place: Location, accelerator: Part) -> Part:
    part = Part(place)
    part.put("type", "LocalSystem")
    part.put("accelerators", [accelerator], accelerator.place)
    return part


def _accelerator(draft: Draft, old: Old | None, providers: Old | None, place: Location) -> Part:
    """Return one accelerator with one execution provider that belong together."""
    device, wanted, kept = None, _listed(providers), ""
    if old is not None and old.value:
        entries = old.value if isinstance(old.value, list) else [old.value]
        first, place = entries[0], (*old.place, 0) if isinstance(old.value, list) else old.place
        for number in range(1, len(entries)):
            draft.left_out((*old.place, number), "Olive takes one accelerator")
        if isinstance(first, dict):
            given = Section(draft, place)
            asked, listed = given.take("device"), given.take("execution_providers")
            device, wanted = asked.value if asked else None, _listed(listed) or wanted
            given.leave_rest(("device", "execution_providers"), "the machine says so itself")
            kept = str(device) if listed else ""
        else:
            device = first
    fitting = [name for name in wanted if name in _PROVIDERS and (name == "CPUExecutionProvider") != (device == "gpu")]
    known = [name for name in wanted if name in _PROVIDERS]
    name = (fitting or known or [_OF_DEVICE.get(str(device), "CPUExecutionProvider")])[0]
    part = Part(place)
    part.put("device", "cpu" if name == "CPUExecutionProvider" else "gpu")
    part.put("execution_providers", [name])
    if old is not None and old.value and (kept != part["device"] or wanted != [name]):
        draft.changed(place, "accelerators", f"{part['device']}, {name}")
    if str(device) not in (*_OF_DEVICE, "None") or (wanted and not known):
        asked_for = ", ".join(str(one) for one in (device, *wanted) if one)
        draft.to_do(place, f"edgetune makes no models for {asked_for}: this one is for {name}")
    return part


def _listed(old: Old | None) -> list[str]:
    value: Any = old.value if old else []
    names = value if isinstance(value, list) else [value]
    return [str(name[0] if isinstance(name, list) and name else name) for name in names]


def _settings(draft: Draft, top: Section, part: Part) -> None:
    """Carry what stands at the end of the file, and put results where a project has them."""
    for key, folder in _FOLDERS.items():
        found = top.take(key)
        if found and found.value != folder:
            draft.changed(found.place, key)
        part.put(key, folder, found.place if found else None)
    top.carry(part, _KEPT)
    if (found := top.take("evaluate_input_model")) and found.value is False:
        part.put("evaluate_input_model", False, found.place)  # noqa: FBT003 - the value of the key
    elif found:
        draft.left_out(found.place)
    if found := top.take("search_strategy"):
        draft.left_out(found.place, "" if found.value else "not to search is the default today")
