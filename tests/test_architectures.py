"""The architectures of base models: which are exported and come out right, and what is refused before training."""

import json
from pathlib import Path
from typing import Any

import pytest

import matrix
from conftest import Sandbox
from edgetune.architectures import EXPORTABLE, builder_input, refusal
from edgetune.errors import EdgetuneError
from edgetune.loading import load_weights
from edgetune.onnx_backend import OnnxBackend
from edgetune.tensors import read_folder
from edgetune.torch_backend import TorchBackend
from matrix import CASES, METHODS, SMALL, Case, random_model

REFUSED = {"olmo", "gpt_oss", "qwen2-yarn"}
EXPORTED = [case for case in CASES if case.name not in REFUSED]
BY_NAME = {case.name: case for case in CASES}
GEMMA3 = BY_NAME["gemma3"].config
SAVED_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}


def by_name(value: Any) -> str | None:
    """Name a case in the list of tests."""
    return value.name if isinstance(value, Case) else None


@pytest.fixture(scope="module")
def page() -> dict[str, list[str]]:
    """Return the cells of the generated table by architecture."""
    text = matrix.PAGE.read_text(encoding="utf-8").partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0]: cells for cells in lines[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", EXPORTED, ids=by_name)
def test_architecture_goes_all_the_way(fresh: Sandbox, page: dict[str, list[str]], case: Case, method: str) -> None:
    """Training changes every layer, fp32 is what transformers calculates, int4 is close, and the docs say so."""
    row = matrix.run(case, fresh.root, method)

    weights = read_folder(fresh.root / "model-cache/acme" / case.name)
    layers = {module: sum(name.endswith(f".{module}.weight") for name in weights) for module in case.modules}
    assert not row.refused
    assert row.trained == layers
    assert row.difference < 1e-3
    assert row.same_answers
    assert row.int4 > 0.8
    assert [*page[case.name][:4], *page[case.name][6:]] == list(row.cells())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_comes_out_wrong_is_refused(fresh: Sandbox, page: dict[str, list[str]], name: str) -> None:
    """The download says so, before anything is trained, and the docs say the same."""
    row = matrix.run(BY_NAME[name], fresh.root)

    assert "onnxruntime-genai 0.14.1" in row.refused
    assert [*page[name][:4], *page[name][6:]] == list(row.cells())


def test_the_table_is_of_this_version(page: dict[str, list[str]]) -> None:
    """It has all architectures, with the tested versions."""
    text = matrix.PAGE.read_text(encoding="utf-8")

    assert list(page) == [case.name for case in CASES]
    assert all(f"{name} {version}" in text for name, version in matrix.versions().items())


def test_every_architecture_is_in_the_matrix() -> None:
    """What is let through is also tested."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert {NAMES[case.config["model_type"]] for case in EXPORTED} == EXPORTABLE


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EXPORTED if "repaired" in case.note], ids=by_name)
def test_what_the_builder_makes_by_itself(tmp_path: Path, case: Case) -> None:
    """Without the repair it fails or is far off: once this does not hold, the repair can go."""
    from onnxruntime_genai.models.builder import create_model

    model, target = random_model(SMALL | case.config, tmp_path / "model"), tmp_path / "onnx"
    try:
        create_model(str(model), str(model), str(target), "fp32", "cpu", str(tmp_path / "work"), hf_token="false")  # noqa: S106
        exported = OnnxBackend(target)
        difference, _ = matrix.compare(
            TorchBackend(load_weights(model, dtype="float32", trusted=False), model), exported
        )
    except (AttributeError, KeyError, EdgetuneError, RuntimeError):
        return

    assert difference > 0.01


@pytest.mark.parametrize("case", EXPORTED, ids=by_name)
def test_published_configurations_are_let_through(case: Case) -> None:
    """Nothing in config.json speaks against the architectures of the table."""
    assert refusal(SMALL | case.config) is None


@pytest.mark.parametrize(
    "config",
    [
        GEMMA3 | {"layer_types": None, "sliding_window_pattern": None},
        GEMMA3 | {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]},
        BY_NAME["phi3-longrope"].config | {"rope_scaling": {"type": "yarn", "short_factor": [], "long_factor": []}},
        {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "truncate": False}},
        {"model_type": "unknown", "hidden_size": None, "num_attention_heads": [4, 8], "rope_scaling": "none"},
    ],
)
def test_other_spellings_are_let_through(config: dict[str, Any]) -> None:
    """Entries that are empty, or say the usual in another way, are no reason to refuse a model."""
    assert refusal(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GEMMA3 | {"sliding_window_pattern": 4}, "other layers"),
        (GEMMA3 | {"layer_types": ["full_attention"] * 7}, "other layers"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "other layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8.0}}}, "YaRN"),
        ({"hidden_size": 96, "num_attention_heads": 4}, "24 of 24 numbers"),
        ({"head_dim": 64, "rope_parameters": {"partial_rotary_factor": 0.4}}, "25 of 64 numbers"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], reason: str) -> None:
    """What the builder passes over, or its kernels cannot do, is said of the configuration alone."""
    assert reason in (refusal(config) or "")


@pytest.mark.parametrize(
    "rope", [{}, {"rope_theta": 5e5, "rope_local_base_freq": 2e4}, {"rope_parameters": SAVED_ROPE}]
)
def test_gemma3_in_every_spelling(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Both frequencies reach the builder, whether a file was written for transformers 4 or 5, or names none."""
    from transformers import AutoConfig

    plain = {name: value for name, value in GEMMA3.items() if not name.startswith("rope_")}
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(SMALL | plain | rope))
    (source / "model.safetensors").write_bytes(b"weights")

    given = builder_input(source, tmp_path / "work")

    config = AutoConfig.from_pretrained(given)
    wanted = (rope.get("rope_theta", 1e6), rope.get("rope_local_base_freq", 1e4))
    assert (config.rope_theta, config.rope_local_base_freq) == wanted
    assert config.rope_parameters == AutoConfig.from_pretrained(source).rope_parameters
    assert (given / "model.safetensors").read_bytes() == b"weights"


def test_most_models_are_read_where_they_are(tmp_path: Path) -> None:
    """Where nothing must be repaired, the builder is given the model itself."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | BY_NAME["llama"].config))

    assert builder_input(tmp_path, tmp_path / "work") == tmp_path
