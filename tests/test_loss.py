"""The cheap way to the loss gives what the plain way gives: logits of all positions, and one padded batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from edgetune import loss as module
from edgetune.batches import IGNORED, Collator, grouped, micro_batches
from edgetune.dropout import quick_dropout, replace_dropout
from edgetune.loss import CompletionLoss
from edgetune.project import BUILTIN_MODELS
from edgetune.prompt import Sample
from matrix import CASES, SMALL, Case, random_weights
from test_architectures import EXPORTED, by_name

BY_NAME = {case.name: case for case in CASES}
QUICK = {"phi3", "qwen2", "gemma2", "granite"}
TOLERANCE = 1e-5
VOCABULARY = 2304  # of SMALL


def with_adapter(case: Case, folder: Path, *extra: str) -> Any:
    """Return a small random model in float32 with a LoRA adapter that is no longer zero."""
    from peft import LoraConfig, get_peft_model

    (folder / "config.json").write_text(json.dumps(SMALL | case.config), encoding="utf-8")
    model = random_weights(folder).float()
    adapted: Any = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=[*case.modules, *extra])
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted.train()


def batch_of(*lengths: int, turns: int = 2) -> dict[str, torch.Tensor]:
    """Return a padded batch of rows whose learned tokens are scattered over several turns."""
    source = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=source).tolist()
        turn = max(length // turns, 2)
        samples.append(Sample(ids, bytes(int(position % turn >= turn // 2) for position in range(length))))
    return Collator(BUILTIN_MODELS["edgetune/tiny-phi3"])(samples)


def plain(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean over the learned tokens from the logits of all positions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of the adapter, and forget them."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return found


def cheap(model: Any, batch: dict[str, torch.Tensor], budget: int, **settings: Any) -> torch.Tensor:
    """Return the same mean from micro-batches, having added up their gradients."""
    loss = CompletionLoss(model, **settings)
    assert (loss.parts is None) == settings.get("plain", False)
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    total = torch.zeros(())
    for group in micro_batches(batch, budget=budget, rows=len(batch["labels"])):
        part = loss.part(model, group, int(count))
        torch.autograd.backward(part)
        total += part.detach()
    return total


def assert_same(model: Any, batch: dict[str, torch.Tensor], budget: int, **settings: Any) -> None:
    """Compare loss and gradients of the two ways."""
    wanted = plain(model, batch)
    torch.autograd.backward(wanted)
    expected = gradients(model)
    found = cheap(model, batch, budget, **settings)
    assert found.item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).abs().max() <= TOLERANCE * expected[name].abs().max() + 1e-9, name


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.name in QUICK else pytest.mark.slow) for case in EXPORTED],
    ids=by_name,
)
def test_same_loss_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """For every architecture that can be exported, with rows on both sides of its sliding window."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * VOCABULARY * 13)  # some chunks, the last one smaller
    # Phi-3's LongRoPE turns to other factors for the whole batch once its longest row is past the original length.
    lengths = (60, 9, 77, 3, 40) if "longrope" in case.name else (60, 9, 130, 3, 40)

    assert_same(with_adapter(case, tmp_path), batch_of(*lengths), budget=140)


@pytest.mark.parametrize("settings", [{}, {"plain": True}])
def test_output_layer_with_an_adapter(tmp_path: Path, settings: dict[str, bool]) -> None:
    """An adapter on the output layer gets its gradients too; so does the model that is run as a whole."""
    model = with_adapter(BY_NAME["llama"], tmp_path, "lm_head")
    assert any("lm_head.lora_A" in name for name, weight in model.named_parameters() if weight.requires_grad)

    assert_same(model, batch_of(30, 12, 21), 40, **settings)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    """Layers that are calculated again give the same gradients."""
    model = with_adapter(BY_NAME["qwen2"], tmp_path)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    assert_same(model, batch_of(30, 12, 21), 40)


def test_what_is_done_after_an_output_layer_is_compared(tmp_path: Path) -> None:
    """A model that changes its logits in a way that its configuration does not tell is run as a whole."""
    model = with_adapter(BY_NAME["llama"], tmp_path)
    causal = model.get_base_model()
    forward = causal.forward

    def halved(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits = output.logits / 2
        return output

    causal.forward = halved

    assert CompletionLoss(model).parts is None


def test_evaluation_is_the_same_mean(tmp_path: Path) -> None:
    """The losses of all tokens have the mean that the plain computation gives."""
    model, batch = with_adapter(BY_NAME["gemma2"], tmp_path).eval(), batch_of(30, 12, 121)
    loss = CompletionLoss(model)

    tokens = torch.cat([loss.of_tokens(model, group) for group in micro_batches(batch, budget=60, rows=3)])

    assert tokens.mean().item() == pytest.approx(plain(model, batch).item(), rel=TOLERANCE)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=24), st.one_of(st.none(), st.integers(1, 600)), st.integers(1, 9)
)
def test_groups_hold_every_row_once(lengths: list[int], budget: int | None, rows: int) -> None:
    """Each row of which something is learned is in one group; no group is over its limits unless it is one row."""
    groups = grouped(lengths, budget=budget, rows=rows)

    assert sorted(row for group in groups for row in group) == [row for row, length in enumerate(lengths) if length]
    for group in groups:
        assert len(group) <= rows
        assert len(group) == 1 or budget is None or len(group) * max(lengths[row] for row in group) <= budget


def test_short_rows_are_one_group_and_long_ones_stand_alone() -> None:
    """A batch of the built-in model's rows is not cut; a row of another length is not padded for."""
    assert len(grouped([24, 31, 28, 40, 22, 35, 30, 26], budget=1024, rows=8)) == 1
    assert grouped([30, 900, 28], budget=1024, rows=3) == [[1], [0, 2]]


@given(st.sampled_from([0.0, 0.05, 0.1, 0.5]), st.integers(0, 1 << 31))
def test_dropout_is_that_of_the_workflow_file(share: float, seed: int) -> None:
    """The share that is dropped, the mean and the gradient are those of torch's; it draws from torch's generator."""
    torch.manual_seed(seed)
    dropout, values = quick_dropout(share), torch.ones(300, 401, requires_grad=True)

    found = dropout(values)
    found.sum().backward()

    torch.manual_seed(seed)
    assert torch.equal(found, dropout(values))
    error = 5 * (share / values.numel()) ** 0.5  # five standard deviations, and a little more
    assert (found == 0).float().mean().item() == pytest.approx(share, abs=error)
    assert found.max().item() == pytest.approx(1 / (1 - share), rel=1e-4)
    assert values.grad is not None
    assert torch.equal(values.grad, found.detach())
    assert dropout.eval()(values) is values


def test_every_adapter_layer_gets_the_dropout(tmp_path: Path) -> None:
    """Training goes on being random, and evaluation is not."""
    from peft import LoraConfig, get_peft_model

    base = with_adapter(BY_NAME["llama"], tmp_path).unload()
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]))
    replace_dropout(model)
    kinds = [type(module).__name__ for name, module in model.named_modules() if name.endswith("lora_dropout.default")]

    assert kinds == ["QuickDropout"] * 4
