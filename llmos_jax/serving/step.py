"""Prefill and decode as one compiled program each, with the sampler inside.

B rows of a dispatch, T tokens of a chunk, S places of a slot, K most steps, E stops.

A slot holds one sequence: a row of the KV cache and a row of the token pool. The pool
stays on the device, so a step finds its input where the step before wrote it, and many
steps run in one dispatch. Both are donated: they are changed in place.

Whether a row still runs is read off, never stored: its last token is one that was
sampled and no stop, and its limit is not reached. So the host ends a sequence by
handing over another limit, and a step dispatched too many does no harm.

A row that does not run computes all the same, where it can hurt nobody: at the next
place of its own slot, which the next prefill overwrites before anyone looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.scheduling import Sampling
from llmos_jax.serving.forward import Cache, Forward, Weights
from llmos_jax.serving.penalties import Counts, count, counted
from llmos_jax.serving.sampler import Needs, SamplingRows, rows_of, sample

MOST_STEPS = 32
"""K: a judgement; it bounds what a request that stops early waits for."""
NO_TOKEN = -1
"""Where a row had ended."""
_STOPS_MULTIPLE = 4


class DecodeState(NamedTuple):
    """What lives on the device from one dispatch to the next."""

    cache: Cache
    pool: jax.Array
    """int32 [slots, S]: the tokens of each slot's sequence, by position."""
    position: jax.Array
    """int32 [slots]: how many tokens are known, which is where the next one goes."""


class Rows(NamedTuple):
    """What a dispatch is told of its rows: all of it stays the same while they run."""

    slot: jax.Array | None
    """int32 [B]; one outside of the pool marks a padding row. None: row b, slot b."""
    prompt: jax.Array
    """int32 [B]: tokens of the prompt."""
    limit: jax.Array
    """int32 [B]: the most tokens of the sequence; 0 where nothing is to run."""
    stop: jax.Array
    """int32 [B, E]: tokens that end the sequence; NO_TOKEN fills up."""
    sampling: SamplingRows


def empty_state(model: Forward, slots: int, length: int) -> DecodeState:
    """Room for `slots` sequences of at most `length` tokens."""
    return DecodeState(
        cache=model.empty_cache(slots, length),
        pool=jnp.full((slots, length), NO_TOKEN, jnp.int32),
        position=jnp.zeros((slots,), jnp.int32),
    )


class Row(NamedTuple):
    """One row as the host knows it."""

    prompt: int
    limit: int
    stop: frozenset[int]
    sampling: Sampling


FREE = Row(prompt=0, limit=0, stop=frozenset(), sampling=Sampling())
"""A row of nobody."""


def rows_on_device(
    rows: Sequence[Row], needs: Needs, slots: Sequence[int] | None = None
) -> Rows:
    """Lay out rows as arrays; programs differ by `needs` and by the most stops."""
    most = max(len(row.stop) for row in rows)
    width = max(1, -(-most // _STOPS_MULTIPLE)) * _STOPS_MULTIPLE
    stop = np.full((len(rows), width), NO_TOKEN, np.int32)
    for index, row in enumerate(rows):
        stop[index, : len(row.stop)] = sorted(row.stop)
    return Rows(
        slot=None if slots is None else jnp.asarray(slots, jnp.int32),
        prompt=jnp.asarray([row.prompt for row in rows], jnp.int32),
        limit=jnp.asarray([row.limit for row in rows], jnp.int32),
        stop=jnp.asarray(stop),
        sampling=rows_of([row.sampling for row in rows], needs),
    )


class Programs(NamedTuple):
    """The jitted programs of a model; each donates its state."""

    prefill: Callable[..., tuple[DecodeState, jax.Array]]
    """(params, state, chunk, rows) -> (state, token [1])."""
    decode: Callable[..., tuple[DecodeState, jax.Array]]
    """(params, state, rows, steps, fewest) -> (state, tokens [B, K])."""


Choose = Callable[[jax.Array, SamplingRows, Counts | None, jax.Array], jax.Array]
"""What `sampler.sample` does."""


def programs(
    model: Forward,
    vocab_size: int,
    sharding: jax.sharding.Sharding | None = None,
    choose: Choose = sample,
) -> Programs:
    """Return both programs; each compiles once per shape of what it is given.

    Args:
        model: what they trace.
        vocab_size: of its logits.
        sharding: of the state and what comes back; None: what the compiler chooses.
        choose: how tokens are chosen, where a mesh wants it done otherwise.
    """
    jit = partial(jax.jit, donate_argnums=1, out_shardings=sharding)
    return Programs(
        prefill=jit(partial(_prefill, model, choose)),
        decode=jit(partial(_decode, model, choose, vocab_size)),
    )


class Chunk(NamedTuple):
    """Some consecutive tokens of one prompt."""

    tokens: jax.Array | np.ndarray
    """int32 [1, T], padded at the end; start + T is at most S."""
    start: jax.Array | np.int32
    """The position of the first."""
    length: jax.Array | np.int32
    """How many there are without the padding, at least 1."""
    is_last: jax.Array | np.bool_
    """Whether the prompt ends here, so that a token is sampled."""


def _prefill(
    model: Forward,
    choose: Choose,
    params: Weights,
    state: DecodeState,
    chunk: Chunk,
    rows: Rows,
) -> tuple[DecodeState, jax.Array]:
    """Write a chunk of one prompt; after its last, the first token of the answer.

    The token comes back as int32 [1]; NO_TOKEN after a chunk that is not the last.
    """
    T, S = chunk.tokens.shape[1], state.pool.shape[1]
    tokens_1T = jnp.asarray(chunk.tokens)
    slot_1 = jnp.zeros((1,), jnp.int32) if rows.slot is None else rows.slot
    position_1T = (chunk.start + jnp.arange(T, dtype=jnp.int32))[None, :]
    x_1TD, cache = model.forward(params, tokens_1T, position_1T, rows.slot, state.cache)
    last_11D = jax.lax.dynamic_slice_in_dim(x_1TD, chunk.length - 1, 1, axis=1)
    logits_1V = model.logits(params, last_11D)[:, 0]

    end_1 = jnp.asarray(chunk.start + chunk.length, jnp.int32)[None]
    place_1T = jnp.where(position_1T < end_1[:, None], position_1T, S)
    pool = state.pool.at[slot_1[:, None], place_1T].set(tokens_1T, mode="drop")
    counts = _counts(rows, pool[slot_1], end_1, logits_1V.shape[1])
    token_1 = choose(logits_1V, rows.sampling, counts, end_1)
    token_1 = jnp.where(chunk.is_last, token_1, NO_TOKEN)
    place_1 = jnp.where(chunk.is_last, end_1, S)
    return DecodeState(
        cache=cache,
        pool=pool.at[slot_1, place_1].set(token_1, mode="drop"),
        position=state.position.at[slot_1].set(
            end_1 + jnp.asarray(chunk.is_last, jnp.int32)
        ),
    ), token_1


class _Loop(NamedTuple):
    """What a decode step changes."""

    step: jax.Array
    cache: Cache
    pool: jax.Array
    position_B: jax.Array
    counts: Counts | None
    tokens_BK: jax.Array


def _decode(
    model: Forward,
    choose: Choose,
    vocab_size: int,
    params: Weights,
    state: DecodeState,
    rows: Rows,
    steps: jax.Array,
    fewest: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Generate a token a step for every row that runs, for `steps` <= K steps.

    It ends early when fewer than `fewest` >= 1 rows still run. Tokens come back as
    int32 [B, K], each row's in order: a stop is its last, NOT_A_NUMBER where logits
    were none (the row ends there), NO_TOKEN afterwards.
    """
    S, B = state.pool.shape[1], rows.limit.shape[0]
    slot_B = jnp.arange(B, dtype=jnp.int32) if rows.slot is None else rows.slot

    def last_token(loop: _Loop) -> jax.Array:
        at_B = (slot_B, loop.position_B - 1)
        return loop.pool.at[at_B].get(mode="fill", fill_value=NO_TOKEN)

    def runs(loop: _Loop) -> jax.Array:
        token_B = last_token(loop)
        is_stop_B = (token_B[:, None] == rows.stop).any(axis=1)
        return (loop.position_B < rows.limit) & (token_B >= 0) & ~is_stop_B

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < steps) & (runs(loop).sum(dtype=jnp.int32) >= fewest)

    def body(loop: _Loop) -> _Loop:
        runs_B, position_B = runs(loop), loop.position_B
        token_B = jnp.where(runs_B, last_token(loop), 0)
        place_B = jnp.minimum(jnp.where(runs_B, position_B - 1, position_B), S - 1)
        x_B1D, cache = model.forward(
            params, token_B[:, None], place_B[:, None], rows.slot, loop.cache
        )
        logits_BV = model.logits(params, x_B1D)[:, 0]
        token_B = choose(logits_BV, rows.sampling, loop.counts, position_B)
        token_B = jnp.where(runs_B, token_B, NO_TOKEN)
        at_B = (slot_B, jnp.where(runs_B, position_B, S))
        return _Loop(
            step=loop.step + 1,
            cache=cache,
            pool=loop.pool.at[at_B].set(token_B, mode="drop"),
            position_B=position_B + runs_B.astype(jnp.int32),
            counts=None if loop.counts is None else counted(loop.counts, token_B),
            tokens_BK=loop.tokens_BK.at[:, loop.step].set(token_B),
        )

    position_B = state.position.at[slot_B].get(mode="fill", fill_value=0)
    pool_BS = state.pool.at[slot_B].get(mode="fill", fill_value=NO_TOKEN)
    loop = jax.lax.while_loop(
        goes_on,
        body,
        _Loop(
            step=jnp.int32(0),
            cache=state.cache,
            pool=state.pool,
            position_B=position_B,
            counts=_counts(rows, pool_BS, position_B, vocab_size),
            tokens_BK=jnp.full((B, MOST_STEPS), NO_TOKEN, jnp.int32),
        ),
    )
    position = state.position.at[slot_B].set(loop.position_B, mode="drop")
    return DecodeState(loop.cache, loop.pool, position), loop.tokens_BK


def _counts(
    rows: Rows, pool_BS: jax.Array, position_B: jax.Array, vocab_size: int
) -> Counts | None:
    """The tokens so far of each row, where penalties ask for them."""
    if rows.sampling.penalties is None:
        return None
    return count(pool_BS, rows.prompt, position_B, vocab_size)
