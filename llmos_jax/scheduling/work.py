"""What is sent to the device at once, and what comes back of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmos_jax.scheduling.request import Likelihood
from llmos_jax.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive tokens of one sequence."""

    sequence: Sequence
    seat: int
    start: int
    """The position of the first."""
    tokens: tuple[int, ...] | None
    """None: one, which the device knows."""
    draws: int
    """Tokens chosen after the last of these tokens: 0, 1, in decode steps up to that
    many; or one after each of them, to check guesses."""

    @property
    def count(self) -> int:
        """Tokens that are computed first."""
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One dispatch: a `step` of any tokens, `decode` steps of a token each, tokens
    of one prompt to `embed`, or whole texts to `classify`."""

    kind: Literal["step", "decode", "embed", "classify"]
    parts: tuple[Part, ...]
    steps: int = 1
    """Of decode, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What became of a part."""

    tokens: tuple[int, ...] = ()
    """NO_TOKEN and NOT_A_NUMBER among them, as the programs say."""
    likelihoods: tuple[Likelihood, ...] = ()
    total: Any = None
    """Of a part to embed: the sum of its features, float32 [D]; of a text to classify:
    its logits, float32 [C]."""


NO_TOKEN = -1
"""From a sequence that had ended."""
NOT_A_NUMBER = -2
"""Logits were NaN or infinite: the sequence ends here."""
