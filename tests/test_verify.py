"""Verification: what ships is what was trained, and whatever else is there is noticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import Sandbox
from edgetune import config, merge
from edgetune.checks import conversion
from edgetune.checks.merge import compare_weights
from edgetune.progress import Progress
from edgetune.project import Project
from edgetune.stages import Job, list_outputs, write_json
from edgetune.tensors import read_folder
from matrix import random_model

CHECKS = ["adapter", "merge", "conversion", "quantisation", "tokens"]


def verdict(project: Sandbox) -> dict[str, Any]:
    """Return what verification wrote down."""
    content: dict[str, Any] = json.loads((project.root / "gen-model/verify.json").read_text(encoding="utf-8"))
    return content


def outcome(project: Sandbox) -> dict[str, bool]:
    """Return whether each check passed, by its name."""
    return {check["name"]: check["passed"] for check in verdict(project)["checks"]}


def failed(project: Sandbox) -> list[str]:
    """Return the names of the checks that failed."""
    return [name for name, passed in outcome(project).items() if not passed]


def model_folders(project: Sandbox) -> set[str]:
    """Return the folders that hold an exported model."""
    return {path.name for path in (project.root / "gen-model").glob("onnx*")}


def flip_a_byte(path: Path) -> None:
    """Change one bit near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-2000] ^= 64
    path.write_bytes(content)


def reseal(folder: Path) -> None:
    """Make a changed folder look like what its stage wrote: a fault of the stage, not of the disk."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_json(folder / "manifest.json", manifest | {"outputs": list_outputs(folder)})


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_make_finetune_publishes_a_model_that_was_proved(tuned: Sandbox) -> None:
    """The five checks pass with numbers, and only the published folder is left."""
    found = verdict(tuned)
    numbers = {check["name"]: check["numbers"] for check in found["checks"]}

    assert outcome(tuned) == dict.fromkeys(CHECKS, True)
    assert found["passed"]
    assert found["model"] == "gen-model/onnx"
    assert model_folders(tuned) == {"onnx"}
    assert numbers["adapter"]["base_loss"] > 1
    assert numbers["adapter"]["adapter_loss"] < 0.1
    assert numbers["merge"]["matrices"] == 6
    assert numbers["merge"]["largest_ulps"] <= 1
    assert numbers["conversion"]["difference"] < 1e-4
    assert numbers["quantisation"]["top1_agreement"] > 0.98
    assert numbers["tokens"]["ended"] == numbers["tokens"]["asked"] == 240


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "merged tensor": ("gen-model/merged/model.safetensors was changed", flip_a_byte),
    "base model": ("model-cache/edgetune/tiny-phi3/model.safetensors is not the locked one", flip_a_byte),
    "adapter": ("gen-model/adapter is gone", shutil.rmtree),
    "an added file": ("gen-model/onnx/added_tokens.json was added", lambda path: path.write_text("{}")),
    "exported weights": ("gen-model/onnx/model.onnx.data was changed", flip_a_byte),
}


@pytest.mark.parametrize("what", CHANGES)
def test_files_that_were_changed_or_dropped(project: Sandbox, what: str) -> None:
    """``edgetune verify`` repairs nothing: exit 3, the file is named, the model set aside; and again the next time."""
    message, change = CHANGES[what]
    change(project.root / message.partition(" ")[0])

    results = [project.run("verify") for _ in range(2)]

    for result in results:
        assert result.returncode == 3, result.stderr
        assert message in result.stderr.replace("onnx.rejected", "onnx")
        assert "the model is set aside in gen-model/onnx.rejected" in result.stderr
        assert result.stdout == ""
    assert model_folders(project) == {"onnx.rejected"}
    assert project.steps()["verify"] == "failed"
    assert project.run("infer", "hello").returncode == 1


def test_a_publication_that_was_interrupted(project: Sandbox) -> None:
    """Killed between two renames, the adapter is not taken for one that is gone."""
    adapter = project.root / "gen-model/adapter"
    shutil.copytree(adapter, adapter.with_name("adapter.old"))
    adapter.rename(adapter.with_name("adapter.partial"))

    result = project.run("verify")

    assert result.returncode == 0, result.stderr
    assert "verify    up to date" in result.stderr
    assert not list(adapter.parent.glob("adapter.*"))


@pytest.mark.slow
def test_fine_tuning_again_repairs_what_was_changed(project: Sandbox) -> None:
    """After a refusal, ``finetune`` makes the damaged result again, verifies, and publishes."""
    exported = project.root / "gen-model/onnx/model.onnx.data"
    before = exported.read_bytes()
    flip_a_byte(exported)
    result = project.run("verify", "--json")
    assert result.returncode == 3, result.stderr

    result = project.run("finetune")

    assert result.returncode == 0, result.stderr
    assert outcome(project) == dict.fromkeys(CHECKS, True), result.stderr
    after = exported.read_bytes()
    assert [place for place in range(len(before)) if after[place] != before[place]] == []
    assert model_folders(project) == {"onnx"}


def test_a_merge_that_went_wrong(project: Sandbox) -> None:
    """A targeted matrix without its adapter, and another tensor that is not the base's, are both named.

    The model that passed before stays published; ``finetune`` with nothing changed says the same again.
    """
    merged, base = project.root / "gen-model/merged", project.root / "model-cache/edgetune/tiny-phi3"
    original = load_file(base / "model.safetensors")
    qkv, norm = "model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"
    change_tensors(merged / "model.safetensors", lambda t: t.update({qkv: original[qkv], norm: t[norm] * 1.01}))
    reseal(merged)

    results = [project.run("finetune") for _ in range(2)]

    for result in results:
        assert result.returncode == 3, result.stderr
        assert f"{qkv} is off by" in result.stderr
        assert f"{norm} is not the base model's" in result.stderr
        assert not {"\r", "\x1b"} & set(result.stderr)
    assert "merge" in failed(project)
    assert model_folders(project) == {"onnx", "onnx.rejected"}
    assert "up to date" in results[1].stderr
    assert "passed:" not in results[1].stderr


@pytest.mark.slow
def test_an_adapter_that_learned_nothing(project: Sandbox) -> None:
    """Zero B matrices and a loss no better than the base model's fail, whatever the export is like."""
    adapter = project.root / "gen-model/adapter"
    change_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name],
    )
    reseal(adapter)

    result = project.run("finetune")

    assert result.returncode == 3
    assert "failed: the adapter learned" in result.stderr
    assert "0 of 6 matrices hold values" in result.stderr
    assert failed(project)[0] == "adapter"
    assert outcome(project)["merge"]


@pytest.mark.slow
def test_an_export_that_lost_too_much(project: Sandbox) -> None:
    """Damaged int4 weights fail by their answers, with the drop and the p-value."""
    exported = project.root / "gen-model/onnx"
    content = bytearray((exported / "model.onnx.data").read_bytes())
    content[1_300_000:1_700_000] = bytes(400_000)
    (exported / "model.onnx.data").write_bytes(content)
    reseal(exported)

    result = project.run("verify")

    assert result.returncode == 3
    assert "quantisation" in failed(project)
    assert "more than noise; a loss of 2 is let through" in result.stderr
    numbers = next(check["numbers"] for check in verdict(project)["checks"] if check["name"] == "quantisation")
    assert numbers["drop"] > 2
    assert numbers["p"] < 0.05


@pytest.mark.slow
def test_limits_are_kept_for_the_same_model(project: Sandbox) -> None:
    """``--rows`` and ``--max-drop`` hold for later runs on the same model; what is up to date is not examined again."""
    first = project.run("verify", "--rows", "16", "--max-drop", "1.5", "--json")
    again = project.run("finetune")

    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["limits"] == {"rows": 16, "max_drop": 1.5}
    assert again.stderr.count("up to date") == 6
    assert verdict(project)["limits"] == {"rows": 16, "max_drop": 1.5}


@pytest.mark.parametrize("value", ["-1", "nan", "much"])
def test_limits_that_make_no_sense(fresh: Sandbox, value: str) -> None:
    """``--max-drop`` takes numbers of 0 or more."""
    result = fresh.run("verify", f"--max-drop={value}")

    assert result.returncode == 2
    assert "is not a number of 0 or more" in result.stderr


# ---------------------------------------------------------------- the merge, element by element


def merged_folders(folder: Path, dtype: torch.dtype, seed: int, scale: float) -> tuple[Path, Path, Path]:
    """Write a base model of three tensors, an adapter for the first, and the merged model."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(12, 8, generator=generator).to(dtype) for name in ("model.a.weight", "model.b.weight")}
    base["model.scale"] = torch.tensor(1.5)
    a, b = (torch.randn(shape, generator=generator) * scale for shape in ((3, 8), (12, 3)))
    folders = folder / "base", folder / "adapter", folder / "merged"
    for path in folders:
        path.mkdir()
    prefix = "base_model.model.model.a"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folders[1] / "adapter_model.safetensors")
    write_json(folders[1] / "adapter_config.json", {"lora_alpha": 6, "r": 3})
    save_file(base, folders[0] / "model.safetensors")
    merged = merge.Update(a, b, 2).applied(base["model.a.weight"]).to(dtype)
    save_file(base | {"model.a.weight": merged}, folders[2] / "model.safetensors")
    return folders


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 1 << 31),
    st.sampled_from([1e-4, 0.1, 1.0]),
    st.integers(0, 95),
)
def test_one_element_that_is_off_is_seen(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, scale: float, at: int
) -> None:
    """What merging makes is right to one unit in the last place; four units away in one element is seen."""
    folders = merged_folders(tmp_path_factory.mktemp("merge"), dtype, seed, scale)

    assert compare_weights(*folders).wrong == []

    def move(tensors: dict[str, torch.Tensor]) -> None:
        flat, original = tensors["model.a.weight"].view(-1), load_file(folders[0] / "model.safetensors")
        magnitude = max(abs(float(flat[at])), abs(float(original["model.a.weight"].view(-1)[at])))
        flat[at] += 4 * torch.finfo(dtype).eps * magnitude

    change_tensors(folders[2] / "model.safetensors", move)
    [wrong] = compare_weights(*folders).wrong
    assert wrong.startswith("model.a.weight is off by")


# ---------------------------------------------------------------- the conversion


@given(st.lists(st.sampled_from("abc")))
def test_prefix_has_every_kind_of_layer(kinds: list[str]) -> None:
    """The prefix holds all kinds, and one layer less would not."""
    length = conversion.prefix_length(kinds)

    assert set(kinds[:length]) == set(kinds)
    assert length == 0 or set(kinds[: length - 1]) != set(kinds)


SMALL = {
    "vocab_size": 5000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 4999,
    "pad_token_id": 4998,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0 + i for i in range(8)]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 8},
    "gemma3_text": {"model_type": "gemma3_text", "num_hidden_layers": 8, "head_dim": 16},
    "mistral": {"model_type": "mistral", "num_hidden_layers": 3, "sliding_window": 128},
    "gemma2": {"model_type": "gemma2", "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 1024},
    "phi3": {
        "model_type": "phi3",
        "num_hidden_layers": 3,
        "original_max_position_embeddings": 300,
        "rope_scaling": {"type": "longrope", **FACTORS},
    },
    "olmo": {"model_type": "olmo", "num_hidden_layers": 2, "num_key_value_heads": 4},
}


@pytest.mark.parametrize(("name", "layers"), [("smollm3", 4), ("gemma3_text", 6)])
def test_layers_of_all_kinds(tmp_path: Path, name: str, layers: int) -> None:
    """SmolLM3's fourth layer has no position encoding; the sixth of Gemma 3 sees the whole text."""
    model = random_model(SMALL | ARCHITECTURES[name], tmp_path / name)

    kinds = conversion.layer_kinds(model, read_folder(model), trusted=False)

    assert conversion.prefix_length(kinds) == layers


def convert(project: Path, model: Path, work: Path) -> conversion.ConversionFindings:
    """Compare a model with its export as verification does."""
    job = Job.start(Project(project), config.load(Project(project)), Progress(work / "events.jsonl"))
    with job.progress.running("verify", work / "log"):
        return conversion.compare_conversion(job, model, work / "prefix")


@pytest.mark.parametrize(
    ("name", "layers", "longest"), [("mistral", 1, 256), ("gemma2", 2, 256), ("phi3", 1, 364), ("olmo", 1, 256)]
)
def test_conversion_of_architectures(rendered: Sandbox, tmp_path: Path, name: str, layers: int, longest: int) -> None:
    """One layer of each kind is compared, and beyond what a stretched position encoding began with.

    OLMo, which the builder gets wrong without a word, is noticed.
    """
    found = convert(rendered.root, random_model(SMALL | ARCHITECTURES[name], tmp_path / name), tmp_path)

    assert (found.layers, found.longest) == (layers, longest)
    assert (found.difference > 1e-3) == (name == "olmo")
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_conversion_beyond_a_sliding_window(fresh: Sandbox, tmp_path: Path, name: str) -> None:
    """Texts are longer than the window if the exported model reads such, and there Gemma 2 is right as well."""
    fresh.edit(lambda c: c["passes"]["builder"]["search"].update(max_length=2048))
    model = random_model(SMALL | ARCHITECTURES[name], tmp_path / name)
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"sliding_window": 300}))

    found = convert(fresh.root, model, tmp_path)

    assert found.longest == 364
    assert found.difference < 1e-3
