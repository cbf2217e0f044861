"""Choose the next token from logits: greedy, or temperature with top-k and top-p.

B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmos_jax.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose: temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> Sampling:
        """Return self, or raise ConfigError for a value outside its range."""
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be >= 0.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be >= 0 (0: all).")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1].")
        return self


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Return int32 [B] token ids; the same key gives the same tokens."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / jnp.float32(sampling.temperature)
    scaled_BV = keep_top_p(keep_top_k(scaled_BV, sampling.top_k), sampling.top_p)
    return jax.random.categorical(key, scaled_BV, axis=-1).astype(jnp.int32)


def keep_top_k(logits_BV: jax.Array, top_k: int) -> jax.Array:
    """Mask all but the k most likely tokens; ties with the k-th stay."""
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Mask all but the smallest set of tokens whose probabilities reach p.

    A token stays if the tokens more likely than it sum to less than p, so the most
    likely one always stays (nucleus sampling, arXiv 1904.09751).
    """
    if top_p >= 1:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1), axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    keep_BV = jnp.take_along_axis(before_BV < top_p, rank_BV, -1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)
