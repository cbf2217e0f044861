"""Attention in plain XLA that never holds whole scores, forward or backward.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
H head size.

Queries pass in blocks of at most BLOCK rows, and under each the keys in blocks of at
most BLOCK, with a running maximum and sum (FlashAttention, arXiv 2205.14135): float32
scores exist for B * N * BLOCK * BLOCK pairs at a time. The inner loop ends at the last
key that any query of the block sees, so causal attention costs about half. The backward
pass keeps the output and the log-sum-exp of each row, both named CONTEXT for remat
policies, and makes the scores again; dk and dv are summed in float32.

Any shape, dtype and position; no forward-mode differentiation.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.kernels.attention.reference import CONTEXT, rotate, whole

BLOCK = 512
"""Rows and columns of a block: 32 heads' scores take 32 MiB for one sequence. Not
measured on a TPU."""

_LANES, _SUBLANES = 128, 8
"""A TPU's registers; blocks are whole ones, so that slices need no shuffling."""

Arrays: TypeAlias = tuple[jax.Array, ...]
Pair: TypeAlias = tuple[jax.Array, jax.Array]
Blocks: TypeAlias = tuple[int, int]
"""Query rows and keys in a block."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    if position_BT is None:
        position_BT = whole(1, T)
    # A padded key is at S or later, and no query stands there.
    position_BT = jnp.minimum(position_BT.astype(jnp.int32), S - 1)
    blocks = (_block(T, _SUBLANES), _block(S, _LANES))
    out_BTKGH = _blocked(
        _pad(q_BTNH.reshape(B, T, K, N // K, H), blocks[0]),
        _pad(k_BSKH, blocks[1]),
        _pad(v_BSKH, blocks[1]),
        _pad(position_BT, blocks[0]),
        blocks,
    )
    return out_BTKGH[:, :T].reshape(B, T, N, H)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """See `api.rotary_attention`."""
    q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
    return attention(q_BTNH, k_BTKH, v_BTKH, position_BT)


def suits(T: int) -> bool:
    """Whether the scores are worth splitting: not for a decoding step."""
    return T > BLOCK


def _block(size: int, multiple: int) -> int:
    """Split evenly into blocks of at most BLOCK, rounded up to whole registers."""
    even = -(-size // -(-size // BLOCK))
    return -(-even // multiple) * multiple


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Pad axis 1 with zeros to a multiple of `block`."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    blocks: Blocks,
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, position_BT, blocks)[0]


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, Arrays]:
    """Return the output, and what the backward pass reads."""
    B, T, K, G, H = q_BTKGH.shape
    rows, columns = blocks

    def query_block(_: None, i: jax.Array) -> tuple[None, Arrays]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            top, total, sums = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            scores = _scores(q, k, position, j)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            fade = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            part = _einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v)
            return (
                new_top,
                total * fade + jnp.sum(weights, axis=-1),
                sums * fade[..., None] + part,
            )

        start = (
            jnp.full((B, K, G, rows), jnp.finfo(jnp.float32).min),
            jnp.zeros((B, K, G, rows), jnp.float32),
            jnp.zeros((B, K, G, rows, H), jnp.float32),
        )
        end = _end(position, k_BSKH.shape[1], columns)
        top, total, sums = jax.lax.fori_loop(0, end, key_block, start)
        out = jnp.moveaxis(sums / total[..., None], 3, 1).astype(v_BSKH.dtype)
        return None, (out, top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(T // rows))
    out_BTKGH = checkpoint_name(jnp.moveaxis(out, 0, 1).reshape(B, T, K, G, H), CONTEXT)
    lse_BKGT = checkpoint_name(jnp.moveaxis(lse, 0, 3).reshape(B, K, G, T), CONTEXT)
    return out_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, position_BT, out_BTKGH, lse_BKGT)


def _backward(
    blocks: Blocks, saved: Arrays, dout_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTKGH, k_BSKH, v_BSKH, position_BT, out_BTKGH, lse_BKGT = saved
    B, T, K, G, H = q_BTKGH.shape
    rows, columns = blocks
    scale = jnp.float32(H**-0.5)

    def query_block(carry: Pair, i: jax.Array) -> tuple[Pair, jax.Array]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)
        out, dout = _slice(out_BTKGH, i, rows), _slice(dout_BTKGH, i, rows)
        lse = _slice(lse_BKGT, i, rows, axis=3)
        mean = _einsum("BTKGH,BTKGH->BKGT", out, dout)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            dq, dk_BSKH, dv_BSKH = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            weights = jnp.exp(_scores(q, k, position, j) - lse[..., None])
            dweights = _einsum("BTKGH,BSKH->BKGTS", dout, v)
            dscores = weights * (dweights - mean[..., None]) * scale
            dscores = dscores.astype(q.dtype)
            dv = _einsum("BKGTS,BTKGH->BSKH", weights.astype(dout.dtype), dout)
            dk = _einsum("BKGTS,BTKGH->BSKH", dscores, q)
            dq = dq + _einsum("BKGTS,BSKH->BTKGH", dscores, k)
            return dq, _add(dk_BSKH, j, dk), _add(dv_BSKH, j, dv)

        end = _end(position, k_BSKH.shape[1], columns)
        dq = jnp.zeros(q.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(0, end, key_block, (dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k_BSKH.shape, jnp.float32)
    steps = jnp.arange(T // rows)
    (dk_BSKH, dv_BSKH), dq = jax.lax.scan(query_block, (zeros, zeros), steps)
    dq_BTKGH = jnp.moveaxis(dq, 0, 1).reshape(B, T, K, G, H)
    return dq_BTKGH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


_blocked.defvjp(_forward, _backward)


def _scores(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, position_BT: jax.Array, j: jax.Array
) -> jax.Array:
    """Scaled and masked scores [B, K, G, T, S] of one block, in float32."""
    H, S = q_BTKGH.shape[-1], k_BSKH.shape[1]
    scores_BKGTS = _einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    slots = (j * S + jnp.arange(S, dtype=jnp.int32))[None, None, :]
    visible_BTS = slots <= position_BT[:, :, None]
    return jnp.where(
        visible_BTS[:, None, None, :, :],
        scores_BKGTS * jnp.float32(H**-0.5),
        jnp.finfo(jnp.float32).min,
    )


def _end(position_BT: jax.Array, S: int, columns: int) -> jax.Array:
    """Key blocks up to the last key that a query sees; one even if it sees none."""
    return jnp.clip(jnp.max(position_BT) // columns + 1, 1, S // columns)


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)


def _slice(x: jax.Array, i: jax.Array, block: int, *, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add(x_BSKH: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
    """Add a block of keys' gradients in its place."""
    S = part.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x_BSKH, _slice(x_BSKH, j, S) + part, j * S, axis=1
    )
