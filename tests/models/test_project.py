"""The hand-written gradient of a product equals the derived one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.models.project import project

SHAPES = [
    ((2, 5, 12), (12, 7), 1),
    ((2, 5, 12), (12, 3, 4), 1),
    ((2, 5, 3, 4), (3, 4, 6), 2),
]
"""x, w, contracted: a matrix, a projection to heads, one from heads."""


@pytest.mark.parametrize(("x_shape", "w_shape", "contract"), SHAPES)
def test_value_and_gradients_are_those_of_tensordot(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], contract: int, key: jax.Array
) -> None:
    keys = jax.random.split(key, 2)
    x, w = (jax.random.normal(k, s) for k, s in zip(keys, (x_shape, w_shape)))

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(project(x, w, contract=contract)))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.tensordot(x, w, axes=contract)))

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, w)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, w)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got,
        expected,
    )


def test_dots_policy_saves_projections_and_nothing_else(key: jax.Array) -> None:
    from llmos_jax.models.remat import rematerialised

    w = jax.random.normal(key, (4, 4))

    def layer(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(project(jnp.cos(x), w, name="query")))

    x = jax.random.normal(key, (2, 3, 4))
    jaxpr = str(jax.make_jaxpr(jax.grad(rematerialised(layer, "dots")))(x))
    saved_none = str(jax.make_jaxpr(jax.grad(rematerialised(layer, "full")))(x))
    # cos is recomputed under both; the product only where it was not saved.
    assert jaxpr.count("dot_general") < saved_none.count("dot_general")
