"""Draw a fresh parameter, born with its logical axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    scale: float,
    axes: tuple[str | None, ...],
) -> nnx.Param:
    """A float32 parameter drawn from N(0, scale**2), truncated at 2 sigma."""
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value * jnp.float32(scale), out_sharding=axes)
