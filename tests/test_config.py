"""The native engine's schema held against stock Olive's, and line numbers against arbitrary JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from edgetune import config, data_schema, schema, training_schema
from edgetune.source import JsonSource

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.sampled_from([None, 0, 1, 2]))
def test_every_key_has_the_line_it_stands_on(tmp_path_factory: pytest.TempPathFactory, value: Any, indent: int) -> None:
    """For any JSON document, laid out in any way, a key's recorded line contains that key."""
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")

    source = JsonSource(path, "file.json")

    lines = path.read_text(encoding="utf-8").split("\n")
    assert source.data == value
    for location, number in source.lines.items():
        if location and isinstance(location[-1], str):
            assert json.dumps(location[-1]) + ":" in lines[number - 1]


@pytest.mark.parametrize(
    ("model", "olive_pass"),
    [
        (schema.LoRA, "LoRA"),
        (schema.QLoRA, "QLoRA"),
        (schema.DoRA, "DoRA"),
        (schema.MergeAdapterWeights, "MergeAdapterWeights"),
        (schema.Gptq, "Gptq"),
        (schema.ModelBuilder, "ModelBuilder"),
    ],
)
def test_passes_have_olives_keys_and_defaults(model: type[BaseModel], olive_pass: str) -> None:
    """Every key of a native pass is one of Olive's, with Olive's default."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.package_config import OlivePackageConfig

    package = OlivePackageConfig.load_default_config()
    known = package.import_pass_module(olive_pass).default_config(DEFAULT_CPU_ACCELERATOR)
    for name, field in model.model_fields.items():
        if name == "type":
            continue
        assert name in known, f"Olive's {olive_pass} has no {name}"
        if not field.is_required() and name not in ("training_args", "search", "torch_dtype"):
            assert field.default == known[name].default_value, name


def test_training_arguments_are_transformers_own() -> None:
    """Every training argument that is passed on exists in the tested transformers; defaults are Olive's."""
    from olive.passes.pytorch.lora import HFTrainingArguments
    from transformers import TrainingArguments

    names = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    olive = HFTrainingArguments()
    for name, field in training_schema.TrainingArguments.model_fields.items():
        assert name in names
        if name in ("learning_rate", "lr_scheduler_type", "report_to", "eval_strategy"):
            assert field.default == getattr(olive, name)
        elif name not in training_schema.PASSED_ON_ARGUMENTS and name != "gradient_checkpointing":
            assert field.default == names[name].default, name


def test_data_keys_are_olives_own() -> None:
    """The keys of a data config are those Olive reads, with its defaults where the native engine has one."""
    from olive.data.component.text_generation import TextGenParams

    for name, field in data_schema.PreProcess.model_fields.items():
        assert name in TextGenParams.model_fields
        if not field.is_required():
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert default == TextGenParams.model_fields[name].default, name


SLICES = ["train", "train[:{a}]", "train[{a}:]", "train[{a}%:]", "train[:{b}%]", "train[{a}%:{b}%]"]


@given(st.integers(1, 300), st.sampled_from(SLICES), st.integers(0, 100), st.integers(0, 100))
def test_slices_are_those_of_datasets(count: int, split: str, a: int, b: int) -> None:
    """A split takes the rows that the library ``datasets`` takes, percentages included."""
    from datasets import ReadInstruction

    from edgetune.row import Place, Row
    from edgetune.rows import take_split

    text = split.format(a=min(a, b), b=max(a, b))
    rows = [Row(number, Place("", number)) for number in range(count)]
    try:
        [part] = ReadInstruction.from_spec(text).to_absolute({"train": count})
    except ValueError:  # beyond the end: datasets refuses what a Python slice cuts off
        return
    assert [row.values for row in take_split(iter(rows), text, lambda: count)] == list(range(part.from_, part.to))


def test_document_that_is_no_workflow(tmp_path: Path) -> None:
    """A JSON document that is not an object is refused like any other mistake, not by a traceback."""
    from edgetune.errors import EdgetuneError
    from edgetune.project import Project

    project = Project(tmp_path)
    project.config.parent.mkdir()
    for text in ("[]", "3", "null", '"x"', "{}", "[" * 5000 + "]" * 5000, "1" * 5000, r'{"a": "\ud800"}'):
        project.config.write_text(text)
        with pytest.raises(EdgetuneError) as caught:
            config.load(project)
        assert all(problem.where.startswith("fine-tuning/olive-config.json:") for problem in caught.value.problems)
