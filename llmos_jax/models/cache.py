"""The keys and values of tokens already seen, one buffer for all layers.

L layers, B sequences, T new tokens, S cache slots, K key/value heads, H head size, P
pages of C slots, M pages of a sequence at most. Slot s holds the token at position s;
slots past the current position hold garbage that no query sees. Each sequence is
written at its own place.

A cache is contiguous, with S slots for each sequence, or made of pages, with a table of
those that each sequence has (`kernels.decode_attention.pages`). Any sequence may come
to have any page, so devices that split sequences each keep all pages.

An int8 cache has a scale for each token and head: scale = absmax / 127, numbers rounded
to nearest, ties to even. Its keys may be rotated by a Hadamard matrix, and queries with
them: products stay, and what one dimension had too much of is spread over all (QuaRot,
arXiv 2404.00456, section 4), so that rounding costs less.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.decode_attention import write_tokens
from llmos_jax.models.annotate import Axes, per_shard

_LARGEST = 127

VALUE_AXES: Axes = (None, "batch", "kv_heads", None, "head_dim")
"""Of keys and values."""
SCALE_AXES: Axes = VALUE_AXES[:-1]
"""Of their scales."""
PAGE_AXES: Axes = (None, None, *VALUE_AXES[2:])
"""Of keys and values in pages."""


class KVCache(NamedTuple):
    """Keys and values [L, B, K, S, H], or pages [L, P, K, C, H] with a table; one
    layer's share has no L."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    """float32 [L, B, K, S] or [L, P, K, C], of int8 keys."""
    v_scale: jax.Array | None = None
    layer: jax.Array | None = None
    """int32 scalar: which layer is at work, where the arrays have all of them."""
    table: jax.Array | None = None
    """int32 [B, M]: the pages of each sequence, one after another. An entry outside
    [0, P) is no page: nothing is written there, and what is read is of no account."""

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """k, v and, of int8, their scales."""
        given = (self.k, self.v, self.k_scale, self.v_scale)
        return tuple(x for x in given if x is not None)

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Of each of `arrays`, with an L."""
        values = VALUE_AXES if self.table is None else PAGE_AXES
        return (values, values, values[:-1], values[:-1])[: len(self.arrays)]

    @property
    def rotate_keys(self) -> bool:
        """Whether keys, and queries that meet them, are rotated by `rotated`."""
        return False


class RotatedKVCache(KVCache):
    """A cache of rotated keys. Being a type, that is known wherever the cache is."""

    __slots__ = ()

    @property
    def rotate_keys(self) -> bool:
        """Whether keys, and queries that meet them, are rotated by `rotated`."""
        return True


def empty_cache(
    spec: ModelSpec,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    *,
    rotate_keys: bool = False,
) -> KVCache:
    """A cache of zeros for `batch` sequences of at most `slots` tokens.

    Args:
        spec: the model.
        batch: sequences.
        slots: of each.
        dtype: of keys and values; int8 brings scales.
        rotate_keys: for heads whose size is a power of two.

    Raises:
        ConfigError: heads of this size cannot be rotated.
    """
    H = spec.head_dim
    if rotate_keys and H & (H - 1):
        raise ConfigError(
            f"keys can be rotated where the head size is a power of two; {spec.name} "
            f"has heads of {H}. Keep them as they are: rotate_keys=False."
        )
    shape = (spec.num_layers, batch, spec.num_kv_heads, slots, H)
    kind = RotatedKVCache if rotate_keys else KVCache
    cache = kind(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
    if jnp.dtype(dtype) != jnp.int8:
        return cache
    # Two arrays: the cache is donated, and a buffer can be given away but once.
    scales = (jnp.ones(shape[:-1], jnp.float32) for _ in range(2))
    return cache._replace(k_scale=next(scales), v_scale=next(scales))


def empty_pages(
    spec: ModelSpec,
    pages: int,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    *,
    rotate_keys: bool = False,
) -> KVCache:
    """Pages of zeros that no sequence has yet: give the cache a table.

    Args:
        spec: the model.
        pages: P.
        page_size: C.
        dtype: as of `empty_cache`.
        rotate_keys: as of `empty_cache`.

    Raises:
        ConfigError: heads of this size cannot be rotated.
    """
    return empty_cache(spec, pages, page_size, dtype, rotate_keys=rotate_keys)


def stacked(cache: KVCache) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return arrays that have an L, and the layer in them that is at work."""
    if cache.layer is not None:
        return cache.arrays, cache.layer
    return tuple(x[None] for x in cache.arrays), jnp.int32(0)


def written(
    cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, position_BT: jax.Array
) -> KVCache:
    """Write the tokens of one layer, each device those of its sequences and heads.

    Args:
        cache: of one layer, or of all with the one at work.
        k_BTKH: keys, rotated as the cache wants them.
        v_BTKH: values.
        position_BT: int32; a sequence's tokens follow each other. One that lies outside
            the cache (padding) is not written.
    """
    if cache.k.dtype == jnp.int8:
        k_BTKH, k_scale_BTK = quantized(k_BTKH)
        v_BTKH, v_scale_BTK = quantized(v_BTKH)
        new = [k_BTKH, v_BTKH, k_scale_BTK, v_scale_BTK]
    else:
        new = [k_BTKH.astype(cache.k.dtype), v_BTKH.astype(cache.v.dtype)]
    old, layer = stacked(cache)
    count, table = len(old), () if cache.table is None else (cache.table,)
    # All devices that keep a page write to it.
    batch = None if table else "batch"
    token_axes: Axes = (batch, None, "kv_heads", "head_dim")
    new_axes = (token_axes, token_axes, token_axes[:-1], token_axes[:-1])[:count]
    one: Axes = (batch, None)

    def part(
        position: jax.Array, layer: jax.Array, *arrays: jax.Array
    ) -> tuple[jax.Array, ...]:
        old, new, table = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
        table_BM = table[0] if table else None
        return write_tokens(old, new, position, layer, table_BM=table_BM)

    made = per_shard(
        part,
        *(position_BT, layer, *old, *new, *table),
        in_axes=(one, (), *cache.axes, *new_axes, *(one for _ in table)),
        out_axes=cache.axes,
    )
    if cache.layer is None:
        made = tuple(x[0] for x in made)
    k, v, k_scale, v_scale = (*made, None, None)[:4]
    return cache._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def quantized(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return int8 numbers, and the float32 scale of each token and head."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.max(jnp.abs(x_BTKH), axis=-1) / _LARGEST
    scale_BTK = jnp.where(scale_BTK == 0, jnp.float32(1), scale_BTK)
    whole_BTKH = jnp.round(x_BTKH / scale_BTK[..., None])
    return jnp.clip(whole_BTKH, -_LARGEST, _LARGEST).astype(jnp.int8), scale_BTK


def rotated(x_BTNH: jax.Array) -> jax.Array:
    """Heads times the orthonormal Hadamard matrix of their size, a power of two."""
    H = x_BTNH.shape[-1]
    signs_HH = jnp.asarray(_signs(H), x_BTNH.dtype)
    product_BTNH = jnp.einsum(
        "BTNH,HJ->BTNJ",
        *(x_BTNH, signs_HH),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (product_BTNH * jnp.float32(1 / math.sqrt(H))).astype(x_BTNH.dtype)


def _signs(H: int) -> np.ndarray:
    """Sylvester's Hadamard matrix."""
    signs_HH = np.ones((1, 1), np.float32)
    while len(signs_HH) < H:
        signs_HH = np.block([[signs_HH, signs_HH], [signs_HH, -signs_HH]])
    return signs_HH
