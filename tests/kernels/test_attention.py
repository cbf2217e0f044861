"""Laws of attention, over every implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.kernels.attention import IMPLEMENTATIONS, attention

SHAPES = [(2, 16, 16, 4, 2, 8), (1, 1, 24, 8, 1, 16), (2, 7, 13, 3, 3, 4)]
"""B, T, S, N, K, H: training, decoding, a chunk in the middle."""


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_weighted_mean_of_visible_values(
    implementation: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    B, T, S, N, K, H = shape
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k = jax.random.normal(keys[1], (B, S, K, H))
    v = jax.random.normal(keys[2], (B, S, K, H))
    position = jnp.broadcast_to(jnp.arange(S - T, S)[None, :], (B, T))
    got = attention(q, k, v, position, implementation=implementation)
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = int(position[b, t]) + 1
        scores = np.asarray(k[b, :seen, n // (N // K)]) @ np.asarray(q[b, t, n])
        weights = np.exp(scores / np.sqrt(H))
        expected[b, t, n] = weights / weights.sum() @ v[b, :seen, n // (N // K)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_masked_slots_may_hold_anything(implementation: str, key: jax.Array) -> None:
    q = jax.random.normal(key, (1, 2, 2, 4))
    k = v = jax.random.normal(key, (1, 6, 2, 4))
    position = jnp.array([[2, 3]])
    clean = attention(q, k, v, position, implementation=implementation)
    dirty_k, dirty_v = k.at[:, 4:].set(1e30), v.at[:, 4:].set(1e30)
    dirty = attention(q, dirty_k, dirty_v, position, implementation=implementation)
    np.testing.assert_array_equal(clean, dirty)
