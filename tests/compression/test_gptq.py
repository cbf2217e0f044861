"""GPTQ against its definition, and what it is for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compression import gptq, nearest
from llmos_jax.kernels.int8_matmul.weight import dequantized, quantized

DAMPING = 0.01


def inputs(key, tokens=512, K=64):
    """Tokens whose inputs go together, as those of a model do."""
    low, mix, own = jax.random.split(key, 3)
    shared = jax.random.normal(low, (tokens, 8)) @ jax.random.normal(mix, (8, K))
    return shared + 0.3 * jax.random.normal(own, (tokens, K))


@pytest.fixture
def x_mK(key):
    return inputs(key)


@pytest.fixture
def w_KN(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (64, 24))


def lost(x_mK, w_KN, made):
    return float(jnp.sum(jnp.square(x_mK @ (dequantized(made) - w_KN))))


@pytest.mark.parametrize(
    ("kind", "group", "clip"), [("int8", None, False), ("int4", 16, True)]
)
def test_outputs_change_less_than_by_rounding_to_the_nearest(
    kind, group, clip, x_mK, w_KN
):
    h_KK = x_mK.T @ x_mK
    made = gptq(w_KN, h_KK, kind=kind, group=group, clip=clip)
    plain = nearest(w_KN, jnp.diagonal(h_KK), kind=kind, group=group, clip=clip)
    assert lost(x_mK, w_KN, made) < 0.6 * lost(x_mK, w_KN, plain)


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest(w_KN):
    made = gptq(w_KN, 3 * jnp.eye(64), kind="int8", clip=False)
    np.testing.assert_array_equal(made.values, quantized(w_KN).values)


def test_it_is_the_definition_one_input_at_a_time(x_mK, w_KN):
    """Optimal brain surgeon in float64: after each input the inverse of H shrinks."""
    h = np.asarray(x_mK.T @ x_mK, np.float64)
    inverse = np.linalg.inv(h + DAMPING * np.mean(np.diag(h)) * np.eye(64))
    w = np.asarray(w_KN, np.float64)
    scale = np.abs(w).max(0) / 127
    for j in range(64):
        kept = np.clip(np.round(w[j] / scale), -127, 127) * scale
        error = (w[j] - kept) / inverse[j, j]
        w -= np.outer(inverse[:, j], error)
        w[j] = kept
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
    made = gptq(w_KN, x_mK.T @ x_mK, kind="int8", clip=False)
    expected = np.round(w / scale)
    # float32: a weight half-way between two numbers may go to the other, and those
    # after it follow.
    assert (np.asarray(made.values) == expected).mean() > 0.97


def test_an_input_that_is_always_zero_does_no_harm(x_mK, w_KN):
    x_mK = x_mK.at[:, 5].set(0)
    made = gptq(w_KN, x_mK.T @ x_mK, kind="int4", group=16)
    assert not np.asarray(dequantized(made))[5].any()
    assert lost(x_mK, w_KN, made) < lost(
        x_mK, w_KN, nearest(w_KN, kind="int4", group=16)
    )
