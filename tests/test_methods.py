"""LoRA is what the other tests run; here are QLoRA, DoRA, and no fine-tuning at all."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import Sandbox
from edgetune.checks.merge import compare_weights
from edgetune.four_bits import rounded, scales
from edgetune.merge import Update, write_merged
from edgetune.quantised import Quantisation
from edgetune.stages import read_manifest, sha256

STEPS = {
    "qlora": ["download", "data", "train", "merge", "export", "verify"],
    "none": ["download", "data", "export", "verify"],
}


def tuning_pass(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fine-tuning pass of a workflow."""
    return dict(next(iter(config["passes"].values())))


def shorten(config: dict[str, Any], **values: Any) -> None:
    """Let a project train a third of its epochs, and change what else is given."""
    step = next(iter(config["passes"].values()))
    step["training_args"]["num_train_epochs"] = 1
    step |= values


@pytest.fixture(scope="module")
def methods(render: Callable[..., Sandbox]) -> dict[str, Sandbox]:
    """Render a project for two methods. Not to be changed by tests."""
    return {method: render(method=method) for method in STEPS}


@pytest.fixture
def untuned(methods: dict[str, Sandbox], tmp_path: Path) -> Sandbox:
    """Copy the project without fine-tuning."""
    return Sandbox(shutil.copytree(methods["none"].root, tmp_path / "my slm"))


@pytest.mark.parametrize("method", STEPS)
def test_steps_of_a_method(methods: dict[str, Sandbox], method: str) -> None:
    """Without fine-tuning there is nothing to train and to merge."""
    assert list(methods[method].steps()) == STEPS[method]


def test_qlora_has_the_parameters_of_the_cookbook(methods: dict[str, Sandbox]) -> None:
    """NF4 with double quantisation, rank 64, and every linear layer by its name."""
    qlora = tuning_pass(json.loads(methods["qlora"].config.read_text(encoding="utf-8")))

    assert qlora["type"] == "QLoRA"
    assert (qlora["quant_type"], qlora["double_quant"], qlora["r"], qlora["alpha"]) == ("nf4", True, 64, 64)
    assert sorted(qlora["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.parametrize("command", ["train", "merge"])
def test_nothing_to_train(untuned: Sandbox, command: str) -> None:
    """The single steps say that the workflow has no such pass."""
    result = untuned.run(command)

    assert result.returncode == 1
    assert f"there is nothing to {command}: the workflow has no fine-tuning pass" in result.stderr
    assert "olive-config.json:" in result.stderr


@pytest.mark.parametrize("backend", ["adapter", "merged"])
def test_backends_that_need_an_adapter(untuned: Sandbox, backend: str) -> None:
    """Asking them is an error that says why."""
    result = untuned.run("infer", "--backend", backend, "what a day")

    assert result.returncode == 1
    assert f"there is no {backend} model: the workflow has no fine-tuning pass" in result.stderr
    assert "--backend base or onnx" in result.stderr


@pytest.mark.parametrize(
    ("passes", "refused"),
    [
        (["LoRA", "ModelBuilder"], False),
        (["QLoRA", "ModelBuilder"], True),
        (["DoRA", "ModelBuilder"], True),
        (["MergeAdapterWeights", "ModelBuilder"], True),
        (["LoRA", "QLoRA", "MergeAdapterWeights", "ModelBuilder"], True),
        (["ModelBuilder"], False),
        (["DoRA", "MergeAdapterWeights", "ModelBuilder"], False),
    ],
)
def test_orders_of_passes(fresh: Sandbox, passes: list[str], refused: bool) -> None:  # noqa: FBT001 - a table
    """A fine-tuning pass is followed by the merge, and there is one of them, or none."""

    def change(config: dict[str, Any]) -> None:
        lora = tuning_pass(config)
        bodies = {"MergeAdapterWeights": {}, "ModelBuilder": config["passes"]["builder"]}
        config["passes"] = {f"p{at}": {**bodies.get(kind, lora), "type": kind} for at, kind in enumerate(passes)}

    fresh.edit(change)
    result = fresh.run("status")

    assert result.returncode == (1 if refused else 0)
    assert ("does not run these passes" in result.stderr) == refused


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_type", "int4"), ("compute_dtype", "float16"), ("save_quant_config", False), ("use_rslora", True)],
)
def test_keys_of_qlora_that_are_not_honoured(
    methods: dict[str, Sandbox], tmp_path: Path, key: str, value: object
) -> None:
    """They are errors with their line, not silently dropped."""
    project = Sandbox(shutil.copytree(methods["qlora"].root, tmp_path / "my slm"))
    project.edit(lambda config: config["passes"]["qlora"].update({key: value}))

    result = project.run("status")

    assert result.returncode == 1
    assert key in result.stderr
    assert "olive-config.json:" in result.stderr


@given(st.integers(0, 1 << 31), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_merging_is_what_peft_does(seed: int, dtype: torch.dtype, dora: bool) -> None:  # noqa: FBT001 - drawn
    """The merged matrix is that of PEFT's ``merge_and_unload`` within the rounding of the weights' type."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    linear = torch.nn.Linear(12, 20, bias=False).to(dtype)
    weight = linear.weight.detach().clone()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=dora)
    model: Any = get_peft_model(torch.nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    for part in (layer.lora_B["default"].weight, *(p.weight for p in layer.lora_magnitude_vector.values())):
        torch.nn.init.normal_(part.data, std=0.3)
    a, b = (getattr(layer, name)["default"].weight.detach().clone() for name in ("lora_A", "lora_B"))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone() if dora else None

    ours = Update(a, b, 2.0, magnitude).applied(weight).to(dtype)
    theirs = model.merge_and_unload()[0].weight

    # PEFT rounds BA and the scaled rows as well, we round once.
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def through_four_bits(weight: torch.Tensor, quantisation: Quantisation) -> torch.Tensor:
    """Return a weight as bitsandbytes gives it back, the whole matrix at once."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(getattr(torch, quantisation.dtype)),
        quant_type=quantisation.quant_type,
        compress_statistics=quantisation.double_quant,
    )
    result: torch.Tensor = functional.dequantize_4bit(packed, state)
    return result


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(2, 70), st.integers(1, 35).map(lambda half: 2 * half)),  # the others it takes another way
    st.sampled_from([0.0, 1e-42, 1e-6, 0.02, 3000.0]),
    st.integers(0, 2**31),
)
def test_four_bits_are_those_of_bitsandbytes(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, int], size: float, seed: int
) -> None:
    """Exactly those, for weights on the boundaries between two numbers and blocks without any values as well."""
    from bitsandbytes.functional import get_4bit_type

    source = torch.Generator().manual_seed(seed)
    numbers = get_4bit_type(quant_type, device="cpu").sort().values  # type: ignore[no-untyped-call]
    special = torch.cat([numbers, (numbers[:-1] + numbers[1:]) / 2, torch.tensor([-1.0, 1.0, 0.0])])
    drawn = special[torch.randint(len(special), shape, generator=source)]
    drawn = torch.where(torch.rand(shape, generator=source) < 0.5, drawn, torch.randn(shape, generator=source))
    weight = (drawn * size).to(dtype)

    found = rounded(weight, scales(weight), quant_type)

    name = str(dtype).removeprefix("torch.")
    expected = through_four_bits(weight, Quantisation(quant_type=quant_type, dtype=name))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "QLoRA", "QLoRA twice"])
def test_merging_some_rows_at_a_time(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """It gives what the whole matrices give, in the base model's files; what has no adapter keeps its bytes."""
    torch.manual_seed(0)
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    for folder in (base, adapter, merged):
        folder.mkdir()
    shapes = {"a": (2100, 640), "b": (130, 66)}  # the first takes more than one slice, the second no whole blocks
    weights = {f"model.{name}.weight": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    rest = {"model.norm": torch.randn(640).to(dtype), "model.step": torch.tensor(3)}
    for number, (name, weight) in enumerate(weights.items()):
        save_file({name: weight} | (rest if number else {}), base / f"model-{number}.safetensors", {"format": "pt"})
    lora: dict[str, torch.Tensor] = {}
    updates = {}
    for name, shape in shapes.items():
        a, b = torch.randn(4, shape[1]) * 0.1, torch.randn(shape[0], 4) * 0.1
        magnitude = torch.rand(shape[0]) + 1 if method == "DoRA" else None
        updates[f"model.{name}.weight"] = Update(a, b, 2.0, magnitude)
        parts = {"A.weight": a, "B.weight": b, "magnitude_vector": magnitude}
        lora |= {f"base_model.model.model.{name}.lora_{key}": part for key, part in parts.items() if part is not None}
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}), encoding="utf-8")
    seen = weights
    if method.startswith("QLoRA"):
        name = str(dtype).removeprefix("torch.")
        quantisation = Quantisation(dtype=name, double_quant="twice" in method, modules=("model.a", "model.b"))
        quantisation.write(adapter)
        seen = {name: through_four_bits(weight, quantisation) for name, weight in weights.items()}

    digests = dict(write_merged(base, adapter, merged, lambda _done, _total: None))

    assert digests == {path: sha256(path) for path in merged.iterdir()}
    found = load_file(merged / "model-0.safetensors") | load_file(merged / "model-1.safetensors")
    for name, update in updates.items():
        torch.testing.assert_close(
            found[name], update.applied(seen[name]).to(dtype), rtol=torch.finfo(dtype).eps, atol=0
        )
    assert all(torch.equal(found[name], tensor) for name, tensor in rest.items())
    assert found.keys() == weights.keys() | rest.keys()
    assert compare_weights(base, adapter, merged).wrong == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
def test_merging_takes_little_memory(tmp_path: Path) -> None:
    """A matrix of 240 MB is merged and checked in much less than that."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    for folder in (base, adapter, merged):
        folder.mkdir()
    rows, size = 60_000, 240_000_000
    entry = {"dtype": "BF16", "shape": [rows, 2000], "data_offsets": [0, size]}
    header = json.dumps({"model.a.weight": entry}).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # zeros that take no disk
    prefix = "base_model.model.model.a.lora_"
    lora = {f"{prefix}A.weight": torch.ones(2, 2000), f"{prefix}B.weight": torch.ones(rows, 2)}
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 2}), encoding="utf-8")

    script = """
import sys, torch
from pathlib import Path
from edgetune.checks.merge import compare_weights
from edgetune.four_bits import rounded, scales
from edgetune.merge import write_merged
from edgetune.memory import peak_memory_mb, reset_peak_memory
base, adapter, merged = map(Path, sys.argv[1:])
reset_peak_memory()
before = peak_memory_mb()
list(write_merged(base, adapter, merged, lambda done, total: None))
assert compare_weights(base, adapter, merged).wrong == []
print(peak_memory_mb() - before)
"""
    command = [sys.executable, "-c", script, *map(str, (base, adapter, merged))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    assert float(result.stdout) < 150


def test_weights_that_qlora_saw_in_four_bits(tmp_path: Path) -> None:
    """The merged model has them as training saw them, also those that no adapter is on; the stored ones are wrong."""
    torch.manual_seed(0)
    weights = {f"model.{name}.weight": torch.randn(64, 64).to(torch.bfloat16) for name in "ab"}
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    for folder in (base, adapter, merged):
        folder.mkdir()
    parts = {"A": torch.randn(4, 64), "B": torch.randn(64, 4)}
    lora = {f"base_model.model.model.a.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 4}), encoding="utf-8")
    quantisation = Quantisation(dtype="float32", double_quant=True, modules=("model.a", "model.b"))
    quantisation.write(adapter)
    seen = {name: through_four_bits(weight, quantisation) for name, weight in weights.items()}
    right = {
        "model.a.weight": seen["model.a.weight"] + parts["B"] @ parts["A"],
        "model.b.weight": seen["model.b.weight"],
    }
    right = {name: weight.to(torch.bfloat16) for name, weight in right.items()}
    save_file(weights, base / "model.safetensors")

    save_file(right, merged / "model.safetensors")
    assert compare_weights(base, adapter, merged).wrong == []

    save_file(right | {"model.b.weight": weights["model.b.weight"]}, merged / "model.safetensors")
    assert compare_weights(base, adapter, merged).wrong == ["model.b.weight is not the base model's"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "matrices"), [("qlora", 12), ("dora", 6)])
def test_a_method_from_data_to_answers(render: Callable[..., Sandbox], method: str, matrices: int) -> None:
    """Trained, merged, exported to int4, verified, measured and asked."""
    project = render(method=method)
    project.edit(shorten)

    result = project.run("finetune")

    assert result.returncode == 0, result.stderr
    assert f"{matrices} of {matrices} matrices hold values" in result.stderr
    manifest = read_manifest(project.root / "gen-model/merged")
    assert manifest is not None
    assert manifest["metrics"]["merged_matrices"] == matrices
    measured = json.loads(project.run("evaluate", "--json", "--limit", "60").stdout)
    accuracy = {name: backend["metrics"]["accuracy"] for name, backend in measured["backends"].items()}
    assert accuracy["base"] < 0.4
    assert min(accuracy[name] for name in ("adapter", "merged", "onnx")) > 0.6
    again = project.run("finetune")
    assert "train     up to date" in again.stderr
    assert "verify    up to date" in again.stderr


@pytest.mark.slow
def test_base_model_without_fine_tuning(untuned: Sandbox) -> None:
    """It is exported and verified; what needs an adapter reads n/a; two models are measured; it can be packed."""
    result = untuned.run("finetune")

    assert result.returncode == 0, result.stderr
    assert "n/a: the adapter learned" in result.stderr
    assert "n/a: the merge is exact" in result.stderr
    assert not (untuned.root / "gen-model/merged").exists()
    assert list(json.loads(untuned.run("evaluate", "--json", "--limit", "20").stdout)["backends"]) == ["base", "onnx"]
    assert untuned.run("report").returncode == 0
    report = (untuned.root / "gen-model/report/report.md").read_text(encoding="utf-8")
    assert "the base model is exported as it is" in report
    assert untuned.run("package").returncode == 0
    card = (untuned.root / "gen-model/package/README.md").read_text(encoding="utf-8")
    assert "fine-tuned" not in card
    assert "was trained" not in card
    assert untuned.run("finetune").stderr.count("up to date") == 4


def test_target_module_of_one_layer_only(fresh: Sandbox) -> None:
    """A name that leaves layers out without a word is refused, with the name that does not."""
    fresh.edit(lambda config: config["passes"]["lora"].update(target_modules=["layers.0.self_attn.qkv_proj"]))

    result = fresh.run("train")

    assert result.returncode == 1
    assert "'layers.0.self_attn.qkv_proj' matches 1 of the 3 layers 'qkv_proj'" in result.stderr
    assert "write 'qkv_proj'" in result.stderr


def test_best_checkpoint_needs_evaluation_data(fresh: Sandbox) -> None:
    """Nothing else could tell which checkpoint is the best."""

    def change(config: dict[str, Any]) -> None:
        del config["passes"]["lora"]["eval_data_config"]
        config["passes"]["lora"]["training_args"]["load_best_model_at_end"] = True

    fresh.edit(change)
    result = fresh.run("train")

    assert result.returncode == 1
    assert "there are no evaluation data to tell which is best" in result.stderr


@pytest.mark.slow
def test_best_checkpoint_is_the_one_that_is_published(fresh: Sandbox) -> None:
    """With ``load_best_model_at_end``, a run that gets worse again gives the adapter of its best evaluation."""
    fresh.edit(
        lambda config: config["passes"]["lora"]["training_args"].update(
            load_best_model_at_end=True,
            learning_rate=0.03,
            lr_scheduler_type="linear",
            max_grad_norm=0,
            max_steps=24,
            warmup_steps=12,
            eval_strategy="steps",
            eval_steps=4,
        )
    )
    assert fresh.run("train").returncode == 0
    log = json.loads((fresh.root / "gen-model/adapter/loss.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}

    fresh.run("verify")  # whatever it thinks of such a model

    verdict = json.loads((fresh.root / "gen-model/verify.json").read_text(encoding="utf-8"))
    loss = next(check["numbers"]["adapter_loss"] for check in verdict["checks"] if check["name"] == "adapter")
    assert len(losses) == 6
    assert loss == pytest.approx(min(losses.values()), rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_strategy": "no"}, "nothing is evaluated"),
        ({"metric_for_best_model": "accuracy"}, "training measures the loss only"),
    ],
)
def test_best_checkpoint_that_cannot_be_told(fresh: Sandbox, arguments: dict[str, str], message: str) -> None:
    """A run that could not tell which checkpoint is best does not begin."""
    fresh.edit(
        lambda config: config["passes"]["lora"]["training_args"].update(load_best_model_at_end=True, **arguments)
    )

    result = fresh.run("train")

    assert result.returncode == 1
    assert message in result.stderr


def test_evaluation_data_can_be_split_off_without_a_pass(untuned: Sandbox) -> None:
    """What evaluation advises when there are no data for it works without a fine-tuning pass too."""
    untuned.edit(lambda config: config["data_configs"].pop())
    assert "--write-split" in untuned.run("evaluate").stderr

    result = untuned.run("data", "--write-split", "0.1")

    assert result.returncode == 0, result.stderr
    assert [data["name"] for data in json.loads(untuned.config.read_text())["data_configs"]] == [
        "train_data",
        "eval_data",
    ]
