"""The loss of training: cross entropy at the positions whose next token is learned, and logits nowhere else.

The decoder runs over the whole rows, the output layer over a few positions at a time. What an architecture does after
its output layer is taken from its configuration and compared with the model's own logits before training begins.
"""

import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetune.batches import IGNORED

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 64_000_000
"""How much of the logits, in float32, is there at a time; cross entropy takes three times as much."""
_PROBE = 12  # tokens
_HEAD_ERROR, _PADDING_ERROR = 1e-3, 0.05  # shares of the largest value; the same sums in another order, in bfloat16


class _Parts(NamedTuple):
    """A model cut before its output layer."""

    decoder: Any
    logits: "Callable[[torch.Tensor], torch.Tensor]"
    """From hidden states to logits."""


class CompletionLoss:
    """Cross entropy of a causal language model, with or without adapters."""

    def __init__(self, model: Any, *, smoothing: float = 0.0, plain: bool = False) -> None:
        """Look for the parts of ``model``; with ``plain``, or where they are not found, it is run as a whole.

        Raises nothing: a model whose parts do not give its own logits is run as a whole, which only costs more.
        """
        self.smoothing = smoothing
        self.parts = None if plain else _parts(model)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.positions = max(LOGITS_BYTES // (4 * vocabulary), 1)

    def part(self, model: Any, batch: dict[str, "torch.Tensor"], count: int) -> "torch.Tensor":
        """Return a micro-batch's part of the mean over ``count`` learned tokens, to be differentiated once.

        Its gradient at the hidden states is computed here, chunk by chunk, so that no logits are kept; trained
        weights of the output layer are given theirs on the way.
        """
        import torch

        states, targets = self._learned(model, batch)
        total = torch.zeros((), device=states.device)
        gradients: list[Any] = []
        for chunk, wanted in self._chunks(states, targets):
            leaf = chunk.detach().requires_grad_()
            loss = self._losses(leaf, wanted).sum() / count
            torch.autograd.backward(loss)
            total += loss.detach()
            gradients.append(leaf.grad)
        if not states.requires_grad:  # only the output layer is trained, and has its gradient
            return total.requires_grad_()
        value = (states.float() * torch.cat(gradients)).sum()
        return value + (total - value.detach())

    def of_tokens(self, model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the loss of each learned token, without gradients."""
        import torch

        with torch.no_grad():
            states, targets = self._learned(model, batch)
            return torch.cat([self._losses(chunk, wanted) for chunk, wanted in self._chunks(states, targets)])

    def _chunks(
        self, states: "torch.Tensor", targets: "torch.Tensor"
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """Yield as many positions at a time as have LOGITS_BYTES of logits."""
        import torch

        yield from zip(torch.split(states, self.positions), torch.split(targets, self.positions), strict=True)

    def _learned(self, model: Any, batch: dict[str, "torch.Tensor"]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return hidden states (logits where there are no parts) and next tokens of the positions that are learned.

        The parts are run without a mask: padding stands on the right, where no earlier position sees it, and without
        a mask attention takes its fast way.
        """
        learned = batch["labels"] != IGNORED
        if self.parts is None:
            states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        else:
            states = self.parts.decoder(input_ids=batch["input_ids"]).last_hidden_state
        return states[learned], batch["labels"][learned]

    def _losses(self, states: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        logits = states if self.parts is None else self.parts.logits(states)
        return cross_entropy(logits.float(), targets, reduction="none", label_smoothing=self.smoothing)


def _parts(model: Any) -> _Parts | None:
    """Return the parts of a model; None where they do not give the model's own logits."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    training = model.training
    model.eval()
    try:
        decoder = causal.get_decoder()
        logits = _after_output_layer(causal.config, causal.get_output_embeddings())
        return _Parts(decoder, logits) if decoder is not causal and _agree(model, decoder, logits) else None
    except Exception:  # noqa: BLE001 - code of its own that is built otherwise can raise anything
        traceback.print_exc()  # into the step's log
        return None
    finally:
        model.train(training)


def _agree(model: Any, decoder: Any, logits: Callable[["torch.Tensor"], "torch.Tensor"]) -> bool:
    """Tell whether the parts give the model's logits, and padding without a mask leaves what stands before it alone."""
    import torch

    ids = torch.arange(_PROBE, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        short, padded = (decoder(input_ids=ids[:, :end]).last_hidden_state for end in (_PROBE // 2, _PROBE))
        same = _close(logits(padded), model(input_ids=ids).logits, _HEAD_ERROR)
    return same and _close(padded[:, : _PROBE // 2], short, _PADDING_ERROR)


def _after_output_layer(config: Any, output: Any) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """Return the output layer with what Granite (division) and Gemma (soft cap, arXiv:2408.00118) do after it."""
    scale = getattr(config, "logits_scaling", None) or 1
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(states: "torch.Tensor") -> "torch.Tensor":
        found: torch.Tensor = output(states)
        if scale != 1:
            found = found / scale
        return cap * (found / cap).tanh() if cap else found

    return logits


def _close(one: "torch.Tensor", other: "torch.Tensor", share: float) -> bool:
    return bool((one - other).abs().max() <= share * other.abs().max())
