"""Sampling: what is chosen, what is drawn, what a row's company changes (nothing)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.serving import NOT_A_NUMBER, Needs, Sampling, rows_of, sample
from llmos_jax.serving.penalties import count

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))
WARM = Sampling(temperature=1.0)
MIXED = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.5, top_k=40, top_p=0.8, seed=4),
    Sampling(temperature=1.0, min_p=0.05, seed=2**63),
    Sampling(temperature=1.0, presence_penalty=2.0, repetition_penalty=1.5),
    Sampling(frequency_penalty=2.0),
]
drawn = jax.jit(sample)


def positions(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


@pytest.mark.parametrize("vocab_size", [4, 257, 1000])
def test_greedy_takes_the_first_of_the_most_likely(vocab_size: int) -> None:
    logits = np.random.default_rng(0).integers(0, 9, (16, vocab_size))
    got = drawn(
        jnp.asarray(logits, jnp.bfloat16),
        rows_of([Sampling()] * 16),
        None,
        positions(16),
    )
    np.testing.assert_array_equal(got, logits.argmax(axis=1))


def test_a_greedy_program_holds_no_random_numbers() -> None:
    greedy = drawn.lower(LOGITS, rows_of([Sampling()] * 2), None, positions(2))
    warm = drawn.lower(LOGITS, rows_of([WARM] * 2), None, positions(2))
    assert "threefry" not in greedy.as_text() and "threefry" in warm.as_text()


def test_frequencies_follow_the_distribution() -> None:
    many = jnp.broadcast_to(LOGITS[:1], (20_000, 4))
    got = drawn(many, rows_of([WARM] * 20_000), None, positions(20_000))
    shares = np.bincount(np.asarray(got), minlength=4) / 20_000
    # Three standard deviations of a share of 0.5 over 20,000 draws are 0.011.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.011)


def test_frequencies_over_many_blocks_follow_the_distribution() -> None:
    logits = np.random.default_rng(1).normal(size=300) * 1.5
    chances = np.exp(logits) / np.exp(logits).sum()
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (20_000, 300))
    got = drawn(many, rows_of([WARM] * 20_000), None, positions(20_000))
    found = np.bincount(np.asarray(got), minlength=300)
    wanted = 20_000 * chances
    # Pearson's statistic has a mean of 299 and a standard deviation of 24.
    assert ((found - wanted) ** 2 / wanted).sum() < 299 + 4 * 24


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.4}])
def test_only_kept_tokens_are_drawn(filters: dict[str, float]) -> None:
    many = jnp.broadcast_to(LOGITS[:1], (4000, 4))
    sampling = Sampling(temperature=1.0, **filters)
    got = drawn(many, rows_of([sampling] * 4000), None, positions(4000))
    shares = np.bincount(np.asarray(got), minlength=4) / 4000
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_a_temperature_near_zero_is_greedy() -> None:
    cold = Sampling(temperature=1e-30)
    assert drawn(LOGITS, rows_of([cold] * 2), None, positions(2)).tolist() == [0, 3]


def test_a_row_gets_its_token_in_any_company_and_place() -> None:
    rng = np.random.default_rng(2)
    B, V = len(MIXED), 500
    logits = jnp.asarray(rng.normal(size=(B, V)) * 2, jnp.float32)
    pool = jnp.asarray(rng.integers(0, V, (B, 64)), jnp.int32)
    prompt, position = jnp.full((B,), 8), jnp.arange(20, 20 + B)

    def chosen(order: list[int], needs: Needs | None = None) -> list[int]:
        at = jnp.asarray(order)
        counts = count(pool[at], prompt[at], position[at], V)
        rows = rows_of([MIXED[index] for index in order], needs)
        return drawn(logits[at], rows, counts, position[at]).tolist()

    together = chosen(list(range(B)))
    every = Needs(draws=True, filters=True, penalizes=True)
    assert chosen([5, 3, 1, 0, 2, 4]) == [together[i] for i in (5, 3, 1, 0, 2, 4)]
    assert [chosen([index], every)[0] for index in range(B)] == together
    assert [chosen([index])[0] for index in (0, 1)] == together[:2]  # smaller programs


def test_seed_and_position_each_give_another_draw() -> None:
    many = jnp.zeros((64, 5000))
    same = drawn(many, rows_of([WARM] * 64), None, jnp.full((64,), 9))
    by_position = drawn(many, rows_of([WARM] * 64), None, positions(64))
    seeds = [Sampling(temperature=1.0, seed=seed << 32) for seed in range(64)]
    by_seed = drawn(many, rows_of(seeds), None, jnp.full((64,), 9))
    assert len(set(same.tolist())) == 1
    assert min(len(set(by_position.tolist())), len(set(by_seed.tolist()))) > 55


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.5)])
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_told_and_the_others_are_not(
    sampling: Sampling, damage: float
) -> None:
    damaged = LOGITS.at[1, 2].set(damage)
    got = drawn(damaged, rows_of([sampling] * 2), None, positions(2))
    assert got[0] in (0, 1) and got[1] == NOT_A_NUMBER


def test_other_values_need_no_other_program() -> None:
    traced = []

    def counted(*given: jax.Array) -> jax.Array:
        traced.append(1)
        return sample(*given)

    program = jax.jit(counted)
    for sampling in MIXED[1:4]:
        needs = Needs(draws=True, filters=True, penalizes=False)
        program(LOGITS, rows_of([sampling] * 2, needs), None, positions(2))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1.0), r"temperature is -1.0; it must be in \[0, inf\)"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(temperature=float("inf")), "temperature is inf"),
        (Sampling(top_k=-2), r"top_k is -2; .* \(0 keeps all\)"),
        (Sampling(top_k=2**31), "top_k is 2147483648"),
        (Sampling(top_p=0.0), r"top_p is 0.0; it must be in \(0, 1\]"),
        (Sampling(min_p=1.5), r"min_p is 1.5; it must be in \[0, 1\]"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (Sampling(presence_penalty=2.5), r"presence_penalty is 2.5; .* \[-2, 2\]"),
        (Sampling(frequency_penalty=-3.0), "frequency_penalty is -3.0"),
        (Sampling(seed=2**64), "seed is 18446744073709551616"),
    ],
)
def test_values_out_of_range_are_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling.check()
