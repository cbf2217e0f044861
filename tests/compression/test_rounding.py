"""Scales, and weights rounded each by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compression import nearest
from llmos_jax.kernels.int8_matmul.weight import dequantized, quantized

KINDS = [("int8", None), ("int8", 16), ("int4", 16), ("float8", None)]


@pytest.fixture
def w_KN(key):
    return jax.random.normal(key, (64, 24))


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_without_a_search_the_largest_weight_sets_the_scale(kind, group, w_KN):
    made = nearest(w_KN, kind=kind, group=group, clip=False)
    plain = quantized(w_KN, kind, group)
    assert made.values.dtype == plain.values.dtype
    np.testing.assert_array_equal(made.scale, plain.scale)
    np.testing.assert_array_equal(
        np.asarray(made.values, np.float32), np.asarray(plain.values, np.float32)
    )


@pytest.mark.parametrize(("kind", "group"), KINDS[:3])
def test_a_searched_scale_heeds_what_inputs_are(kind, group, w_KN):
    """Large weights of inputs that are hardly there do not make all steps coarse."""
    is_faint_K = np.arange(64) % 16 == 0
    importance_K = jnp.asarray(np.where(is_faint_K, 1e-3, 1.0), jnp.float32)
    w_KN = jnp.where(is_faint_K[:, None], 4 * w_KN, w_KN)

    def lost(clip):
        made = nearest(w_KN, importance_K, kind=kind, group=group, clip=clip)
        error_KN = np.asarray(dequantized(made) - w_KN)
        return (np.square(error_KN) * np.asarray(importance_K)[:, None]).sum()

    assert lost(clip=True) < 0.8 * lost(clip=False)


def test_an_output_of_zeros_stays_zero(w_KN):
    w_KN = w_KN.at[:, 3].set(0)
    for kind, group in KINDS:
        made = dequantized(nearest(w_KN, kind=kind, group=group))
        assert not np.asarray(made)[:, 3].any()
