"""Attention of a few new tokens over a KV cache, and writing one token, on a TPU.

L layers, B sequences, T query tokens, S cache slots, N query heads, K key/value heads,
G = N/K, H head size, R = T * G rows that share a key/value head, C slots of a block.

Tiling: a grid step takes C slots of all K heads of one sequence: blocks of at most
_BLOCK_BYTES of keys and as many of values, so that a transfer is long enough to hide a
step's overhead. A sequence's steps keep running maxima, sums and weighted values of its
K * R rows in VMEM (FlashAttention, arXiv 2205.14135). Steps before its window or past
its position ask for a block that is there already: nothing moves, nothing is computed.
The layer is part of a block's address, so no layer of the cache is ever sliced out.

VMEM: two blocks each of keys and values, at most 8 MiB; float32 scores and weights of
K * max(R, 8) * C; what a step converts to bfloat16. Written: blocks of the least height
that a transfer may have, with one row replaced.

int8 tiles are converted to the dtype of the queries and never multiplied by their
scales: those of keys multiply scores, those of values weights. On other platforms it
runs in Pallas's interpreter, for tests. Not run on a TPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmos_jax.kernels.attention.reference import MASKED, Score
from llmos_jax.kernels.target import current_target

_LANES = 128
_MOST_TOKENS = 8
_BLOCK_BYTES = 2**20
"""Of keys, and of values, in one step."""

_WRITTEN_ROWS = {1: 32, 2: 16, 4: 8}
"""Slots of a block that is read, changed and written back, by bytes of an element: a
register's height."""

Arrays = tuple[jax.Array, ...]


def suits(q_BTNH: jax.Array, k: jax.Array) -> bool:
    """Whether this kernel is the one for these arrays on a TPU."""
    return q_BTNH.shape[1] <= _MOST_TOKENS and _is_aligned(k)


def writes(cache: Arrays, T: int) -> bool:
    """Whether `write_tokens` is for this cache on a TPU."""
    return T == 1 and _is_aligned(cache[0])


def _is_aligned(k: jax.Array) -> bool:
    """Whether heads fill a register's lanes. Smaller ones would be padded, so XLA lays
    them out otherwise and would copy the cache for a kernel."""
    S, H = k.shape[-2:]
    return S % _LANES == 0 and H % _LANES == 0


def block_slots(S: int, slot_bytes: int) -> int:
    """C: the most slots, in whole registers and dividing S, that a block may have."""
    most = max(_BLOCK_BYTES // slot_bytes, _LANES)
    return max(C for C in range(_LANES, S + 1, _LANES) if S % C == 0 and C <= most)


def decode_attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    k_scale_LBKS: jax.Array | None,
    v_scale_LBKS: jax.Array | None,
    *,
    score: Score,
    layer: jax.Array,
) -> jax.Array:
    """See `api.decode_attention`; of all layers, with one to look at."""
    # Imported here: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, T, N, H = q_BTNH.shape
    K, S = k_LBKSH.shape[2:4]
    R = T * (N // K)
    C = block_slots(S, K * H * k_LBKSH.dtype.itemsize)
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, R, H)
    first_B, last_B = _blocks(position_BT, score.window, S, C)

    def of_sequence(b: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, 0, 0, 0

    def of_slots(b: Any, j: Any, layer: Any, _: Any, first: Any, last: Any) -> Any:
        return layer[0], b, 0, jnp.clip(j, first[b], last[b]), 0

    per_row = pl.BlockSpec((1, K, R, H), of_sequence)
    slots = pl.BlockSpec((1, 1, K, C, H), of_slots)
    scales = pl.BlockSpec((1, 1, K, C), lambda *at: of_slots(*at)[:-1])
    cache = [k_LBKSH, v_LBKSH]
    if k_scale_LBKS is not None and v_scale_LBKS is not None:
        cache += [k_scale_LBKS, v_scale_LBKS]
    out_BKRH = pl.pallas_call(
        functools.partial(_attend, T=T, C=C, score=score),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BTNH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, S // C),
            in_specs=[per_row, *(slots, slots, scales, scales)[: len(cache)]],
            out_specs=per_row,
            scratch_shapes=[
                pltpu.VMEM((K, R, 1), jnp.float32),
                pltpu.VMEM((K, R, 1), jnp.float32),
                pltpu.VMEM((K, R, H), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
        ),
        name="decode_attention",
        interpret=_is_interpreted(),
    )(
        *(layer.reshape(1), position_BT.astype(jnp.int32), first_B, last_B),
        *(q_BKRH, *cache),
    )
    out_BTKGH = out_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2)
    return out_BTKGH.reshape(B, T, N, H)


def _blocks(
    position_BT: jax.Array, window: int | None, S: int, C: int
) -> tuple[jax.Array, jax.Array]:
    """The first and the last block that a sequence's queries see; one at least."""
    last_B = jnp.clip(jnp.max(position_BT, axis=1), 0, S - 1) // C
    if window is None:
        return jnp.zeros_like(last_B), last_B
    begin_B = jnp.min(position_BT, axis=1) - window + 1
    return jnp.clip(begin_B, 0, last_B * C) // C, last_B


def _attend(
    layer: Any,
    position: Any,
    first: Any,
    last: Any,
    q: Any,
    k: Any,
    v: Any,
    *refs: Any,
    T: int,
    C: int,
    score: Score,
) -> None:
    """One step: scalars of all sequences, then blocks of one."""
    from jax.experimental import pallas as pl

    *scales, out, top, total, summed = refs
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == first[b])
    def _begin() -> None:
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    @pl.when((j >= first[b]) & (j <= last[b]))
    def _step() -> None:
        q_KRH = q[0]
        scores = _product(q_KRH, k[0, 0].astype(q_KRH.dtype), 2)
        scores = scores * jnp.float32(score.factor(q_KRH.shape[-1]))
        if scales:
            scores = scores * scales[0][0, 0][:, None, :]
        if score.softcap is not None:
            cap = jnp.float32(score.softcap)
            scores = cap * jnp.tanh(scores / cap)
        visible = _visible(scores.shape, j * C, [position[b, t] for t in range(T)])
        scores = jnp.where(visible(score.window), scores, jnp.float32(MASKED))
        new_top = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
        fade = jnp.exp(top[...] - new_top)
        weights = jnp.exp(scores - new_top)
        total[...] = total[...] * fade + jnp.sum(weights, axis=-1, keepdims=True)
        if scales:
            weights = weights * scales[1][0, 0][:, None, :]
        part = _product(weights.astype(q_KRH.dtype), v[0, 0].astype(q_KRH.dtype), 1)
        summed[...] = summed[...] * fade + part
        top[...] = new_top

    @pl.when(j == last[b])
    def _end() -> None:
        out[0] = (summed[...] / total[...]).astype(out.dtype)


def _product(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Of each head: a's last dimension with `contract` of b, in float32."""
    dims = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _visible(shape: tuple[int, ...], first: Any, positions: list[Any]) -> Any:
    """window -> bool [K, R, C]: what each row sees of the slots from `first` on."""
    at = first + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    G = shape[1] // len(positions)
    p = jnp.full(shape, positions[0], jnp.int32)
    for t, position in enumerate(positions[1:], 1):
        p = jnp.where(row >= t * G, position, p)

    def seen(window: int | None) -> jax.Array:
        if window is None:
            return at <= p
        return (at <= p) & (at > p - window)

    return seen


def write_tokens(
    cache: Arrays, new: Arrays, position_BT: jax.Array, layer: jax.Array
) -> Arrays:
    """See `api.write_tokens`; one token of each sequence."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, S = position_BT.shape[0], cache[0].shape[3]
    heights = [
        _WRITTEN_ROWS[old.dtype.itemsize] if old.ndim == 5 else _LANES for old in cache
    ]

    def at_slot(rows: int, ndim: int, b: Any, layer: Any, position: Any) -> Any:
        block = _block_of(position[b], rows, S)
        return (layer[0], b, 0, block) + (0,) * (ndim - 4)

    blocks = [
        pl.BlockSpec(
            (1, 1, old.shape[2], rows, *old.shape[4:]),
            functools.partial(at_slot, rows, old.ndim),
        )
        for old, rows in zip(cache, heights, strict=True)
    ]
    # [B, 1, K, H] and [B, 1, K]: a token's, with its slot last as in the cache.
    tokens = [x[:, 0, :, None] for x in new]
    token_blocks = [
        pl.BlockSpec((1, *x.shape[1:]), lambda b, *_, n=x.ndim: (b,) + (0,) * (n - 1))
        for x in tokens
    ]
    written = pl.pallas_call(
        functools.partial(_write, heights=tuple(heights), slots=S),
        out_shape=[jax.ShapeDtypeStruct(old.shape, old.dtype) for old in cache],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B,),
            in_specs=[*token_blocks, *blocks],
            out_specs=blocks,
        ),
        input_output_aliases={2 + len(new) + i: i for i in range(len(cache))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="write_tokens",
        interpret=_is_interpreted(),
    )(layer.reshape(1), position_BT[:, 0].astype(jnp.int32), *tokens, *cache)
    return tuple(written)


def _write(
    layer: Any, position: Any, *refs: Any, heights: tuple[int, ...], slots: int
) -> None:
    """Replace one row of each block, if it is the row of a token that has a place."""
    from jax.experimental import pallas as pl

    count = len(heights)
    tokens, old, out = refs[:count], refs[count : 2 * count], refs[2 * count :]
    slot = position[pl.program_id(0)]
    for rows, token, before, after in zip(heights, tokens, old, out, strict=True):
        shape = before.shape[2:]
        # A position outside the cache is that of no row of the block next to it.
        first = _block_of(slot, rows, slots) * rows
        row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        is_here = row == slot
        fresh = jnp.broadcast_to(token[0], shape)
        after[0, 0] = jnp.where(is_here, fresh, before[0, 0])


def _block_of(slot: Any, rows: int, slots: int) -> Any:
    """The block that holds a slot, or the nearest there is."""
    # `//` would ask which TPU it is, to round as Python does below zero.
    return jax.lax.div(jnp.clip(slot, 0, slots - 1), rows)


def _is_interpreted() -> Any:
    return current_target().platform != "tpu"
