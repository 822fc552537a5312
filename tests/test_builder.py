"""The builder without the model in memory: what it writes is what the builder writes by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from edgetune import builder
from edgetune.architectures import builder_input
from edgetune.project import BUILTIN_MODELS
from matrix import CASES, SMALL, Case, random_model
from test_architectures import REFUSED

TINY = BUILTIN_MODELS["edgetune/tiny-phi3"]
DATA = "model.onnx.data"
COMPARED = [case for case in CASES if case.name not in REFUSED]
ADDS_ONE = {"gemma", "gemma2", "gemma3", "nemotron"}


@pytest.fixture(autouse=True)
def _in_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even these small matrices be cut, with a rest at the end."""
    monkeypatch.setattr(builder, "_SLICE", 10_000)


CPU = {"execution_provider": "cpu", "hf_token": "false"}


def built(model: Path, folder: Path, precision: str, **options: Any) -> tuple[Path, Path]:
    """Export with the builder itself, and with edgetune; return both folders."""
    from onnxruntime_genai.models.builder import create_model

    plain = folder / "plain"
    create_model(str(model), str(model), str(plain), precision, cache_dir=str(plain / "work"), **CPU | options)
    return plain, streamed(model, folder / "ours", precision, **options)


def streamed(model: Path, folder: Path, precision: str, **options: Any) -> Path:
    """Export with edgetune; return the folder."""
    work = folder / "work"
    work.mkdir(parents=True)
    builder.create(model, folder, work, precision, **CPU | options)
    return folder


def is_same(one: Path, other: Path) -> bool:
    """Tell whether two exported models have the same nodes, and the same weights byte for byte."""
    return nodes(one) == nodes(other) and (one / DATA).read_bytes() == (other / DATA).read_bytes()


def nodes(folder: Path) -> list[Any]:
    """Return the nodes of an exported model, with what they take, give and are told."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [
        (node.op_type, node.name, node.input, node.output, [each for each in node.attribute if not each.HasField("g")])
        for node in graph.node
    ]


def initializers(folder: Path) -> dict[str, Any]:
    """Return the tensors of an exported model by name."""
    import onnx
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"int4_is_symmetric": False, "int4_block_size": 128}, marks=pytest.mark.slow),
        pytest.param({"int4_nodes_to_exclude": ["/lm_head/MatMul"]}, marks=pytest.mark.slow),
        pytest.param({"int4_op_types_to_quantize": ["Gather"]}, marks=pytest.mark.slow),
        pytest.param({"use_qdq": True}, marks=pytest.mark.slow),
        pytest.param({"execution_provider": "dml"}, marks=pytest.mark.slow),
        pytest.param({"execution_provider": "cuda", "use_cuda_bf16": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param({"precision": "fp16", "execution_provider": "cuda"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_files_are_the_builders(tmp_path: Path, options: dict[str, Any]) -> None:
    """With the default algorithm, byte for byte."""
    assert is_same(*built(TINY, tmp_path, **{"precision": "int4"} | options))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rtn", "rtn_last", "k_quant", "k_quant_mixed"])
def test_other_algorithms_make_the_same_weights(tmp_path: Path, algorithm: str) -> None:
    """They go through onnxruntime's other quantisers, whose nodes stand in another order."""
    options = {"int4_algo_config": algorithm, "int4_is_symmetric": algorithm.startswith("rtn")}
    plain, ours = (initializers(folder) for folder in built(TINY, tmp_path, "int4", **options))

    assert plain.keys() == ours.keys()
    assert all(np.array_equal(plain[name], ours[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_every_architecture(tmp_path: Path, case: Case) -> None:
    """The same bytes; where norms add 1 to their weights, edgetune does not round the sum."""
    model = builder_input(random_model(SMALL | case.config, tmp_path / "model"), tmp_path / "given")

    plain, ours = built(model, tmp_path, "int4")

    if case.name not in ADDS_ONE:
        assert is_same(plain, ours)
        return
    one, other = initializers(plain), initializers(ours)
    different = [name for name in one if not np.array_equal(one[name], other[name])]
    assert all("norm" in name for name in different)
    assert all(np.allclose(one[name], other[name], rtol=2**-8) for name in different)


@pytest.mark.slow
def test_weights_under_other_names(tmp_path: Path) -> None:
    """What transformers finds under the names of the model without its output layer is left to it."""
    case = next(case for case in CASES if case.name == "llama-tied")
    model = random_model(SMALL | case.config, tmp_path / "model")
    path = model / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    with builder._Weights.of(model) as weights:  # noqa: SLF001 - that it is left to transformers shows nowhere else
        assert weights.model(trusted=False) is None
    assert is_same(*built(model, tmp_path, "int4"))


@pytest.mark.slow
def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """Where the files tell it apart from the embedding, it is not tied, whatever the configuration says."""
    case = next(case for case in CASES if case.name == "llama-tied")
    model = random_model(SMALL | case.config, tmp_path / "model")
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    tensors["empty"] = tensors["lm_head.weight"][:0].clone()
    save_file(tensors, path, {"format": "pt"})

    assert is_same(*built(model, tmp_path, "int4"))
