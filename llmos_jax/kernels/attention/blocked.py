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

from llmos_jax.kernels.attention.reference import (
    CONTEXT,
    MASKED,
    Segments,
    above_masked,
    einsum,
    hide_unseen,
    part_position,
    scores,
    whole,
)

BLOCK = 512
"""Rows and columns of a block: 32 heads' scores take 32 MiB for one sequence. Not
measured on a TPU."""

_LANES, _SUBLANES = 128, 8
"""A TPU's registers; blocks are whole ones, so that slices need no shuffling."""

Arrays: TypeAlias = tuple[jax.Array, ...]
Pair: TypeAlias = tuple[jax.Array, jax.Array]
Operands: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Segments | None]
"""q, k, v, positions and segments, in whole blocks."""
Blocks: TypeAlias = tuple[int, int]
"""Query rows and keys in a block."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    if position_BT is None:
        position_BT = whole(1, T)
    segments = None if segment_BT is None else (segment_BT, segment_BT)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments)
    out_BTKGH = _blocked(*operands, blocks)
    return out_BTKGH[:, :T].reshape(B, T, N, H)


def forward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward_part`."""
    B, T, N, H = q_BTNH.shape
    position_BT = part_position(T, k_BSKH.shape[1], causal)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments)
    out_BTKGH, lse_BKGT = _forward(*operands, blocks)
    out_BTNH = out_BTKGH[:, :T].reshape(B, T, N, H)
    return hide_unseen(out_BTNH, lse_BKGT[..., :T].reshape(B, N, T))


def backward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    dout_BTNH: jax.Array,
    lse_BNT: jax.Array,
    mean_BNT: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.backward_part`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    position_BT = part_position(T, S, causal)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments)
    rows = blocks[0]
    dout_BTKGH = _pad(dout_BTNH.reshape(B, T, K, N // K, H), rows)
    lse_BKGT, mean_BKGT = (
        _pad(x.reshape(B, K, N // K, T), rows, axis=3)
        for x in (above_masked(lse_BNT), mean_BNT)
    )
    dq, dk, dv = _backward(*operands, dout_BTKGH, lse_BKGT, mean_BKGT, blocks)
    return dq[:, :T].reshape(B, T, N, H), dk[:, :S], dv[:, :S]


def suits(T: int) -> bool:
    """Whether the scores are worth splitting: not for a decoding step."""
    return T > BLOCK


def _block(size: int, multiple: int) -> int:
    """Split evenly into blocks of at most BLOCK, rounded up to whole registers."""
    even = -(-size // -(-size // BLOCK))
    return -(-even // multiple) * multiple


def _in_blocks(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
) -> tuple[Operands, Blocks]:
    """Group heads, and pad to whole blocks."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    # A padded key is at S or later, and no query stands there.
    position_BT = jnp.minimum(position_BT.astype(jnp.int32), S - 1)
    rows, columns = blocks = (_block(T, _SUBLANES), _block(S, _LANES))
    if segments is not None:
        segments = _pad(segments[0], rows), _pad(segments[1], columns)
    operands = (
        _pad(q_BTNH.reshape(B, T, K, N // K, H), rows),
        _pad(k_BSKH, columns),
        _pad(v_BSKH, columns),
        _pad(position_BT, rows),
        segments,
    )
    return operands, blocks


def _pad(x: jax.Array, block: int, *, axis: int = 1) -> jax.Array:
    """Pad an axis with zeros to a multiple of `block`."""
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
    blocks: Blocks,
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, position_BT, segments, blocks)[0]


def _differentiable(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
    blocks: Blocks,
) -> tuple[jax.Array, tuple[Operands, jax.Array, jax.Array]]:
    """Return the output, and what the backward pass reads."""
    operands = (q_BTKGH, k_BSKH, v_BSKH, position_BT, segments)
    out_BTKGH, lse_BKGT = (
        checkpoint_name(x, CONTEXT) for x in _forward(*operands, blocks)
    )
    return out_BTKGH, (operands, out_BTKGH, lse_BKGT)


def _gradients(
    blocks: Blocks,
    saved: tuple[Operands, jax.Array, jax.Array],
    dout_BTKGH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    operands, out_BTKGH, lse_BKGT = saved
    k_BSKH, v_BSKH = operands[1:3]
    mean_BKGT = einsum("BTKGH,BTKGH->BKGT", out_BTKGH, dout_BTKGH)
    dq, dk, dv = _backward(*operands, dout_BTKGH, lse_BKGT, mean_BKGT, blocks)
    return dq, dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype), None, None


_blocked.defvjp(_differentiable, _gradients)


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """Return the output and the log-sum-exp [B, K, G, T]."""
    B, T, K, G, H = q_BTKGH.shape
    rows, columns = blocks

    def query_block(_: None, i: jax.Array) -> tuple[None, Pair]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            top, total, sums = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            both = _meeting(segments, i, j, blocks)
            block = scores(q, k, position - j * columns, both)
            new_top = jnp.maximum(top, jnp.max(block, axis=-1))
            fade = jnp.exp(top - new_top)
            weights = jnp.exp(block - new_top[..., None])
            part = einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v)
            return (
                new_top,
                total * fade + jnp.sum(weights, axis=-1),
                sums * fade[..., None] + part,
            )

        start = (
            jnp.full((B, K, G, rows), MASKED, jnp.float32),
            jnp.zeros((B, K, G, rows), jnp.float32),
            jnp.zeros((B, K, G, rows, H), jnp.float32),
        )
        end = _end(position, k_BSKH.shape[1], columns)
        top, total, sums = jax.lax.fori_loop(0, end, key_block, start)
        out = jnp.moveaxis(sums / total[..., None], 3, 1).astype(v_BSKH.dtype)
        return None, (out, top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(T // rows))
    out_BTKGH = jnp.moveaxis(out, 0, 1).reshape(B, T, K, G, H)
    return out_BTKGH, jnp.moveaxis(lse, 0, 3).reshape(B, K, G, T)


def _backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
    dout_BTKGH: jax.Array,
    lse_BKGT: jax.Array,
    mean_BKGT: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return dq in the dtype of q, and dk and dv in float32.

    Args:
        mean_BKGT: the gradient's mean over a row's weights: its output times `dout`.
    """
    B, T, K, G, H = q_BTKGH.shape
    rows, columns = blocks
    scale = jnp.float32(H**-0.5)

    def query_block(carry: Pair, i: jax.Array) -> tuple[Pair, jax.Array]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)
        dout = _slice(dout_BTKGH, i, rows)
        lse = _slice(lse_BKGT, i, rows, axis=3)
        mean = _slice(mean_BKGT, i, rows, axis=3)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            dq, dk_BSKH, dv_BSKH = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            both = _meeting(segments, i, j, blocks)
            block = scores(q, k, position - j * columns, both)
            weights = jnp.exp(block - lse[..., None])
            dweights = einsum("BTKGH,BSKH->BKGTS", dout, v)
            dscores = weights * (dweights - mean[..., None]) * scale
            dscores = dscores.astype(q.dtype)
            dv = einsum("BKGTS,BTKGH->BSKH", weights.astype(dout.dtype), dout)
            dk = einsum("BKGTS,BTKGH->BSKH", dscores, q)
            dq = dq + einsum("BKGTS,BSKH->BTKGH", dscores, k)
            return dq, _add(dk_BSKH, j, dk), _add(dv_BSKH, j, dv)

        end = _end(position, k_BSKH.shape[1], columns)
        dq = jnp.zeros(q.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(0, end, key_block, (dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k_BSKH.shape, jnp.float32)
    steps = jnp.arange(T // rows)
    (dk_BSKH, dv_BSKH), dq = jax.lax.scan(query_block, (zeros, zeros), steps)
    return jnp.moveaxis(dq, 0, 1).reshape(B, T, K, G, H), dk_BSKH, dv_BSKH


def _meeting(
    segments: Segments | None, i: jax.Array, j: jax.Array, blocks: Blocks
) -> Segments | None:
    """Segments of query block `i` and of key block `j`."""
    if segments is None:
        return None
    return _slice(segments[0], i, blocks[0]), _slice(segments[1], j, blocks[1])


def _end(position_BT: jax.Array, S: int, columns: int) -> jax.Array:
    """Key blocks up to the last key that a query sees; one even if it sees none."""
    return jnp.clip(jnp.max(position_BT) // columns + 1, 1, S // columns)


def _slice(x: jax.Array, i: jax.Array, block: int, *, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add(x_BSKH: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
    """Add a block of keys' gradients in its place."""
    S = part.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x_BSKH, _slice(x_BSKH, j, S) + part, j * S, axis=1
    )
