"""What shows that a workflow file is in the style of 2024."""

from typing import Any

from edgetune.errors import Problem
from edgetune.source import JsonSource, Location

Found = list[Location]

_AZURE_FILES = ("azureml_datastore", "azureml_job_output")


def old_style(source: JsonSource, *, also_blocks: bool = True) -> list[Problem]:
    """Return one problem for a file in the old style, else none.

    ``also_blocks``: whether nested ``config`` and ``params`` blocks count, which stock Olive still reads.
    """
    data = source.data if isinstance(source.data, dict) else {}
    found = _structure(data) + (_blocks(data) if also_blocks else [])
    if not found:
        return []
    names = ", ".join(dict.fromkeys(str(place[-1]) for place in found if isinstance(place[-1], str)))
    where = source.where(*min(found, key=lambda place: source.lines.get(place, 1)))
    hint = f"run `edgetune migrate {source.name}`: it writes today's form beside it and tells what it changed"
    return [Problem(f"this workflow file is in the style of 2024 ({names})", where, hint)]


def _structure(data: dict[str, Any]) -> Found:
    """Return what today's Olive takes no more."""
    found: Found = [("azureml_client",)] if "azureml_client" in data else []
    model = _object(data.get("input_model"))
    if "hf_config" in model or "hf_config" in _object(model.get("config")):
        found.append(("input_model", *(() if "hf_config" in model else ("config",)), "hf_config"))
    for name, system in _object(data.get("systems")).items():
        inner = _object(system) | _object(_object(system).get("config"))
        nested = ("config",) if "accelerators" not in _object(system) else ()
        if str(inner.get("type")).lower() == "azureml":
            found.append(("systems", name, "type"))
        if any(isinstance(entry, str) for entry in _listed(inner.get("accelerators"))):
            found.append(("systems", name, *nested, "accelerators"))
    if "execution_providers" in _object(data.get("engine")):
        found.append(("engine", "execution_providers"))
    if isinstance(data.get("data_configs"), dict):
        found.append(("data_configs",))
    for at, entry in enumerate(_listed(data.get("data_configs"))):
        load = _object(_object(entry).get("load_dataset_config"))
        params = load | _object(load.get("params"))
        if "params_config" in _object(entry):
            found.append(("data_configs", at, "params_config"))
        if _object(params.get("data_files")).get("type") in _AZURE_FILES:
            nested = ("params",) if "data_files" not in load else ()
            found.append(("data_configs", at, "load_dataset_config", *nested, "data_files"))
    return found


def _blocks(data: dict[str, Any]) -> Found:
    """Return the blocks that stock Olive still reads and today's files do without."""
    places: list[Location] = [("engine",), ("input_model", "config")]
    places += [("systems", name, "config") for name in _object(data.get("systems"))]
    places += [("passes", name, "config") for name in _object(data.get("passes"))]
    places += [
        ("data_configs", at, part, "params")
        for at, _ in enumerate(_listed(data.get("data_configs")))
        for part in ("load_dataset_config", "pre_process_data_config")
    ]
    return [place for place in places if _is_object(data, place)]


def _is_object(value: Any, place: Location) -> bool:
    for step in place:
        if isinstance(value, dict):
            value = value.get(str(step))
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
        else:
            return False
    return isinstance(value, dict)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
