"""Attention over a cache, and writing it, in plain XLA; anywhere.

L layers, B sequences, T query tokens, S cache slots, N query heads, K key/value heads,
G = N/K, H head size, P pages of C slots, M pages of a sequence at most.

Integers are converted inside the products, which XLA fuses; scales of keys multiply
scores, those of values weights. Many tokens at once (a prompt) go through `blocked`
attention, with the layer's cache dequantized and transposed once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmos_jax.kernels.attention import blocked
from llmos_jax.kernels.attention.reference import MASKED, Score, einsum
from llmos_jax.kernels.decode_attention import pages
from llmos_jax.kernels.decode_attention.reference import dequantized

Arrays = tuple[jax.Array, ...]

_FEW_TOKENS = 8
"""Up to so many are scattered, not written page by page: a judgement."""


def decode_attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    k_scale_BKS: jax.Array | None,
    v_scale_BKS: jax.Array | None,
    *,
    score: Score,
) -> jax.Array:
    """See `api.decode_attention`."""
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BKSH.shape[1], q_BTNH.dtype
    if blocked.suits(T):
        keys = dequantized(k_BKSH, k_scale_BKS).astype(dtype).swapaxes(1, 2)
        values = dequantized(v_BKSH, v_scale_BKS).astype(dtype).swapaxes(1, 2)
        return blocked.attention(q_BTNH, keys, values, position_BT, score=score)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH.astype(dtype))
    if k_scale_BKS is not None:
        scores_BKGTS = scores_BKGTS * k_scale_BKS[:, :, None, None, :]
    weights_BKGTS = _weights(scores_BKGTS, position_BT, score.factor(H), score)
    if v_scale_BKS is not None:
        weights_BKGTS = weights_BKGTS * v_scale_BKS[:, :, None, None, :]
    # Not asked for in float32: XLA:CPU has no such product of bfloat16.
    out_BTKGH = jnp.einsum(
        "BKGTS,BKSH->BTKGH", weights_BKGTS.astype(dtype), v_BKSH.astype(dtype)
    )
    return out_BTKGH.reshape(B, T, N, H)


def _weights(
    scores_BKGTS: jax.Array, position_BT: jax.Array, factor: float, score: Score
) -> jax.Array:
    """The softmax of what is seen."""
    scores_BKGTS = scores_BKGTS * jnp.float32(factor)
    if score.softcap is not None:
        cap = jnp.float32(score.softcap)
        scores_BKGTS = cap * jnp.tanh(scores_BKGTS / cap)
    at_S = jnp.arange(scores_BKGTS.shape[-1], dtype=jnp.int32)
    visible_BTS = at_S[None, None, :] <= position_BT[:, :, None]
    if score.window is not None:
        visible_BTS &= at_S[None, None, :] > position_BT[:, :, None] - score.window
    masked = jnp.float32(MASKED)
    shown = jnp.where(visible_BTS[:, None, None], scores_BKGTS, masked)
    return jax.nn.softmax(shown, axis=-1)


def write_tokens(
    cache: Arrays,
    new: Arrays,
    position_BT: jax.Array,
    layer: jax.Array,
    *,
    table_BM: jax.Array | None = None,
) -> Arrays:
    """See `api.write_tokens`."""
    if table_BM is not None:
        write = _scatter if position_BT.shape[1] <= _FEW_TOKENS else _write_pages
        return tuple(
            write(old, tokens, position_BT, table_BM, layer)
            for old, tokens in zip(cache, new, strict=True)
        )
    if position_BT.shape[1] == 1:
        return tuple(
            _write_one(old, token, position_BT[:, 0], layer)
            for old, token in zip(cache, new, strict=True)
        )
    return tuple(
        _write_many(old, tokens, position_BT, layer)
        for old, tokens in zip(cache, new, strict=True)
    )


def _scatter(
    old: jax.Array,
    tokens: jax.Array,
    position_BT: jax.Array,
    table_BM: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """Tokens to their pages; what has no page lies outside, and is dropped."""
    P, _, C = old.shape[1:4]
    page_BT, slot_BT = pages.places(position_BT, table_BM, P, C)
    return old.at[layer, page_BT, :, slot_BT].set(tokens, mode="drop")


def _write_pages(
    old: jax.Array,
    tokens: jax.Array,
    position_BT: jax.Array,
    table_BM: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """Many tokens, one page after another, in place, where a scatter for TPUs might
    copy the cache. W pages of a sequence are written.

    A page keeps what it has where no token goes; one that is not there keeps all, in
    the place of another.
    """
    (B, T), M = position_BT.shape, table_BM.shape[1]
    P, K, C = old.shape[1:4]
    touched = min((T + C - 2) // C + 1, M)
    first_B1 = position_BT[:, :1]
    at_W, at_C = (jnp.arange(size, dtype=jnp.int32) for size in (touched, C))
    m_BW = jnp.minimum(jnp.maximum(first_B1, 0) // C + at_W[None, :], M - 1)
    place_BWC = m_BW[:, :, None] * C + at_C[None, None, :]
    place_BS = place_BWC.reshape(B, touched * C)
    t_BS = jnp.clip(place_BS - first_B1, 0, T - 1)
    position_BT = pages.placed(position_BT, table_BM, P, C)
    is_new_BS = jnp.take_along_axis(position_BT, t_BS, axis=1) == place_BS
    rest = (1,) * (tokens.ndim - 2)
    fresh = jnp.take_along_axis(tokens, t_BS.reshape(*t_BS.shape, *rest), axis=1)
    fresh = fresh.reshape(B * touched, C, *tokens.shape[2:]).swapaxes(1, 2)
    is_new = is_new_BS.reshape(B * touched, 1, C, *rest[1:])
    page_BW = jnp.clip(jnp.take_along_axis(table_BM, m_BW, axis=1), 0, P - 1)
    page_i = page_BW.reshape(-1)

    def write(i: jax.Array, old: jax.Array) -> jax.Array:
        zero = jnp.zeros((), jnp.int32)
        corner = (layer, page_i[i], zero, zero) + (zero,) * (old.ndim - 4)
        kept = jax.lax.dynamic_slice(old, corner, (1, 1, *old.shape[2:]))
        made = jnp.where(is_new[i], fresh[i], kept[0, 0])
        return jax.lax.dynamic_update_slice(old, made[None, None], corner)

    return jax.lax.fori_loop(0, B * touched, write, old)


def _write_one(
    old: jax.Array, token: jax.Array, position_B: jax.Array, layer: jax.Array
) -> jax.Array:
    """One token of each sequence: a scatter."""
    B, S = old.shape[1], old.shape[3]
    # A negative index would count from the end; S lies outside and is dropped.
    position_B = jnp.where(position_B < 0, S, position_B)
    return old.at[layer, jnp.arange(B), :, position_B].set(token[:, 0], mode="drop")


def _write_many(
    old: jax.Array, tokens: jax.Array, position_BT: jax.Array, layer: jax.Array
) -> jax.Array:
    """T tokens of each sequence, one window of T slots after another, in place.

    A window that would end past the cache begins earlier, and keeps what it finds where
    no token goes.
    """
    B, T = position_BT.shape
    S = old.shape[3]
    assert T <= S, (T, S)

    def write(b: jax.Array, old: jax.Array) -> jax.Array:
        first = position_BT[b, 0]
        start = jnp.clip(first, 0, S - T)
        zero = jnp.zeros((), start.dtype)
        corner = (layer, b, zero, start) + (zero,) * (old.ndim - 4)
        window = (1, 1, old.shape[2], T, *old.shape[4:])
        t = start + jnp.arange(T) - first  # the token that goes to each slot
        is_new = (t >= 0) & (t < T)
        t = jnp.clip(t, 0, T - 1)
        is_new &= (position_BT[b, t] >= 0) & (position_BT[b, t] < S)
        fresh = tokens[b, t].swapaxes(0, 1)[None, None]
        is_new = is_new.reshape((1, 1, 1, T) + (1,) * (old.ndim - 4))
        kept = jax.lax.dynamic_slice(old, corner, window)
        return jax.lax.dynamic_update_slice(old, jnp.where(is_new, fresh, kept), corner)

    return jax.lax.fori_loop(0, B, write, old)
