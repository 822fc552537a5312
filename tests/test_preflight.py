"""Preflight says what the steps will take, chooses what is left open, and refuses what cannot work."""

import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import matrix
import memory_tables
from conftest import Sandbox
from edgetune import preflight
from edgetune.batches import BUDGET
from edgetune.estimate import DISK, MEMORY, Method, Plan, Shape, train_memory
from edgetune.project import BUILTIN_MODELS
from hub_server import HubServer

TINY = BUILTIN_MODELS["edgetune/tiny-phi3"]
MEASURED = memory_tables.comparisons()
ERROR = 1.15
"""What docs/memory.md promises for the measured cases."""
HUGE = {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248}


def shapes() -> st.SearchStrategy[Shape]:
    """Return base models between a toy and a large one."""
    return st.builds(
        lambda heads, layers, vocabulary, tied: Shape(
            64 * heads, layers, heads, max(heads // 4, 1), 64, 256 * heads, vocabulary, tied, "bfloat16"
        ),
        heads=st.integers(1, 64),
        layers=st.integers(2, 80),
        vocabulary=st.integers(1000, 300_000),
        tied=st.booleans(),
    )


def plans() -> st.SearchStrategy[Plan]:
    """Return plans for training."""
    methods: list[Method] = ["LoRA", "QLoRA"]
    return st.builds(
        Plan,
        shape=shapes(),
        method=st.sampled_from(methods),
        dtype=st.sampled_from(["bfloat16", "float32"]),
        r=st.integers(1, 256),
        targets=st.sampled_from([("q_proj", "v_proj"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")]),
        dropout=st.booleans(),
        batch=st.integers(1, 64),
        accumulation=st.integers(1, 8),
        checkpointing=st.booleans(),
        longest=st.integers(2, 4096),
    )


@given(plans(), st.sampled_from(["batch", "longest", "r"]), st.integers(1, 100))
def test_more_to_do_never_takes_less(plan: Plan, name: str, more: int) -> None:
    """Longer rows or a larger adapter take more memory, more rows do up to a micro-batch; an adapter takes disk."""
    larger = dataclasses.replace(plan, **{name: getattr(plan, name) + more})
    assert train_memory(larger) >= train_memory(plan)
    full = plan.batch * plan.accumulation * plan.longest >= BUDGET
    if plan.dtype == "bfloat16":  # float32 may be at its peak while the weights are read
        grows = name == "r" or (larger.longest > max(plan.longest, BUDGET) if full else True)
        assert (train_memory(larger) > train_memory(plan)) == grows
    assert DISK["train"](larger) >= DISK["train"](plan)


@given(plans())
def test_alternatives_keep_the_effective_batch(plan: Plan) -> None:
    """All settings together save memory, and none of them changes how many rows a step learns from."""
    *_, last = [plan, *preflight.alternatives(plan)]
    assert train_memory(last) <= train_memory(plan)
    for changed in preflight.alternatives(plan):
        assert changed.batch * changed.accumulation == plan.batch * plan.accumulation


@given(plans(), st.integers(1_000_000_000, 64_000_000_000))
def test_named_settings_really_fit(plan: Plan, available: int) -> None:
    """What the hint of a refusal names fits by the same estimate; if it names nothing, nothing fits."""
    hint = preflight.remedy(plan, "train", available)
    if hint.startswith("it fits"):
        told = hint.partition(" with ")[2].removesuffix(" (longer rows are left out)")
        settings = dict(part.split(" ") for part in told.split(", ") if told)
        named = {
            "gradient_checkpointing": ("checkpointing", bool),
            "torch_dtype": ("dtype", str),
            "type": ("method", str),
            "max_seq_len": ("longest", int),
        }
        changes: dict[str, Any] = {named[key][0]: named[key][1](value) for key, value in settings.items()}
        assert train_memory(dataclasses.replace(plan, **changes)) <= available
        assert changes or train_memory(plan) <= available
    else:
        assert hint.startswith("no setting makes it fit")
        assert all(train_memory(changed) > available for changed in preflight.alternatives(plan))


@given(plans())
def test_what_is_left_open_is_the_fastest_that_fits(plan: Plan) -> None:
    """Checkpointing is off and float32 is on (without bfloat16 instructions) exactly when there is room."""
    plain = dataclasses.replace(plan, dtype="float32", checkpointing=False)
    needs = train_memory(plain)
    roomy = preflight.settle(plan, needs, dtype=None, checkpointing=None, has_bf16=False)
    assert (roomy.dtype, roomy.gradient_checkpointing) == ("float32", False)
    assert preflight.settle(plan, None, dtype=None, checkpointing=None, has_bf16=True).dtype == "bfloat16"
    tight = preflight.settle(plan, needs - 1, dtype="float32", checkpointing=None, has_bf16=True)
    assert (tight.dtype, tight.gradient_checkpointing) == ("float32", True)
    least = train_memory(dataclasses.replace(plain, checkpointing=True))
    smaller = preflight.settle(plan, least - 1, dtype=None, checkpointing=None, has_bf16=False)
    assert smaller.dtype == "bfloat16"
    assert len(roomy.reasons) == 2
    assert len(tight.reasons) == 1


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_unknown_architecture_is_not_estimated(name: str) -> None:
    """A configuration that does not name its sizes, or names something else, gives no estimate and no error."""
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert Shape.of(config) is not None
    assert Shape.of({key: value for key, value in config.items() if key != name}) is None
    assert Shape.of(config | {name: "many"}) is None


def test_size_from_the_configuration_is_that_of_the_weights() -> None:
    """The parameters counted from the built-in model's config.json are those in its file."""
    shape = Shape.of(json.loads((TINY / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    assert shape.stored == pytest.approx((TINY / "model.safetensors").stat().st_size, rel=0.01)


def test_it_is_told_before_training(tuned: Sandbox) -> None:
    """A run says in one line what its steps will take, after the data and before weights are loaded."""
    lines = (tuned.root / "gen-model/events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    [told] = [number for number, event in enumerate(events) if event.get("text", "").startswith("preflight about")]
    text = events[told]["text"]
    assert all(f"{step} " in text for step in ("train", "merge", "export", "verify"))
    assert "of disk; " in text
    started = {event["stage"]: number for number, event in enumerate(events) if event["event"] == "start"}
    assert started["data"] < told < started["train"]


def test_what_cannot_fit_is_refused_before_torch(fresh: Sandbox) -> None:
    """An adapter of a terabyte is refused with its place and what would help, in a process without torch."""
    fresh.edit(lambda c: c["passes"]["lora"].update(r=10**8))
    script = "import sys; from edgetune import cli; code = cli.main(['train']); print(code, 'torch' in sys.modules)"
    result = fresh.command(sys.executable, "-c", script)
    assert result.stdout == "1 False\n", result.stderr
    line = next(
        number
        for number, text in enumerate(fresh.config.read_text(encoding="utf-8").splitlines(), start=1)
        if "per_device_train_batch_size" in text
    )
    assert f"fine-tuning/olive-config.json:{line}: training edgetune/tiny-phi3 needs about" in result.stderr
    assert "no setting makes it fit" in result.stderr
    assert "of disk space" in result.stderr
    assert not (fresh.root / "gen-model/adapter").exists()


@pytest.mark.slow
def test_a_block_size_that_cannot_run_is_refused_before_training(fresh: Sandbox) -> None:
    """Embeddings that are the output layer, too, lie in blocks: the model would fail at its first token."""
    case = next(case for case in matrix.CASES if case.name == "llama-tied")
    matrix.random_model(
        matrix.SMALL | case.config | {"hidden_size": 192, "num_attention_heads": 4},
        fresh.root / "model-cache/acme/tied",
    )
    fresh.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/tied"))
    fresh.edit(lambda c: c["passes"]["lora"].update(target_modules=["q_proj"]))
    fresh.edit(lambda c: c["passes"]["builder"].update(int4_algo_config="rtn"))

    result = fresh.run("finetune")

    assert result.returncode == 1
    assert "int4_block_size 128 does not divide the 192 numbers of an embedding" in result.stderr
    assert "write 32, or leave out int4_algo_config" in result.stderr
    assert not (fresh.root / "gen-model/adapter").exists()


def test_base_model_that_cannot_fit_is_refused_before_its_weights(fresh: Sandbox) -> None:
    """No weights are fetched for a run that they have no room in; fetching them alone is allowed."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | HUGE).encode()
    fresh.edit(lambda c: c["input_model"].update(model_path="../model-cache/acme/phi"))
    with HubServer(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        refused = fresh.run("train", env={"HF_ENDPOINT": server.url})
        fetched = server.seen()
        fetching = fresh.run("download", env={"HF_ENDPOINT": server.url})
        server.shutdown()
    assert refused.returncode == 1
    assert "training acme/phi needs about" in refused.stderr
    assert "no setting makes it fit: take a smaller base model, or a machine with" in refused.stderr
    assert not any(name.endswith(".safetensors") for name in fetched)
    assert fetching.returncode == 0, fetching.stderr


@pytest.mark.slow
def test_open_settings_are_chosen_told_and_recorded(fresh: Sandbox) -> None:
    """Without torch_dtype and gradient_checkpointing the run says what it took; later steps read it from there."""

    def leave_open(config: Any) -> None:
        tuning = config["passes"]["lora"]
        del tuning["torch_dtype"], tuning["training_args"]["gradient_checkpointing"], tuning["eval_data_config"]
        tuning["training_args"]["max_steps"] = 1

    fresh.edit(leave_open)
    result = fresh.run("train")
    assert result.returncode == 0, result.stderr
    assert "gradient_checkpointing false: it fits without" in result.stderr
    manifest = fresh.root / "gen-model/adapter/manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    dtype = content["metrics"]["torch_dtype"]
    assert f"torch_dtype {dtype}: this processor has" in result.stderr
    assert f"parameters; {dtype} on cpu" in result.stderr
    assert "torch_dtype" not in content["inputs"]["pass"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    content["metrics"]["torch_dtype"] = other
    manifest.write_text(json.dumps(content), encoding="utf-8")
    script = (
        "from pathlib import Path; from edgetune import cli, preflight; from argparse import Namespace;"
        "print(preflight.trained_dtype(cli._start(Namespace(project=Path()))))"
    )
    assert fresh.command(sys.executable, "-c", script).stdout == f"{other}\n"
    assert "up to date" in fresh.run("train").stderr


@pytest.mark.parametrize(("case", "step", "estimated", "measured"), MEASURED)
def test_estimates_are_close_to_what_was_measured(case: str, step: str, estimated: float, measured: float) -> None:
    """The formulas give the published measurements within the error that the documentation states."""
    assert measured / ERROR <= estimated <= measured * ERROR, (case, step)


def test_documentation_shows_todays_tables() -> None:
    """The tables of docs/memory.md are those that the formulas give (`python tests/memory_tables.py`)."""
    assert memory_tables.PAGE.read_text(encoding="utf-8") == memory_tables.page()
    models = (memory_tables.ROOT / "copier.yml").read_text(encoding="utf-8")
    assert all(f"    {model}:" in models for model in memory_tables.CATALOGUE)


@pytest.mark.slow
def test_estimate_is_close_to_what_this_machine_takes(tmp_path: Path) -> None:
    """Training, merging and exporting a random model of 135 M parameters peak where the estimate says."""
    bench = memory_tables.bench()
    case = bench.Case("135M", "float32", 2, 128, last="export")
    bench.prepare(tmp_path / "my-slm", case)
    found = bench.peaks(tmp_path / "my-slm", case)
    assert set(found["peaks"]) == {"train", "merge", "export"}
    for step, peak in found["peaks"].items():
        assert 0.75 < MEMORY[step](case.plan(found["longest"])) / peak < 1.33, step
