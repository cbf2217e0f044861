"""What is asked of the engine, and what comes back: the nouns of serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from llmos_jax.scheduling.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "deadline", "failed"]
"""`stop`: a stop token, or a grammar that is complete. `length`: max_tokens, or the end
of the context. `failed`: see `Progress.problem`."""

MOST_ALTERNATIVES = 20
"""Likeliest tokens that come with each token, at most: OpenAI's `top_logprobs`."""


class Grammar(Protocol):
    """What may follow, of one request; only the engine's thread calls it."""

    def fill(self, mask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        Args:
            mask: uint32 [ceil(V / 32)]; token t is bit t % 32 of word t // 32.
        """

    def take(self, token: int) -> None:
        """Go on by a token that `fill` allowed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt to be continued, to be embedded, or a text to be classified."""

    id: str
    prompt: np.ndarray
    """int32 [T], T >= 1."""
    max_tokens: int
    """At least 1; of an embedding or of classes 0."""
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    """An answer ends before one of these."""
    alternatives: int | None = None
    """Likeliest tokens to tell with each token, 0 to MOST_ALTERNATIVES; None: no
    log-probabilities at all."""
    grammar: Grammar | None = None
    tenant: str = ""
    """Who asks: tenants that wait get equal shares of tokens."""
    priority: int = 0
    """Lower ones go first."""
    deadline: float | None = None
    """When it is given up, in seconds of time.monotonic."""
    wants: Literal["tokens", "embedding", "classes"] = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How likely a token was, by the model's own logits (before any parameter)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of a request that ended, in seconds of time.monotonic; None: never came there."""

    queued: float
    admitted: float | None
    first_token: float | None
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What became of a request since the last one of these."""

    tokens: tuple[int, ...] = ()
    """New tokens; a stop token is none of them."""
    likelihoods: tuple[Likelihood, ...] = ()
    """One for each token, if they were asked for."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache (as admitted first)."""
    reason: FinishReason | None = None
    """None: it goes on."""
    problem: str = ""
    """Why it failed: a sentence for who asked."""
    embedding: np.ndarray | None = None
    """float32 [D]: the mean of the final features of the prompt's tokens."""
    class_logits: np.ndarray | None = None
    """float32 [C]: one for each class, of a text that was classified."""
    times: Times | None = None
    """With a reason."""
    preemptions: int = 0
    """With a reason: how often its pages were taken away and computed anew."""


Hear = Callable[[Progress], None]
"""Called on the engine's thread; it must return at once and raise nothing."""
