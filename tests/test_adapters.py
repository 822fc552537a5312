"""An adapter that is not merged stays beside the exported model, and others can take its place."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file

import matrix
from conftest import Sandbox
from edgetune import config, workflow
from edgetune.adapter_inputs import add_inputs
from edgetune.adapters import read, tensors
from edgetune.checks.conversion import compare_conversion
from edgetune.errors import EdgetuneError
from edgetune.export import source_folder
from edgetune.merge import Adapter
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.stages import Job, list_outputs, write_json
from edgetune.tensors import read_folder

WIDTHS = {"q_proj": 6, "k_proj": 4, "v_proj": 4, "qkv_proj": 14, "o_proj": 5, "gate_proj": 7, "up_proj": 7}
WIDTH = 8  # of what comes in
BLOCK = {name: "mlp" if name in ("gate_proj", "up_proj") else "attn" for name in WIDTHS}
TONE = "what a day"


def without_merge(config: dict[str, Any]) -> None:
    """Leave the adapter beside the exported model."""
    del config["passes"]["merge_adapter_weights"]


def write_adapter(folder: Path, modules: Mapping[str, tuple[int, ...]], rank: int = 2) -> Adapter:
    """Write an adapter like PEFT's with random matrices for modules of these shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, found = torch.Generator().manual_seed(rank), {}
    for module, (rows, columns) in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 10
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 10
    save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": rank}), encoding="utf-8")
    return Adapter(folder)


def write_products(path: Path, names: list[str]) -> dict[str, Any]:
    """Write an ONNX model of products as the builder names them; return their matrices."""
    nodes, values, outputs = [], [], []
    weights: dict[str, Any] = {}
    for name in names:
        stem = f"/model/layers.0/{BLOCK[name]}/{name}/MatMul"
        weights[name] = np.random.default_rng(len(weights)).standard_normal((WIDTH, WIDTHS[name])).astype("float32")
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{stem}/output_0"], name=stem))
        nodes.append(helper.make_node("Identity", [f"{stem}/output_0"], [f"{name}_out"]))
        values.append(helper.make_tensor_value_info(f"{stem}/output_0", 1, ["length", WIDTHS[name]]))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", 1, ["length", WIDTHS[name]]))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", 1, ["length", WIDTH])],
        outputs,
        [helper.make_tensor(name, 1, weight.shape, weight.tobytes(), raw=True) for name, weight in weights.items()],
        value_info=values,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return weights


@pytest.mark.parametrize(
    ("modules", "products"),
    [
        (["self_attn.q_proj", "self_attn.v_proj"], ["q_proj", "k_proj", "v_proj"]),
        (["self_attn.qkv_proj", "self_attn.o_proj"], ["qkv_proj", "o_proj"]),
        (["self_attn.qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
        (["mlp.gate_up_proj"], ["gate_proj", "up_proj"]),
    ],
)
def test_an_adapter_of_any_rank_adds_to_the_products(tmp_path: Path, modules: list[str], products: list[str]) -> None:
    """x·W becomes x·W + s·x·A·B, in parts where a matrix has parts; without an adapter it stays x·W."""
    widths = {"gate_up_proj": 14} | WIDTHS
    wanted = {f"model.layers.0.{module}": (widths[module.partition(".")[2]], WIDTH) for module in modules}
    weights = write_products(tmp_path / "model.onnx", products)
    add_inputs(tmp_path / "model.onnx", one := write_adapter(tmp_path / "one", wanted), sorted(one.names))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = np.random.default_rng(9).standard_normal((3, WIDTH)).astype("float32")

    def outputs(adapter: Adapter | None) -> dict[str, Any]:
        given = tensors(adapter, sorted(adapter.names)) if adapter else {}
        return dict(zip(products, session.run(None, {"x": x} | given), strict=True))

    plain = {name: x @ weight for name, weight in weights.items()}
    for name, output in outputs(None).items():
        np.testing.assert_allclose(output, plain[name], atol=1e-5)
    for adapter in (one, write_adapter(tmp_path / "two", wanted, rank=3)):
        added = {name: x @ (adapter[f"{name}.weight"].b @ adapter[f"{name}.weight"].a).numpy().T for name in wanted}
        scale = 6 / len(adapter[f"{next(iter(wanted))}.weight"].a)
        expected = np.concatenate([plain[name] for name in products], axis=-1)
        place = 0
        for name in products:
            whole = next((w for w in wanted if w.endswith(f".{name}")), None)
            if whole:
                expected[:, place : place + WIDTHS[name]] += scale * added[whole]
            place += WIDTHS[name]
        if len(wanted) == 1 and len(products) > 1:
            expected += scale * next(iter(added.values()))
        np.testing.assert_allclose(np.concatenate(list(outputs(adapter).values()), axis=-1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "width", "why"),
    [("model.layers.0.self_attn.o_proj", 6, "6 rows"), ("model.layers.0.conv.in_proj", 5, "no product of its own")],
)
def test_an_adapter_that_cannot_stay_beside(tmp_path: Path, module: str, width: int, why: str) -> None:
    """The error names the matrix, the reason, and the merge."""
    write_products(tmp_path / "model.onnx", ["o_proj"])
    adapter = write_adapter(tmp_path / "adapter", {module: (width, WIDTH)})

    with pytest.raises(EdgetuneError, match=why) as caught:
        add_inputs(tmp_path / "model.onnx", adapter, sorted(adapter.names))

    assert module in caught.value.problems[0].message
    assert "MergeAdapterWeights" in caught.value.problems[0].hint


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3-longrope-saved", "llama", "qwen2", "qwen3", "gemma3", "phi"])
def test_architectures_with_an_adapter_beside(fresh: Sandbox, name: str) -> None:
    """In fp32, exported layers with an adapter beside them calculate what transformers does with it merged."""
    case = next(case for case in matrix.CASES if case.name == name)
    published = matrix.random_model(matrix.SMALL | case.config, fresh.root.parent / "published")

    def change(config: dict[str, Any]) -> None:
        without_merge(config)
        config["input_model"]["model_path"] = f"../model-cache/acme/{name}"
        config["passes"]["lora"]["target_modules"] = list(case.modules)

    fresh.edit(change)
    project = Project(fresh.root)
    job = Job.start(project, config.load(project), Progress(project.events))
    workflow.run(job, "download", source=published)
    tails = tuple(f".{module}.weight" for module in case.modules)
    shapes = {n: tensor.shape for n, tensor in read_folder(job.base_folder).items() if n.endswith(tails)}
    write_adapter(project.stage_folder("train"), {n.removesuffix(".weight"): shape for n, shape in shapes.items()})

    with job.progress.running("verify", project.log("verify")):
        found = compare_conversion(job, source_folder(job), fresh.root / "prefix")

    assert len(shapes) == len(case.modules) * found.of_layers
    assert found.difference < 1e-3


def test_modules_that_have_to_be_merged(fresh: Sandbox) -> None:
    """A module that the exported model cannot have beside it is refused at its line, before anything is trained."""
    fresh.edit(without_merge)
    fresh.edit(lambda config: config["passes"]["lora"].update(target_modules=["o_proj", "lm_head"]))

    result = fresh.run("status")

    assert result.returncode == 1
    assert "lm_head cannot stay beside the exported model" in result.stderr
    assert "olive-config.json:" in result.stderr


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"precision": "int4", "use_cuda_bf16": True}])
def test_no_adapters_in_bfloat16(fresh: Sandbox, settings: dict[str, Any]) -> None:
    """The format of adapter files has no such numbers here; that is said before anything is trained."""

    def change(config: dict[str, Any]) -> None:
        without_merge(config)
        builder = config["passes"]["builder"]
        config["passes"]["builder"] = {"type": "ModelBuilder", "search": builder["search"]} | settings
        config["systems"]["local_system"]["accelerators"] = [
            {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}
        ]

    fresh.edit(change)
    result = fresh.run("status")

    assert result.returncode == 1
    assert "beside a model in bfloat16" in result.stderr


def test_without_the_merge_there_is_nothing_merged(fresh: Sandbox) -> None:
    """The step and the backend say so, and ``status`` leaves the step out."""
    fresh.edit(without_merge)

    assert list(fresh.steps()) == ["download", "data", "train", "export", "verify"]
    merge, asked = fresh.run("merge"), fresh.run("infer", "--backend", "merged", TONE)
    assert (merge.returncode, asked.returncode) == (1, 1)
    assert "no MergeAdapterWeights pass" in merge.stderr
    assert "no MergeAdapterWeights pass" in asked.stderr


def test_an_adapter_is_for_the_exported_model(fresh: Sandbox) -> None:
    """With another backend it is a usage error."""
    result = fresh.run("infer", "--backend", "base", "--adapter", "other", TONE)

    assert result.returncode == 2
    assert "--adapter is for --backend onnx" in result.stderr


def test_a_merged_model_takes_no_adapters(project: Sandbox) -> None:
    """Asking for one, or adding one, says what to change."""
    other = shutil.copytree(project.root, project.root.parent / "other")
    for command in (["infer", "--adapter", "other", TONE], ["adapters"], ["adapters", "--add", str(other)]):
        result = project.run(*command)

        assert result.returncode == 1
        assert "the exported model takes no adapters" in result.stderr
        assert "remove the MergeAdapterWeights pass" in result.stderr


def test_a_project_is_not_its_own_other(project: Sandbox) -> None:
    """A path that leads to the project itself, or nowhere, adds nothing."""
    for path in (".", "not-there"):
        result = project.run("adapters", "--add", path)

        assert result.returncode == 1
        assert "this is no other project" in result.stderr


@pytest.fixture(scope="module")
def beside(tuned: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Export a fine-tuned project again, with its adapter beside the model. Not to be changed by tests."""
    sandbox = Sandbox(shutil.copytree(tuned.root, tmp_path_factory.mktemp("beside") / "tones"))
    sandbox.edit(without_merge)
    result = sandbox.run("finetune")
    assert result.returncode == 0, result.stderr
    assert "train     up to date" in result.stderr
    return sandbox


@pytest.fixture
def apart(beside: Sandbox, tmp_path: Path) -> Sandbox:
    """Copy that project, to be changed at will."""
    return Sandbox(shutil.copytree(beside.root, tmp_path / "my slm"))


def other_project(like: Sandbox, root: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Sandbox:
    """Copy a project, and change what its adapter holds."""
    other = Sandbox(shutil.copytree(like.root, root))
    path = root / "gen-model/adapter/adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    reseal(path.parent)
    return other


def reseal(folder: Path) -> None:
    """Make a changed folder look like what its stage wrote."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_json(folder / "manifest.json", manifest | {"outputs": list_outputs(folder)})


def answers(project: Sandbox, *options: str) -> list[str]:
    """Ask the prompts of the project."""
    result = project.run("infer", "--prompts", "inferences/prompts.jsonl", "--json", *options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["answer"] for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_base_and_adapter_are_proved_like_a_merged_model(beside: Sandbox, tuned: Sandbox) -> None:
    """The five checks pass, the model answers as the merged one does, and an adapter is small beside the model."""
    found = json.loads((beside.root / "gen-model/verify.json").read_text(encoding="utf-8"))
    numbers = {check["name"]: check["numbers"] for check in found["checks"]}
    model = beside.root / "gen-model/onnx"

    assert [check["passed"] for check in found["checks"]] == [True] * 5
    assert numbers["conversion"]["difference"] < 1e-4
    assert numbers["merge"] == {"matrices": 6, "wrong": 0}
    assert numbers["quantisation"]["onnx_accuracy"] > 0.9
    assert (model / "adapters/default.onnx_adapter").stat().st_size < (model / "model.onnx.data").stat().st_size / 2
    assert answers(beside) == answers(tuned)


@pytest.mark.slow
def test_an_adapter_of_another_project_takes_its_place(apart: Sandbox, tmp_path: Path) -> None:
    """Nothing is exported again; each name gives its answers; one that learned nothing answers as the base model."""
    other = other_project(apart, tmp_path / "forgetful", lambda weights: [w.zero_() for w in weights.values()])
    before = (apart.root / "gen-model/onnx/model.onnx").stat().st_mtime_ns

    added = apart.run("adapters", "--add", str(other.root))

    assert added.returncode == 0, added.stderr
    assert "warning" not in added.stderr
    listed = json.loads(apart.run("adapters", "--json").stdout)
    assert [(one["name"], one["ranks"], one["fault"]) for one in listed] == [
        ("default", [64], ""),
        ("forgetful", [64], ""),
    ]
    own, forgetful = answers(apart), answers(apart, "--adapter", "forgetful")
    assert answers(apart, "--adapter", "default") == own
    assert not set(own) & set(forgetful)
    assert (apart.root / "inferences/outputs-onnx-forgetful.jsonl").is_file()
    assert (apart.root / "gen-model/onnx/model.onnx").stat().st_mtime_ns == before
    missing = apart.run("infer", "--adapter", "nobody", TONE)
    assert missing.returncode == 1
    assert "there is default, forgetful" in missing.stderr

    other.edit(lambda c: c["passes"]["lora"]["training_args"].update(learning_rate=1e-4))
    again = apart.run("adapters", "--add", str(other.root))
    assert "it is older than its own project (train: changed: " in again.stderr


@pytest.mark.slow
def test_adapters_that_do_not_belong(apart: Sandbox, tmp_path: Path) -> None:
    """Another base model, other modules, no adapter at all, and a file that says nothing of its base are refused."""
    other = Sandbox(shutil.copytree(apart.root, tmp_path / "other"))
    manifest = other.root / "gen-model/adapter/manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))

    def refusal(*command: str) -> str:
        result = apart.run(*command)
        assert result.returncode == 1
        assert not list((apart.root / "gen-model/adapters").glob("other*"))
        return result.stderr

    base = content["inputs"]["base"] | {"model.safetensors": "0" * 64}
    changed = content | {"inputs": content["inputs"] | {"base": base}}
    manifest.write_text(json.dumps(changed), encoding="utf-8")
    assert "trained on another base model" in refusal("adapters", "--add", str(other.root))

    manifest.write_text(json.dumps(content), encoding="utf-8")
    path = other.root / "gen-model/adapter/adapter_model.safetensors"
    weights = {name.replace("self_attn.o_proj", "mlp.down_proj"): w for name, w in load_file(path).items()}
    save_file(weights, path)
    assert "was changed or removed" in refusal("adapters", "--add", str(other.root))
    reseal(path.parent)
    assert "which the exported model has no input for" in refusal("adapters", "--add", str(other.root))
    for name in ("default", "../x", "/x", "a\\b", ".."):
        assert f"cannot be called {name!r}" in refusal("adapters", "--add", str(other.root), "--name", name)
    shutil.rmtree(other.root / "gen-model/adapter")
    assert "no trained adapter" in refusal("adapters", "--add", str(other.root))

    shelf = apart.root / "gen-model/adapters"
    shelf.mkdir(exist_ok=True)
    own = apart.root / "gen-model/onnx/adapters/default.onnx_adapter"
    shutil.copyfile(own, shelf / "copied.onnx_adapter")
    assert answers(apart, "--adapter", "copied") == answers(apart)
    _, matrices = read(own)
    nameless = onnxruntime.AdapterFormat()
    nameless.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(m) for n, m in matrices.items()})
    nameless.export_adapter(str(shelf / "nameless.onnx_adapter"))
    assert "does not say that it belongs to the base model" in refusal("infer", "--adapter", "nameless", TONE)
    (shelf / "nameless.onnx_adapter").write_bytes(b"something else")
    assert "no adapter for ONNX Runtime" in refusal("infer", "--adapter", "nameless", TONE)


@pytest.mark.slow
def test_an_adapter_file_that_is_not_the_trained_one(apart: Sandbox) -> None:
    """Verification compares the file with what was trained."""
    folder = apart.root / "gen-model/onnx"
    path = folder / "adapters/default.onnx_adapter"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)

    result = apart.run("verify")

    assert result.returncode == 3
    assert "adapters/default.onnx_adapter was changed" in result.stderr
