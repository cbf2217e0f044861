"""Draw a fresh parameter, born with its logical axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def stacked(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Any:
    """Equal layers as one module, whose parameters have an axis `layers` in front."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def draw(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return draw(rngs)
