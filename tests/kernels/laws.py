"""What the laws of attention compare: outputs with gradients, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Attend = Callable[..., jax.Array]

RELATIVE = 1e-5
"""Of the largest entry, in float32: sums of some hundred terms in another order, and a
polynomial for exp, differ by 2e-6 at most over the shapes of these tests."""


def results(attend: Attend, *arrays: jax.Array) -> list[jax.Array]:
    """The output, and the gradients of q, k and v; the last array is the cotangent."""

    @jax.jit
    def run(*arrays: jax.Array) -> list[jax.Array]:
        *operands, dout = arrays
        out, pull = jax.vjp(attend, *operands)
        return [out, *pull(dout)]

    return run(*arrays)


def assert_near(
    got: list[jax.Array],
    expected: list[jax.Array],
    relative: float = RELATIVE,
    absolute: float = 0.0,
) -> None:
    """Within `relative` of the largest entry of each, and `absolute` besides."""
    for a, b in zip(got, expected, strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=0, atol=relative * scale + absolute
        )
