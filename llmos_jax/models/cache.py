"""The keys and values of tokens already seen, one buffer for all layers.

L layers, B sequences, S cache slots, K key/value heads, H head size. Slot s holds the
token at position s; slots past the current position hold garbage that no query sees.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.ir import ModelSpec


class KVCache(NamedTuple):
    """Keys and values [L, B, S, K, H]; one layer's share has no L."""

    k: jax.Array
    v: jax.Array


def empty_cache(spec: ModelSpec, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros for `batch` sequences of at most `slots` tokens."""
    shape = (spec.num_layers, batch, slots, spec.num_kv_heads, spec.head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, start: jax.Array) -> jax.Array:
    """Write T new rows at slots start .. start+T-1 (the same for every sequence)."""
    zero = jnp.zeros((), start.dtype)
    return jax.lax.dynamic_update_slice(cache_BSKH, new_BTKH, (zero, start, zero, zero))
