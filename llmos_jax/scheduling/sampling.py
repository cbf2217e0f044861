"""How to choose each token of a sequence: the words that a request uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.errors import ConfigError

MOST_BIASES = 300
"""Tokens that one request may bias: a judgement; the rows of a step have room for so
many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose each token of one sequence.

    Names and meanings are those of OpenAI's API and of vLLM: temperature divides the
    logits, then top_k, top_p and min_p leave tokens out, in this order. A repetition
    penalty looks at prompt and answer, the other two at the answer alone.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities reach p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens said."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token was said."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), at most MOST_BIASES of them."""
    seed: int = 0

    def check(self) -> Sampling:
        """Return self, or raise ConfigError for a value outside its range."""
        _in_range("temperature", self.temperature, 0, math.inf)
        _in_range("top_k", self.top_k, 0, 2**31, note=" (0 keeps all)")
        _in_range("top_p", self.top_p, 0, 1, opens=True, closes=True)
        _in_range("min_p", self.min_p, 0, 1, closes=True)
        _in_range(
            "repetition_penalty", self.repetition_penalty, 0, math.inf, opens=True
        )
        _in_range("presence_penalty", self.presence_penalty, -2, 2, closes=True)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2, closes=True)
        _in_range("seed", self.seed, -(2**63), 2**64)
        if len(self.logit_bias) > MOST_BIASES:
            raise ConfigError(
                f"logit_bias names {len(self.logit_bias)} tokens; at most "
                f"{MOST_BIASES} have room."
            )
        for token, bias in self.logit_bias:
            _in_range(f"logit_bias of token {token}", bias, -100, 100, closes=True)
        return self

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.temperature > 0

    @property
    def filters(self) -> bool:
        """Whether tokens are left out of the draw."""
        return self.draws and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were said or seen count."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _in_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    opens: bool = False,
    closes: bool = False,
    note: str = "",
) -> None:
    """Refuse a value outside [low, high): `opens` leaves low out, `closes` lets high
    in. NaN is in no range."""
    above = value > low if opens else value >= low
    below = value <= high if closes else value < high
    if above and below:
        return
    span = f"{'(' if opens else '['}{low}, {high}{']' if closes else ')'}"
    raise ConfigError(f"{name} is {value}; it must be in {span}{note}.")
