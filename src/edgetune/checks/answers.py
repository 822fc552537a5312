"""Ask the models the same questions: what the adapter learned, and what merging and int4 made of it."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgetune.backends import exported_from, open_backend
from edgetune.examples import Example
from edgetune.generation import Answer, Backend, Sampling
from edgetune.memory import release_memory
from edgetune.onnx_backend import OnnxBackend
from edgetune.scores import completion_loss, divergence, log_probabilities, loss_of
from edgetune.stages import Job
from edgetune.torch_backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgetune.generation import Logits

_LOGITS_KEPT = 8  # examples
_POSITIONS_KEPT = 32  # of each
_BLOCK = 64  # positions whose probabilities are in memory at a time
_GENERATED_TOKENS = 4096
_ANSWER_MARGIN = 16


@dataclass
class Losses:
    """The adapter against the base model it sits on, in nats for a token of the completions."""

    base: float
    adapter: float
    logits: "list[Logits]" = field(repr=False)
    """The adapter's logits for the first examples."""


def adapter_losses(job: Job, examples: list[Example]) -> Losses:
    """Load the base model with its adapter, and take both losses."""
    backend = open_backend(job, "adapter")
    assert isinstance(backend, TorchBackend)  # noqa: S101 - for the type checker
    base, adapter = 0.0, 0.0
    for number, example in enumerate(examples):
        job.progress.advance(number, len(examples), "comparing the adapter with the base model")
        adapter += completion_loss(backend, example)
        with backend.model.disable_adapter():
            base += completion_loss(backend, example)
    tokens = sum(example.learned for example in examples)
    kept = [backend.logits(e.ids, e.start)[:_POSITIONS_KEPT].copy() for e in examples[:_LOGITS_KEPT]]
    del backend
    release_memory()  # the next model needs it
    return Losses(base / tokens, adapter / tokens, kept)


@dataclass
class ExportFindings:
    """The exported model against the one it was made from, on the same examples."""

    merged_loss: list[float] = field(default_factory=list)
    """The mean loss of a token in nats, for each example."""
    onnx_loss: list[float] = field(default_factory=list)
    merged_total: float = 0.0
    """The loss in nats, summed over all tokens."""
    onnx_total: float = 0.0
    tokens: int = 0
    same_top: int = 0
    """Tokens of completions for which both find the same one most likely."""
    divergence: float = 0.0
    """The Kullback-Leibler divergence in nats, summed over the tokens."""
    adapter_distance: float = 0.0
    """Largest difference of a logit between adapter and merged, as a share of the largest logit."""
    asked: list[Example] = field(default_factory=list)
    """The examples that were answered in words as well."""
    merged_answers: list[Answer] = field(default_factory=list)
    onnx_answers: list[Answer] = field(default_factory=list)

    def add(self, merged: "Logits", onnx: "Logits", completion: list[int]) -> None:
        """Count an example in, from both models' logits of its completion."""
        before = self.merged_total, self.onnx_total
        for first in range(0, len(completion), _BLOCK):
            part = slice(first, first + _BLOCK)
            one, other = log_probabilities(merged[part]), log_probabilities(onnx[part])
            self.merged_total += loss_of(one, completion[part])
            self.onnx_total += loss_of(other, completion[part])
            self.same_top += int((one.argmax(-1) == other.argmax(-1)).sum())
            self.divergence += float(divergence(one, other).sum())
        self.tokens += len(completion)
        self.merged_loss.append((self.merged_total - before[0]) / len(completion))
        self.onnx_loss.append((self.onnx_total - before[1]) / len(completion))

    @property
    def is_finite(self) -> bool:
        """Whether all that the models said are numbers."""
        return math.isfinite(self.divergence) and all(map(math.isfinite, (*self.merged_loss, *self.onnx_loss)))

    def hits(self, answers: list[Answer]) -> list[bool]:
        """Tell for each asked example whether the answer is the expected one."""
        return [answer.text == example.expected for answer, example in zip(answers, self.asked, strict=True)]


def compare_export(
    job: Job,
    model: "Path",
    examples: list[Example],
    adapter_logits: "Sequence[Logits]" = (),
    merged_answers: list[Answer] | None = None,
) -> ExportFindings:
    """Load the merged model (without a fine-tuning pass, the base model) and the exported one, and ask both.

    ``merged_answers``: those to the same examples, where they are known.
    """
    import numpy as np

    found = ExportFindings(asked=_affordable(examples))
    merged, onnx = open_backend(job, exported_from(job)), OnnxBackend(model)
    for number, example in enumerate(examples):
        job.progress.advance(number, len(examples), f"comparing the exported model with {exported_from(job)}")
        logits = merged.logits(example.ids, example.start)
        if number < len(adapter_logits):
            kept = adapter_logits[number]
            distance = np.abs(logits[: len(kept)] - kept).max() / np.abs(kept).max()
            found.adapter_distance = max(found.adapter_distance, float(distance))
        found.add(logits, onnx.logits(example.ids, example.start), example.ids[example.start :])
    before = exported_from(job)
    found.merged_answers = merged_answers or _answers(job, merged, found.asked, f"asking the {before} model")
    found.onnx_answers = _answers(job, onnx, found.asked, "asking the exported model")
    return found


def _affordable(examples: list[Example]) -> list[Example]:
    """Return as many of the examples as can be answered in a moderate number of tokens; at least one."""
    tokens = 0
    asked: list[Example] = []
    for example in examples:
        tokens += example.learned
        if asked and tokens > _GENERATED_TOKENS:
            break
        asked.append(example)
    return asked


def answer_limit(examples: list[Example]) -> int:
    """Return how many tokens an answer may have before it counts as one that does not end."""
    return 2 * max(example.learned for example in examples) + _ANSWER_MARGIN


def _answers(job: Job, backend: Backend, examples: list[Example], what: str) -> list[Answer]:
    sampling = Sampling(max_new_tokens=answer_limit(examples))
    found: dict[int, Answer] = {}
    for number, answer in backend.answers([example.prompt_ids for example in examples], sampling):
        found[number] = answer
        job.progress.advance(len(found), len(examples), what)
    return [found[number] for number in range(len(examples))]
