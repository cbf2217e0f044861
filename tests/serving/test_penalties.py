"""Penalties: what is counted, and what counts do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.serving.penalties import Counts, Penalties, count, counted, penalized

V = 8
POOL = jnp.array([[3, 3, 5, 5, 5, 1, 7, 7], [2, 4, 4, -2, 6, 6, 6, 6]], jnp.int32)


def counts() -> Counts:
    """Of prompts of two tokens, and of answers of three and one (no) token."""
    return count(POOL, jnp.array([2, 3]), jnp.array([5, 4]), V)


def test_only_known_tokens_count_and_only_answers_are_said() -> None:
    seen_BV, said_BV = counts()
    assert [np.flatnonzero(row).tolist() for row in seen_BV] == [[3, 5], [2, 4]]
    assert said_BV.tolist() == [[0, 0, 0, 0, 0, 3, 0, 0], [0] * 8]


def test_one_more_token_counts_as_if_counted_from_the_pool() -> None:
    more = counted(counts(), jnp.array([1, -1]))
    again = count(POOL, jnp.array([2, 3]), jnp.array([6, 4]), V)
    for one, other in zip(more, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_repetition_is_hugging_faces() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits_BV = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    neither = jnp.zeros(2)
    got_BV = penalized(
        jnp.asarray(logits_BV), Penalties(jnp.full(2, 1.7), neither, neither), counts()
    )
    process = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    for row, known in enumerate(([3, 3, 5, 5, 5], [2, 4, 4])):
        wanted_1V = process(torch.tensor([known]), torch.tensor(logits_BV[row][None]))
        np.testing.assert_allclose(got_BV[row], wanted_1V[0], rtol=1e-6)


def test_frequency_counts_every_time_and_presence_once() -> None:
    got_BV = penalized(
        jnp.zeros((2, V)),
        Penalties(jnp.ones(2), jnp.array([0.5, 0.5]), jnp.array([0.25, 0.25])),
        counts(),
    )
    assert got_BV[0].tolist() == [0, 0, 0, 0, 0, -0.5 - 3 * 0.25, 0, 0]
    assert got_BV[1].tolist() == [0] * 8


def test_rows_without_penalties_keep_their_logits_to_the_bit() -> None:
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(2, V)), jnp.float32)
    none = Penalties(jnp.ones(2), jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_array_equal(penalized(logits_BV, none, counts()), logits_BV)
