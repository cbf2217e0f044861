"""Sampling: what is kept, what is drawn, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.serving import Sampling, sample
from llmos_jax.serving.sampler import keep_top_k, keep_top_p

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def test_greedy_takes_the_most_likely(key: jax.Array) -> None:
    assert sample(LOGITS, key, Sampling()).tolist() == [0, 3]


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (3, 3), (0, 4), (9, 4)])
def test_top_k_keeps_k_tokens(top_k: int, kept: int) -> None:
    finite = jnp.isfinite(keep_top_k(LOGITS, top_k)).sum(axis=1)
    assert finite.tolist() == [kept, kept]


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.6, 2), (0.8, 3)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: int) -> None:
    finite = jnp.isfinite(keep_top_p(LOGITS[:1], top_p))
    assert finite.tolist() == [[True] * kept + [False] * (4 - kept)]


def test_frequencies_follow_the_distribution(key: jax.Array) -> None:
    many = jnp.broadcast_to(LOGITS[:1], (20_000, 4))
    drawn = sample(many, key, Sampling(temperature=1.0))
    shares = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    # Three standard deviations of a share of 0.5 over 20,000 draws are 0.011.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.011)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1.0), "temperature is -1.0"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=-2), "top_k is -2"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
    ],
)
def test_values_out_of_range_are_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling.check()
