"""Yield the rows of data sets one after the other: their files or Hub id, their split, their number."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from edgetune.data_schema import DataConfig, LoadDataset
from edgetune.errors import EdgetuneError, Problem, failure, first_line, missing_extra
from edgetune.hub import clean
from edgetune.row import Place, Row
from edgetune.text_rows import csv_rows, json_rows

Name = Callable[[Path], str]
"""Turns a path into what messages call it."""


def files_of(load: LoadDataset, folder: Path) -> list[Path]:
    """Return the files of a data set in order; a pattern that matches nothing comes back as it is.

    Names and patterns are relative to ``folder``, the workflow file's.
    """
    paths = []
    for name in load.data_files or ():
        path = os.path.normpath(folder / name)
        is_pattern = glob.has_magic(name) and not Path(path).exists()
        found = sorted(glob.glob(path, recursive=True)) if is_pattern else []  # noqa: PTH207 - needs absolute patterns
        paths += [Path(match) for match in found] or [Path(path)]
    return paths


def read(config: DataConfig, folder: Path, name: Name) -> Iterator[Row]:
    """Yield the rows of a data set: its files or Hub id, its split, its ``max_samples``.

    Raises EdgetuneError, without a place, when the Hub does not give the data.
    """
    load = config.load_dataset_config
    if load.is_hub:
        data = hub_data(load.whole)
        rows = take_split(_hub_rows(load.whole), load.split, partial(len, data))
    else:
        files = files_of(load, folder)
        rows = take_split(_rows_of_files(load, files, name), load.split, partial(_count, load, files))
    return islice(rows, config.pre_process_data_config.max_samples)


def read_all(configs: Iterable[DataConfig], folder: Path, name: Name) -> Iterator[Row]:
    """Yield every row of the files and Hub splits that data sets take from, once, whatever slices they take."""
    units: dict[tuple[LoadDataset, Path | None], None] = {}
    for load in (config.load_dataset_config for config in configs):
        if load.is_hub:
            units[load.whole, None] = None
        else:
            alike = load.whole.model_copy(update={"data_files": None})
            units |= dict.fromkeys((alike, path) for path in files_of(load, folder))
    for load, path in units:
        yield from _hub_rows(load) if path is None else _rows_of_files(load, [path], name)


def take_split(rows: Iterator[Row], split: str, count: Callable[[], int]) -> Iterator[Row]:
    """Yield the rows of a slice such as ``train[90%:]``; ``count`` tells how many there are in all."""
    bounds = re.search(r"\[(.*):(.*)\]", split)
    if bounds is None:
        return rows
    total = count()
    start, stop, _ = slice(*(_boundary(text, total) for text in bounds.groups())).indices(total)
    return islice(rows, start, max(start, stop))


def _count(load: LoadDataset, files: list[Path]) -> int:
    return _count_once(load, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=4)  # two slices of the same files, each read twice in a run
def _count_once(load: LoadDataset, files: tuple[tuple[Path, int, int], ...]) -> int:
    return sum(1 for _ in _rows_of_files(load, [path for path, _, _ in files], str))


def _boundary(text: str, count: int) -> int | None:
    """Return where a slice starts or ends; percentages round as ``datasets`` does."""
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def _rows_of_files(load: LoadDataset, files: list[Path], name: Name) -> Iterator[Row]:
    for path in files:
        if load.data_name == "parquet":
            yield from _parquet_rows(path, name(path))
        elif load.data_name == "csv":
            yield from csv_rows(path, name(path), load)
        else:
            yield from json_rows(path, name(path), load.encoding)


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    load_dataset = _datasets().load_dataset
    try:  # streaming reads the file itself, without a copy in a cache that outlives an edit
        rows = iter(load_dataset("parquet", data_files=[str(path)], split="train", streaming=True))
        yield from (Row(values, Place(name, number)) for number, values in enumerate(rows, start=1))
    except (ValueError, OSError) as error:
        problem = Problem(f"not valid Parquet: {first_line(error)}", hint="write the file again")
        yield Row(None, Place(name, 1), problem, fatal=True)


def _hub_rows(load: LoadDataset) -> Iterator[Row]:
    name = f"{load.data_name}/{load.split}"
    return (Row(values, Place(name, number)) for number, values in enumerate(hub_data(load), start=1))


@lru_cache(maxsize=4)  # every pass of a run sees the same commit
def hub_data(load: LoadDataset) -> Any:
    """Return a split of a data set of the Hub as ``datasets`` loads it.

    Raises EdgetuneError when it cannot be had.
    """
    files = list(load.data_files) if load.data_files else None
    try:
        return _datasets().load_dataset(
            load.data_name, load.subset, data_files=files, split=load.split, revision=load.revision
        )
    except EdgetuneError:
        raise
    except Exception as error:
        raise failure(
            f"the data set {load.data_name} could not be loaded: {clean(first_line(error))}",
            hint="check data_name, subset and split against its page on the Hub; a private or gated one needs HF_TOKEN",
        ) from error


def hub_commit(load: LoadDataset) -> str:
    """Return the commit that a data set of the Hub was loaded from; empty when it cannot be told.

    ``datasets`` keeps what it has loaded in a folder named after the commit.
    """
    folders = {Path(file["filename"]).parent.name for file in hub_data(load.whole).cache_files}
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), "")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("train", error) from None
    datasets.disable_progress_bars()
    return datasets
