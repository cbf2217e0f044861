"""The engine's two programs over pages of keys and values: a step, and decode steps.

B rows of a step with T tokens each, R tokens to be chosen, V vocabulary, E stops, A
alternatives, W words of a mask, S places of a seat, K most steps, M pages of a seat.

A seat is a row of the token pool and a row of the page table. The pool stays on the
device: a token that was chosen is written where the next step looks for its input, so
the host need not know it yet. A sequence that ended (a stop token, its limit, logits
that are no numbers) leaves ENDED there instead; a row that finds it runs no more: it
computes, writes nothing, and says NO_TOKEN. So a step that was sent too many does no
harm, and a seat may be given to another sequence at once: devices run steps in order.

Where a row stands is the host's to say. It knows: a sequence that runs goes on by one
token a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.scheduling import NO_TOKEN, Variant
from llmos_jax.serving.choose import Chosen, DrawRows, choose
from llmos_jax.serving.forward import Cache, Forward, Weights
from llmos_jax.serving.packing import unpacked
from llmos_jax.serving.penalties import count

MOST_STEPS = 16
"""K: a judgement; it bounds what a request that comes waits for."""
ENDED = -1
"""In the pool: nothing follows."""
FROM_POOL = -1
"""Instead of a token: the one that the pool has at this place."""


class State(NamedTuple):
    """What lives on the device from step to step; donated to each."""

    cache: Cache
    """Pages, without a table."""
    pool: jax.Array
    """int32 [seats, S]: the tokens of each seat's sequence, by position."""


class StepRows(NamedTuple):
    """What a step computes."""

    token_BT: Any
    """int32; FROM_POOL where the host does not know it."""
    seat_B: Any
    """int32."""
    start_B: Any
    """int32: the position of the first."""
    length_B: Any
    """int32: how many tokens are real; 0: a row of padding."""


class DecodeRows(NamedTuple):
    """What decode steps compute: a token of each row after another."""

    seat_B: Any
    """int32; one outside of the pool marks a row of padding."""
    position_B: Any
    """int32: of the last token that there is."""
    draw: DrawRows


def step_program(
    model: Forward, variant: Variant, like: tuple[Any, StepRows, DrawRows]
) -> Callable[..., tuple[State, Chosen]]:
    """Return (params, state, words) -> (state, chosen [R]).

    Args:
        model: what it traces.
        variant: what it can choose by.
        like: shapes of what is packed in the words: table [seats, M], rows, draws.
    """

    def program(
        params: Weights, state: State, words: jax.Array
    ) -> tuple[State, Chosen]:
        table, rows, draw = unpacked(words, like)
        B, T = rows.token_BT.shape
        S = state.pool.shape[1]
        offset_T = jnp.arange(T, dtype=jnp.int32)[None, :]
        position_BT = rows.start_B[:, None] + offset_T
        kept_BT = state.pool.at[rows.seat_B[:, None], position_BT].get(
            mode="fill", fill_value=ENDED
        )
        token_BT = jnp.where(rows.token_BT >= 0, rows.token_BT, kept_BT)
        runs_BT = (offset_T < rows.length_B[:, None]) & (token_BT >= 0)
        position_BT = jnp.where(runs_BT, position_BT, S)
        x_BTD, cache = model.forward(
            params,
            jnp.where(runs_BT, token_BT, 0),
            position_BT,
            rows.seat_B,
            state.cache._replace(table=table),
        )
        x_ND = x_BTD.reshape(B * T, -1)
        logits_RV = model.logits(params, x_ND[draw.at_R][:, None])[:, 0]
        pool = state.pool.at[rows.seat_B[:, None], position_BT].set(
            token_BT, mode="drop"
        )
        chosen = _chosen(variant, logits_RV, draw, pool)
        runs_R = runs_BT.reshape(-1)[draw.at_R] & (draw.position_R < S)
        token_R, next_R = _onwards(chosen.token_R, draw, draw.position_R, runs_R)
        at_R = (draw.seat_R, jnp.where(draw.position_R < S, draw.position_R, S))
        return State(
            cache=cache._replace(table=None),
            pool=pool.at[at_R].set(next_R, mode="drop"),
        ), chosen._replace(token_R=token_R)

    return program


def decode_program(
    model: Forward, variant: Variant, like: tuple[Any, DecodeRows, Any]
) -> Callable[..., tuple[State, jax.Array]]:
    """Return (params, state, words) -> (state, tokens [B, K]).

    It takes up to `steps` steps, packed last, and ends when no row runs. A row's tokens
    come in order: a stop is its last, NOT_A_NUMBER where logits were none, NO_TOKEN
    afterwards.

    Args:
        model: what it traces.
        variant: what it can choose by; it tells no likelihoods.
        like: shapes of table [seats, M], rows and steps [1].
    """
    assert not variant.tells, "decode steps tell tokens alone"

    class Loop(NamedTuple):
        step: jax.Array
        state: State
        position_B: jax.Array
        tokens_BK: jax.Array

    def program(
        params: Weights, state: State, words: jax.Array
    ) -> tuple[State, jax.Array]:
        table, rows, steps = unpacked(words, like)
        seat_B, S = rows.seat_B, state.pool.shape[1]

        def last_token(loop: Loop) -> jax.Array:
            at_B = (seat_B, loop.position_B)
            return loop.state.pool.at[at_B].get(mode="fill", fill_value=ENDED)

        def goes_on(loop: Loop) -> jax.Array:
            return (loop.step < steps[0]) & (last_token(loop) >= 0).any()

        def body(loop: Loop) -> Loop:
            token_B, (cache, pool) = last_token(loop), loop.state
            runs_B = token_B >= 0
            place_B = jnp.where(runs_B, loop.position_B, S)
            x_B1D, cache = model.forward(
                params,
                jnp.where(runs_B, token_B, 0)[:, None],
                place_B[:, None],
                seat_B,
                cache._replace(table=table),
            )
            logits_BV = model.logits(params, x_B1D)[:, 0]
            next_B = loop.position_B + 1
            draw = rows.draw._replace(position_R=next_B)
            chosen = _chosen(variant, logits_BV, draw, pool)
            token_B, written_B = _onwards(chosen.token_R, draw, next_B, runs_B)
            return Loop(
                step=loop.step + 1,
                state=State(
                    cache._replace(table=None),
                    pool.at[seat_B, next_B].set(written_B, mode="drop"),
                ),
                position_B=next_B,
                tokens_BK=loop.tokens_BK.at[:, loop.step].set(token_B),
            )

        empty_BK = jnp.full((seat_B.shape[0], MOST_STEPS), NO_TOKEN, jnp.int32)
        begin = Loop(jnp.int32(0), state, rows.position_B, empty_BK)
        end = jax.lax.while_loop(goes_on, body, begin)
        return end.state, end.tokens_BK

    return program


def embed_program(
    model: Forward, like: tuple[Any, StepRows]
) -> Callable[..., tuple[State, jax.Array]]:
    """Return (params, state, words) -> (state, float32 [D]): the sum of the final
    features of the real tokens of one row.

    Args:
        model: what it traces.
        like: shapes of table [seats, M] and rows, with B = 1.
    """

    def program(
        params: Weights, state: State, words: jax.Array
    ) -> tuple[State, jax.Array]:
        table, rows = unpacked(words, like)
        T, S = rows.token_BT.shape[1], state.pool.shape[1]
        offset_T = jnp.arange(T, dtype=jnp.int32)[None, :]
        is_real_BT = offset_T < rows.length_B[:, None]
        position_BT = jnp.where(is_real_BT, rows.start_B[:, None] + offset_T, S)
        x_BTD, cache = model.forward(
            params,
            jnp.maximum(rows.token_BT, 0),
            position_BT,
            rows.seat_B,
            state.cache._replace(table=table),
        )
        x_BTD = model.normed(params, x_BTD).astype(jnp.float32)
        total_D = jnp.where(is_real_BT[:, :, None], x_BTD, 0.0).sum(axis=(0, 1))
        return State(cache._replace(table=None), state.pool), total_D

    return program


def _chosen(
    variant: Variant, logits_RV: jax.Array, draw: DrawRows, pool: jax.Array
) -> Chosen:
    counts = None
    if variant.penalizes:
        pool_RS = pool.at[draw.seat_R].get(mode="fill", fill_value=ENDED)
        counts = count(pool_RS, draw.prompt_R, draw.position_R, logits_RV.shape[1])
    return choose(variant, logits_RV, draw, counts)


def _onwards(
    token_R: jax.Array, draw: DrawRows, position_R: jax.Array, runs_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What each row says, and what it leaves in the pool."""
    token_R = jnp.where(runs_R, token_R, NO_TOKEN)
    is_stop_R = (token_R[:, None] == draw.stop_RE).any(axis=1)
    ends_R = is_stop_R | (token_R < 0) | (position_R + 1 >= draw.limit_R)
    return token_R, jnp.where(ends_R, ENDED, token_R)
