"""What it is to ask a model: how tokens are chosen, what an answer is, and the interface that every backend has.

Here are batches, limits and end tokens, which are the same for all; :mod:`edgetune.torch_backend` and
:mod:`edgetune.onnx_backend` have the models.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.stream import OnText, Stream

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    Logits = np.ndarray[tuple[int, int], np.dtype[np.float32]]

_BATCH_ROWS = 16
_CACHE_BYTES = 1 << 30  # most memory for the keys and values of a batch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, unless an option asks for chance.

    The names are those of transformers and ONNX Runtime GenAI; ``top_k`` 0 and ``top_p`` 1 leave all tokens in.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options as both libraries take them."""
        chance = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in chance.items() if value is not None}
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        chosen = {"do_sample": True, **neutral, **given} if given else {"do_sample": False}
        return {**chosen, "repetition_penalty": self.repetition_penalty}


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """A generated completion."""

    text: str
    stop_reason: str
    """``stop``: the model ended its answer; ``length``: a limit did."""
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    """Its share of the time its batch took."""


@dataclass(frozen=True)
class Speed:
    """How long a model takes for one prompt and one answer."""

    prefill_seconds: float
    decode_seconds: float


class Backend(ABC):
    """A model that continues prompts."""

    tokenizer: "Tokenizer"
    end_ids: frozenset[int]
    max_length: int
    """Most tokens of prompt and answer together."""
    _cache_bytes: int
    """Memory for the keys and values of a token."""
    folder: Path
    """The model folder whose tokenizer and chat template go with the model."""

    @abstractmethod
    def logits(self, ids: Sequence[int], start: int) -> "Logits":
        """Return float32 logits of shape (len(ids) - start, vocabulary) that foretell ``ids[start:]``."""

    @abstractmethod
    def speed(self, ids: Sequence[int], new_tokens: int) -> Speed:
        """Measure one prompt and one answer of ``new_tokens`` tokens, whatever they are."""

    @abstractmethod
    def _continue(
        self, prompts: list[list[int]], new_tokens: int, sampling: Sampling, stream: Stream | None
    ) -> list[list[int]]:
        """Continue a batch by up to ``new_tokens`` tokens; what follows an end token does not count."""

    def answers(
        self, prompts: Sequence[list[int]], sampling: Sampling = GREEDY, on_text: OnText | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's number and answer; prompts must leave room for a token.

        In batches of similar length, the longest first; one by one and in order with ``on_text``, and with a seed, so
        that an answer does not depend on its neighbours.
        """
        alone = on_text is not None or sampling.seed is not None
        batches = ([number] for number in range(len(prompts))) if alone else self._batches(prompts, sampling)
        for batch in batches:
            yield from zip(batch, self._answer([prompts[n] for n in batch], sampling, on_text), strict=True)

    def _batches(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[list[int]]:
        numbers = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        first = 0
        while first < len(numbers):
            longest = len(prompts[numbers[first]])
            rows = self._rows_at_once(longest + self._limit(longest, sampling), sampling)
            yield numbers[first : first + rows]
            first += rows

    def _rows_at_once(self, length: int, _sampling: Sampling) -> int:
        """Return how many rows of prompt and answer of this length make a batch."""
        return max(1, min(_BATCH_ROWS, _CACHE_BYTES // int(self._cache_bytes * length)))

    def _limit(self, prompt_length: int, sampling: Sampling) -> int:
        """Return how many tokens an answer may have."""
        room = self.max_length - prompt_length
        return min(room, sampling.max_new_tokens or room)

    def _answer(self, prompts: list[list[int]], sampling: Sampling, on_text: OnText | None) -> list[Answer]:
        started = time.monotonic()
        limit = self._limit(max(map(len, prompts)), sampling)
        stream = None if on_text is None else Stream(self._text, on_text)
        continuations = self._continue(prompts, limit, sampling, stream)
        seconds = round((time.monotonic() - started) / len(prompts), 4)
        answers = []
        for prompt, ids in zip(prompts, continuations, strict=True):
            ended = any(token in self.end_ids for token in ids)
            if not ended and limit < self._limit(len(prompt), sampling):
                # The longest prompt of the batch left this one too little room.
                answers += self._answer([prompt], sampling, None)
                continue
            said = self._before_end(ids)
            reason = "stop" if ended else "length"
            answers.append(Answer(self._text(said), reason, len(prompt), len(said) + ended, seconds))
        if stream is not None:
            stream.finish()
        return answers

    def _before_end(self, ids: list[int]) -> list[int]:
        return ids[: next((at for at, token in enumerate(ids) if token in self.end_ids), len(ids))]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(self._before_end(ids), skip_special_tokens=True).strip()
