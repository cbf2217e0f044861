"""Attention of a few new tokens over a KV cache, and writing them, on a TPU.

L layers, B sequences, T query tokens, S cache slots, N query heads, K key/value heads,
G = N/K, H head size, R = T * G rows that share a key/value head, C slots of a block,
P pages of C slots, M pages of a sequence at most.

Tiling: a grid step takes C slots of all K heads of one sequence: blocks of at most
_BLOCK_BYTES of keys and as many of values, so that a transfer is long enough to hide a
step's overhead. A sequence's steps keep running maxima, sums and weighted values of its
K * R rows in VMEM (FlashAttention, arXiv 2205.14135). Steps before its window or past
its position ask for a block that is there already: nothing moves, nothing is computed.
The layer is part of a block's address, so no layer of the cache is ever sliced out. Of
a paged cache a block is a page, whose address the step takes from the table; what no
query of a sequence sees of it counts as zero (`pages`).

VMEM: two blocks each of keys and values, at most 8 MiB; float32 scores and weights of
K * max(R, 8) * C; what a step converts to bfloat16. Written: blocks of the least height
that a transfer may have, with one row replaced. Steps that follow each other may write
one block: it is fetched and sent back once.

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
from llmos_jax.kernels.decode_attention import pages
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
    return T <= _MOST_TOKENS and _is_aligned(cache[0])


def _is_aligned(k: jax.Array) -> bool:
    """Whether heads, and slots (of a page), fill a register's lanes. Smaller heads
    would be padded: XLA lays them out otherwise, and would copy the cache for a
    kernel."""
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
    table_BM: jax.Array | None = None,
) -> jax.Array:
    """See `api.decode_attention`; of all layers, with one to look at."""
    # Imported here: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, T, N, H = q_BTNH.shape
    P, K, C = k_LBKSH.shape[1:4]
    if table_BM is None:
        S, C = C, block_slots(C, K * H * k_LBKSH.dtype.itemsize)
    else:
        S = table_BM.shape[1] * C
    R = T * (N // K)
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, R, H)
    position_BT = position_BT.astype(jnp.int32)
    if table_BM is not None:
        position_BT = pages.placed(position_BT, table_BM, P, C)
    span = pages.span(position_BT, S, score.window)
    scalars = [layer.reshape(1), position_BT, *span]
    scalars += [] if table_BM is None else [table_BM]

    def of_sequence(b: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, 0, 0, 0

    def of_slots(
        b: Any, j: Any, layer: Any, _: Any, first: Any, last: Any, *table: Any
    ) -> tuple[Any, ...]:
        j = jnp.clip(j, *_blocks(first[b], last[b], C))
        if table:
            return layer[0], jnp.clip(table[0][b, j], 0, P - 1), 0, 0, 0
        return layer[0], b, 0, j, 0

    per_row = pl.BlockSpec((1, K, R, H), of_sequence)
    slots = pl.BlockSpec((1, 1, K, C, H), of_slots)
    scales = pl.BlockSpec((1, 1, K, C), lambda *at: of_slots(*at)[:-1])
    cache = [k_LBKSH, v_LBKSH]
    if k_scale_LBKS is not None and v_scale_LBKS is not None:
        cache += [k_scale_LBKS, v_scale_LBKS]
    attend = _attend
    if table_BM is not None:
        attend = functools.partial(_attend_to_pages, P=P)
    out_BKRH = pl.pallas_call(
        functools.partial(attend, T=T, C=C, score=score),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BTNH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
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
    )(*scalars, q_BKRH, *cache)
    out_BTKGH = out_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2)
    return out_BTKGH.reshape(B, T, N, H)


def _blocks(first: Any, last: Any, C: int) -> tuple[Any, Any]:
    """The first and the last block that a sequence's queries see; one at least."""
    # `//` would ask which TPU it is, to round as Python does below zero.
    last = jax.lax.div(jnp.maximum(last, 0), C)
    return jnp.minimum(jax.lax.div(first, C), last), last


def _attend_to_pages(
    layer: Any,
    position: Any,
    first: Any,
    last: Any,
    table: Any,
    *refs: Any,
    P: int,
    **options: Any,
) -> None:
    """`_attend`, where blocks are pages."""
    _attend(layer, position, first, last, *refs, table=(table, P), **options)


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
    table: tuple[Any, int] | None = None,
) -> None:
    """One step: scalars of all sequences, then blocks of one."""
    from jax.experimental import pallas as pl

    *scales, out, top, total, summed = refs
    b, j = pl.program_id(0), pl.program_id(1)
    begin, end = _blocks(first[b], last[b], C)

    def only_seen(x: Any, axis: int, otherwise: float) -> Any:
        """What some query of the sequence sees; of a contiguous cache, all."""
        if table is None:
            return x
        page = table[0][b, j]
        is_there = (page >= 0) & (page < table[1])
        at = j * C + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        is_seen = (at >= first[b]) & (at <= jnp.where(is_there, last[b], -1))
        return jnp.where(is_seen, x, jnp.full((), otherwise, x.dtype))

    @pl.when(j == begin)
    def _begin() -> None:
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    @pl.when((j >= begin) & (j <= end))
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
        scores = only_seen(scores, 2, MASKED)
        new_top = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
        fade = jnp.exp(top[...] - new_top)
        weights = jnp.exp(scores - new_top)
        total[...] = total[...] * fade + jnp.sum(weights, axis=-1, keepdims=True)
        values = v[0, 0].astype(q_KRH.dtype)
        if scales:
            weights = weights * only_seen(scales[1][0, 0], 1, 0)[:, None, :]
        else:
            values = only_seen(values, 1, 0)
        part = _product(weights.astype(q_KRH.dtype), values, 1)
        summed[...] = summed[...] * fade + part
        top[...] = new_top

    @pl.when(j == end)
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
    cache: Arrays,
    new: Arrays,
    position_BT: jax.Array,
    layer: jax.Array,
    *,
    table_BM: jax.Array | None = None,
) -> Arrays:
    """See `api.write_tokens`; one token of each sequence after another."""
    for t in range(position_BT.shape[1]):
        token = tuple(x[:, t : t + 1] for x in new)
        cache = _write_one(cache, token, position_BT[:, t : t + 1], layer, table_BM)
    return cache


def _write_one(
    cache: Arrays,
    new: Arrays,
    position_B1: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array | None,
) -> Arrays:
    """Write one token of each sequence."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, S = position_B1.shape[0], cache[0].shape[3]
    row_B, slot_B = jnp.arange(B, dtype=jnp.int32), position_B1[:, 0].astype(jnp.int32)
    if table_BM is not None:
        row_B, slot_B, source_B = _pages_written(position_B1, table_BM, cache[0])
        new = tuple(x[source_B] for x in new)
    heights = [
        _WRITTEN_ROWS[old.dtype.itemsize] if old.ndim == 5 else _LANES for old in cache
    ]

    def at_slot(rows: int, ndim: int, b: Any, layer: Any, row: Any, slot: Any) -> Any:
        block = _block_of(slot[b], rows, S)
        return (layer[0], row[b], 0, block) + (0,) * (ndim - 4)

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
            num_scalar_prefetch=3,
            grid=(B,),
            in_specs=[*token_blocks, *blocks],
            out_specs=blocks,
        ),
        input_output_aliases={3 + len(new) + i: i for i in range(len(cache))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="write_tokens",
        interpret=_is_interpreted(),
    )(layer.reshape(1), row_B, slot_B, *tokens, *cache)
    return tuple(written)


def _pages_written(
    position_B1: jax.Array, table_BM: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The page and the slot that each step writes, and which sequence's token.

    A block fetched for a token without a page could be sent back over what another
    step wrote in it. So such a step repeats the one before it, or the first that has a
    page, whose block is then still there. Where none has one, page 0 stays as it is.
    """
    P, _, C = k.shape[1:4]
    page_B1, slot_B1 = pages.places(position_B1, table_BM, P, C)
    page_B, slot_B = page_B1[:, 0], slot_B1[:, 0]
    has_page_B = page_B < P
    row_B = jnp.arange(len(page_B), dtype=jnp.int32)
    before_B = jax.lax.cummax(jnp.where(has_page_B, row_B, -1))
    first = jnp.argmax(has_page_B).astype(jnp.int32)
    source_B = jnp.where(before_B >= 0, before_B, first)
    page_B, slot_B = page_B[source_B], slot_B[source_B]
    return jnp.where(page_B < P, page_B, 0), jnp.where(page_B < P, slot_B, -1), source_B


def _write(
    layer: Any, row: Any, slot_B: Any, *refs: Any, heights: tuple[int, ...], slots: int
) -> None:
    """Replace one row of each block, if it is the row of a token that has a place."""
    from jax.experimental import pallas as pl

    count = len(heights)
    tokens, old, out = refs[:count], refs[count : 2 * count], refs[2 * count :]
    slot = slot_B[pl.program_id(0)]
    for rows, token, before, after in zip(heights, tokens, old, out, strict=True):
        shape = before.shape[2:]
        # A position outside the cache is that of no row of the block next to it.
        first = _block_of(slot, rows, slots) * rows
        at = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        fresh = jnp.broadcast_to(token[0], shape)
        after[0, 0] = jnp.where(at == slot, fresh, before[0, 0])


def _block_of(slot: Any, rows: int, slots: int) -> Any:
    """The block that holds a slot, or the nearest there is."""
    return jax.lax.div(jnp.clip(slot, 0, slots - 1), rows)


def _is_interpreted() -> Any:
    return current_target().platform != "tpu"
