"""Attention in plain XLA that never holds whole scores, forward or backward.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
H head size.

Queries pass in blocks of at most BLOCK rows, and under each the keys in blocks of at
most BLOCK, with a running maximum and sum (FlashAttention, arXiv 2205.14135): float32
scores exist for B * N * BLOCK * BLOCK pairs at a time. The inner loop runs from the
first to the last key that any query of the block sees: causal attention costs about
half, and a sliding window less in proportion to its size. The backward
pass keeps the output and the log-sum-exp of each row, both named CONTEXT for remat
policies, and makes the scores again; dk and dv are summed in float32.

Any shape, dtype and position; no forward-mode differentiation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.kernels.attention.reference import (
    CONTEXT,
    MASKED,
    PLAIN,
    Score,
    Segments,
    above_masked,
    einsum,
    hide_unseen,
    part_position,
    scores,
    slope,
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


class Blocks(NamedTuple):
    """What the tracer knows of a call."""

    rows: int
    """Queries in a block."""
    columns: int
    """Keys in a block."""
    S: int
    """Keys, without padding."""
    score: Score


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    if position_BT is None:
        position_BT = whole(1, T)
    segments = None if segment_BT is None else (segment_BT, segment_BT)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments, score)
    out_BTKGH = _blocked(*operands, blocks)
    return out_BTKGH[:, :T].reshape(B, T, N, H)


def forward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
    score: Score = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward_part`."""
    B, T, N, H = q_BTNH.shape
    position_BT = part_position(T, k_BSKH.shape[1], causal)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments, score)
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
    score: Score = PLAIN,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.backward_part`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    position_BT = part_position(T, S, causal)
    operands, blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, position_BT, segments, score)
    rows = blocks.rows
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
    score: Score,
) -> tuple[Operands, Blocks]:
    """Group heads, and pad to whole blocks."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    rows, columns = _block(T, _SUBLANES), _block(S, _LANES)
    if segments is not None:
        segments = _pad(segments[0], rows), _pad(segments[1], columns)
    operands = (
        _pad(q_BTNH.reshape(B, T, K, N // K, H), rows),
        _pad(k_BSKH, columns),
        _pad(v_BSKH, columns),
        # Padded queries stand where the last one does: they lengthen no loop.
        _pad(position_BT.astype(jnp.int32), rows, mode="edge"),
        segments,
    )
    return operands, Blocks(rows, columns, S, score)


def _pad(
    x: jax.Array, block: int, *, axis: int = 1, mode: str = "constant"
) -> jax.Array:
    """Pad an axis to a multiple of `block`; with zeros, if `mode` says nothing else."""
    missing = -x.shape[axis] % block
    padding = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding, mode=mode)


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
    rows, columns, score = blocks.rows, blocks.columns, blocks.score

    def query_block(_: None, i: jax.Array) -> tuple[None, Pair]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            top, total, sums = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            both = _meeting(segments, i, j, blocks)
            block = scores(q, k, position, both, score, _keys_at(j, blocks))
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
        begin, end = _span(position, blocks)
        top, total, sums = jax.lax.fori_loop(begin, end, key_block, start)
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
    rows, columns, score = blocks.rows, blocks.columns, blocks.score

    def query_block(carry: Pair, i: jax.Array) -> tuple[Pair, jax.Array]:
        q, position = _slice(q_BTKGH, i, rows), _slice(position_BT, i, rows)
        dout = _slice(dout_BTKGH, i, rows)
        lse = _slice(lse_BKGT, i, rows, axis=3)
        mean = _slice(mean_BKGT, i, rows, axis=3)

        def key_block(j: jax.Array, carry: Arrays) -> Arrays:
            dq, dk_BSKH, dv_BSKH = carry
            k, v = _slice(k_BSKH, j, columns), _slice(v_BSKH, j, columns)
            both = _meeting(segments, i, j, blocks)
            block = scores(q, k, position, both, score, _keys_at(j, blocks))
            weights = jnp.exp(block - lse[..., None])
            dweights = einsum("BTKGH,BSKH->BKGTS", dout, v)
            dscores = weights * (dweights - mean[..., None])
            dscores = (dscores * slope(block, H, score)).astype(q.dtype)
            dv = einsum("BKGTS,BTKGH->BSKH", weights.astype(dout.dtype), dout)
            dk = einsum("BKGTS,BTKGH->BSKH", dscores, q)
            dq = dq + einsum("BKGTS,BSKH->BTKGH", dscores, k)
            return dq, _add(dk_BSKH, j, dk), _add(dv_BSKH, j, dv)

        begin, end = _span(position, blocks)
        dq = jnp.zeros(q.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(begin, end, key_block, (dq, *carry))
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
    return (
        _slice(segments[0], i, blocks.rows),
        _slice(segments[1], j, blocks.columns),
    )


def _keys_at(j: jax.Array, blocks: Blocks) -> jax.Array:
    """Positions of key block `j`; padded keys stand where no query sees them."""
    at_S = j * blocks.columns + jnp.arange(blocks.columns, dtype=jnp.int32)
    return jnp.where(at_S < blocks.S, at_S, jnp.iinfo(jnp.int32).max)


def _span(position_BT: jax.Array, blocks: Blocks) -> tuple[jax.Array | int, jax.Array]:
    """The first key block with a key that a query sees, and the one after the last;
    one block even if they see none."""
    columns = blocks.columns
    count = -(-blocks.S // columns)
    end = jnp.clip(jnp.max(position_BT) // columns + 1, 1, count)
    if blocks.score.window is None:
        return 0, end
    first = jnp.min(position_BT) - blocks.score.window + 1
    return jnp.clip(first // columns, 0, end - 1), end


def _slice(x: jax.Array, i: jax.Array, block: int, *, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add(x_BSKH: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
    """Add a block of keys' gradients in its place."""
    S = part.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x_BSKH, _slice(x_BSKH, j, S) + part, j * S, axis=1
    )
