"""Prefill and decode: nobody writes where another reads, and k steps are k times one.

The model here is a toy that compiles at once: a token's features are a sum over all
tokens before it, weighted by how far away they are, read from a cache like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.serving import (
    MOST_STEPS,
    NO_TOKEN,
    NOT_A_NUMBER,
    DecodeState,
    Needs,
    Row,
    Runner,
    Sampling,
    rows_on_device,
)
from llmos_jax.serving.step import FREE

V, D, S = 61, 8, 128
WARM = Sampling(temperature=1.0, presence_penalty=0.5, seed=5)
EVERY = Needs(draws=True, filters=False, penalizes=True)


class Toy:
    """A cache of embeddings [1, slots, S, D]."""

    def __init__(self) -> None:
        self.traces = 0

    def forward(
        self, params: Any, tokens_BT: Any, position_BT: Any, slot_B: Any, cache: Any
    ) -> Any:
        self.traces += 1
        B = len(tokens_BT)
        slot_B = jnp.arange(B) if slot_B is None else slot_B
        new_BTD = params["table"][tokens_BT] + params["damage"][tokens_BT]
        cache = cache.at[0, slot_B[:, None], position_BT].set(new_BTD, mode="drop")
        known_BSD = cache.at[0, slot_B].get(mode="fill", fill_value=0)
        away_BTS = position_BT[:, :, None] - jnp.arange(S)[None, None, :]
        weight_BTS = jnp.where(
            away_BTS >= 0, 0.8 ** jnp.maximum(away_BTS, 0).astype(jnp.float32), 0.0
        )
        return jnp.einsum("BTS,BSD->BTD", weight_BTS, known_BSD), cache

    def logits(self, params: Any, x_BTD: jax.Array) -> jax.Array:
        return x_BTD @ params["table"].T * 2.0

    def empty_cache(self, batch: int, slots: int) -> jax.Array:
        return jnp.zeros((1, batch, slots, D))


def params() -> dict[str, jax.Array]:
    table = jax.random.normal(jax.random.key(3), (V, D))
    return {"table": table, "damage": jnp.zeros((V, 1))}


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(Toy(), params(), vocab_size=V)


def prompt_of(length: int) -> np.ndarray:
    return (np.arange(length) * 7 + length) % V


def row_of(length: int, tokens: int, sampling: Sampling = WARM, stop: int = -5) -> Row:
    return Row(length, length + tokens, frozenset({stop}), sampling)


def answer(
    runner: Runner, lengths: Sequence[int], tokens: int, steps: int = MOST_STEPS
) -> list[list[int]]:
    """The answers to prompts of these lengths, each in its slot."""
    state = runner.empty_state(len(lengths), S)
    rows = [row_of(length, tokens) for length in lengths]
    said = []
    for slot, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        state, token = runner.prefill(state, slot, prompt_of(length), row, EVERY)
        said.append([token])
    given = rows_on_device(rows, EVERY)
    while min(map(len, said)) < tokens:
        state, tokens_BK = runner.decode(state, given, steps=steps)
        for row, new in zip(said, tokens_BK, strict=True):
            row += [int(token) for token in new if token != NO_TOKEN]
    return said


def two_slots(runner: Runner, limit: int = 20) -> tuple[DecodeState, list[Row]]:
    """Prompts of 9 and 13 tokens, each with its first token."""
    state, rows = runner.empty_state(2, S), [row_of(9, limit), row_of(13, limit)]
    for slot, row in enumerate(rows):
        state, _ = runner.prefill(state, slot, prompt_of(row.prompt), row, EVERY)
    return state, rows


def snapshot(state: DecodeState) -> list[np.ndarray]:
    """Cache, pool and positions, slots first."""
    return [np.array(state.cache[0]), np.array(state.pool), np.array(state.position)]


def assert_slots_equal(
    one: list[np.ndarray], other: list[np.ndarray], slot: int
) -> None:
    for before, after in zip(one, other, strict=True):
        np.testing.assert_array_equal(before[slot], after[slot])


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tokens_are_the_same_however_many_steps_a_dispatch_takes(
    runner: Runner, steps: int
) -> None:
    lengths = [9, 13]
    assert answer(runner, lengths, 20, steps) == answer(runner, lengths, 20)


def test_tokens_are_the_same_alone_and_among_32(runner: Runner) -> None:
    lengths = [index % 16 + 1 for index in range(32)]
    together = answer(runner, lengths, 12)
    for index in (0, 30):
        assert answer(runner, [lengths[index]], 12) == [together[index]]


def test_tokens_are_the_same_for_whole_and_chunked_prompts(runner: Runner) -> None:
    chunked = Runner(Toy(), params(), vocab_size=V, longest_chunk=16)
    lengths = [17, 75]
    assert answer(chunked, lengths, 12) == answer(runner, lengths, 12)


def test_a_prefill_writes_to_its_own_slot_alone(runner: Runner) -> None:
    state, rows = two_slots(runner)
    before = snapshot(state)
    state, _ = runner.prefill(state, 1, prompt_of(15), row_of(15, 4), EVERY)
    assert_slots_equal(before, snapshot(state), 0)
    assert state.position.tolist() == [10, 16]


def test_a_row_that_does_not_run_writes_to_nobody(runner: Runner) -> None:
    state, rows = two_slots(runner)
    before = snapshot(state)
    idle = rows_on_device([FREE, rows[1]], EVERY)
    state, tokens_BK = runner.decode(state, idle, steps=5)
    after = snapshot(state)
    assert (tokens_BK[0] == NO_TOKEN).all() and (tokens_BK[1, :5] >= 0).all()
    for one, other in zip(before[1:], after[1:], strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(before[0][0, :9], after[0][0, :9])


def test_a_padding_row_never_writes(runner: Runner) -> None:
    state, rows = two_slots(runner)
    before = snapshot(state)
    padded = rows_on_device([rows[1], rows[0]], EVERY, slots=[1, 2])
    state, tokens_BK = runner.decode(state, padded, steps=5)
    assert (tokens_BK[1] == NO_TOKEN).all() and (tokens_BK[0, :5] >= 0).all()
    assert_slots_equal(before, snapshot(state), 0)


def test_rows_in_any_order_read_their_own_slots(runner: Runner) -> None:
    state, rows = two_slots(runner)
    crossed = rows_on_device(rows[::-1], EVERY, slots=[1, 0])
    state, tokens_BK = runner.decode(state, crossed, steps=8)
    wanted = answer(runner, [9, 13], 9)
    assert [row[:8].tolist() for row in tokens_BK[::-1]] == [row[1:] for row in wanted]


def test_a_decode_between_two_chunks_changes_neither(runner: Runner) -> None:
    chunked = Runner(Toy(), params(), vocab_size=V, longest_chunk=16)
    rows = [row_of(9, 12), row_of(30, 12)]
    state = chunked.empty_state(2, S)
    state, first = chunked.prefill(state, 0, prompt_of(9), rows[0], EVERY)
    state, _ = chunked.prefill_chunk(state, 1, prompt_of(30), 0, rows[1], EVERY)
    apart = rows_on_device([rows[0], FREE], EVERY)
    state, before_BK = chunked.decode(state, apart, steps=5)
    state, token_1 = chunked.prefill_chunk(state, 1, prompt_of(30), 16, rows[1], EVERY)
    state, after_BK = chunked.decode(state, rows_on_device(rows, EVERY), steps=6)
    wanted = answer(runner, [9, 30], 12)
    assert [first, *before_BK[0, :5], *after_BK[0, :6]] == wanted[0]
    assert [*token_1, *after_BK[1, :6]] == wanted[1][:7]


def test_a_stop_ends_its_row_alone_and_early(runner: Runner) -> None:
    free = answer(runner, [9, 13], 20)
    stop = free[0][6]
    state, rows = two_slots(runner)
    rows[0] = rows[0]._replace(stop=frozenset({stop}))
    state, tokens_BK = runner.decode(state, rows_on_device(rows, EVERY), steps=15)
    ends = free[0].index(stop)
    assert tokens_BK[0, : ends + 1].tolist() == [*free[0][1 : ends + 1], NO_TOKEN]
    assert tokens_BK[1, :15].tolist() == free[1][1:16]
    again, tokens_BK = runner.decode(state, rows_on_device(rows, EVERY), steps=2)
    assert (tokens_BK[0] == NO_TOKEN).all() and again.position[0] == 9 + ends + 1


def test_a_dispatch_ends_when_too_few_rows_run(runner: Runner) -> None:
    state, rows = two_slots(runner)
    rows[0] = rows[0]._replace(limit=9 + 4)
    given = rows_on_device(rows, EVERY)
    state, tokens_BK = runner.decode(state, given, steps=15, fewest=2)
    assert (tokens_BK != NO_TOKEN).sum(axis=1).tolist() == [3, 3]


def test_a_limit_handed_over_by_the_host_ends_a_row(runner: Runner) -> None:
    state, rows = two_slots(runner)
    state, _ = runner.decode(state, rows_on_device(rows, EVERY), steps=3)
    rows[1] = rows[1]._replace(limit=0)
    state, tokens_BK = runner.decode(state, rows_on_device(rows, EVERY), steps=3)
    assert (tokens_BK != NO_TOKEN).sum(axis=1).tolist() == [3, 0]


def test_logits_that_are_no_numbers_end_their_row_alone() -> None:
    bad = int(prompt_of(13)[-1])
    assert bad not in prompt_of(9)
    damaged = params() | {"damage": jnp.zeros((V, 1)).at[bad].set(jnp.nan)}
    runner, rows = Runner(Toy(), damaged, vocab_size=V), [row_of(9, 9), row_of(13, 9)]
    state, said = runner.empty_state(2, S), []
    for slot, row in enumerate(rows):
        state, token = runner.prefill(state, slot, prompt_of(row.prompt), row, EVERY)
        said.append(token)
    state, tokens_BK = runner.decode(state, rows_on_device(rows, EVERY), steps=3)
    assert said[0] >= 0 and (tokens_BK[0, :3] >= 0).all()
    assert said[1] == NOT_A_NUMBER and (tokens_BK[1] == NO_TOKEN).all()


def test_sessions_with_other_values_compile_nothing_new() -> None:
    model = Toy()
    runner = Runner(model, params(), vocab_size=V)
    for sampling in (WARM, Sampling(temperature=0.3, seed=77), Sampling()):
        state, row = (
            runner.empty_state(2, S),
            row_of(9, 8, sampling, stop=sampling.seed),
        )
        state, _ = runner.prefill(state, 1, prompt_of(9), row, EVERY)
        for steps in (0, 1, 7):
            given = rows_on_device([FREE._replace(stop=row.stop), row], EVERY)
            state, _ = runner.decode(state, given, steps=steps)
    assert model.traces == 2
