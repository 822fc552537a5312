"""How good completions are, and whether a difference between two models is more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.examples import Example
from edgetune.generation import Backend

if TYPE_CHECKING:
    import numpy as np

    from edgetune.generation import Logits

SIGNIFICANT = 0.05
"""A difference that chance alone makes more often than this is called noise."""


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same examples."""

    better: int
    """Examples on which the second one does better."""
    worse: int
    p: float
    """How often chance alone makes a difference as large as this."""

    @property
    def verdict(self) -> str:
        """What the second model is: better, worse, or no different as far as one can tell."""
        if self.p >= SIGNIFICANT:
            return "noise"
        return "better" if self.better > self.worse else "worse"


def log_probabilities(logits: "Logits") -> "Logits":
    """Return the logarithms of the softmax of each row."""
    from scipy.special import log_softmax

    return log_softmax(logits, axis=-1)  # type: ignore[no-any-return]


def completion_loss(backend: Backend, example: Example) -> float:
    """Return the summed negative log-likelihood of an example's completion, in nats."""
    return loss_of(log_probabilities(backend.logits(example.ids, example.start)), example.ids[example.start :])


def loss_of(log_probabilities: "Logits", completion: Sequence[int]) -> float:
    """Return the same from log-probabilities of shape (tokens of the completion, vocabulary)."""
    import numpy as np

    return -float(log_probabilities[np.arange(len(completion)), completion].sum(dtype=np.float64))


def perplexity(loss: float, tokens: int) -> float:
    """Return the perplexity of ``tokens`` tokens with this summed negative log-likelihood in nats."""
    return math.exp(min(loss / tokens, 700.0))  # beyond, the float ends


def divergence(reference: "Logits", other: "Logits") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return the Kullback-Leibler divergence KL(reference, other) of each row of log-probabilities, in nats."""
    import numpy as np

    return np.sum(np.exp(reference) * (reference - other), axis=-1, dtype=np.float64)  # type: ignore[no-any-return]


def compare_hits(before: Sequence[bool], after: Sequence[bool]) -> PairedTest:
    """Test right and wrong answers with McNemar's test, exact: discordant pairs fall either way like a coin.

    (McNemar 1947, doi:10.1007/BF02295996)
    """
    from scipy.stats import binomtest

    better = sum(now and not then for then, now in zip(before, after, strict=True))
    worse = sum(then and not now for then, now in zip(before, after, strict=True))
    return PairedTest(better, worse, float(binomtest(better, better + worse).pvalue) if better + worse else 1.0)


def compare_losses(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Test losses with Wilcoxon's signed-rank test, which no single outlier decides (doi:10.2307/3001968)."""
    from scipy.stats import wilcoxon

    better = sum(now < then for then, now in zip(before, after, strict=True))
    worse = sum(now > then for then, now in zip(before, after, strict=True))
    return PairedTest(better, worse, float(wilcoxon(before, after).pvalue) if better + worse else 1.0)
