"""Small trainable factors beside a frozen weight: x W + alpha / rank * (x A) B.

r the rank. LoRA (arXiv 2106.09685): A is drawn, B begins as zeros, so a model with
fresh factors computes what it did without. Axes of A are those that go into the weight,
axes of B those that come out; the rank is too small to split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.models.draw import normal
from llmos_jax.models.project import product


class Factors(nnx.Module):
    """alpha / rank * (x A) B."""

    def __init__(
        self,
        spec: ModelSpec,
        inside: dict[str, int],
        outside: dict[str, int],
        *,
        rngs: nnx.Rngs,
    ):
        """Draw A and make B zero.

        Args:
            spec: has `lora`.
            inside: logical axes that the weight sums over, and their sizes.
            outside: those that it makes.
            rngs: for A.
        """
        assert spec.lora is not None
        r, fan_in = spec.lora.rank, 1
        for size in inside.values():
            fan_in *= size
        self.a = normal(
            rngs, (*inside.values(), r), fan_in**-0.5, (*inside.keys(), None)
        )
        self.b = nnx.Param(
            jnp.zeros((r, *outside.values()), jnp.float32),
            out_sharding=(None, *outside.keys()),
        )
        self.scale = spec.lora.alpha / r
        self.contract = len(inside)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, *inside] -> [B, T, *outside]."""
        low_BTr = product(x, self.a[...], self.contract)
        return product(low_BTr, self.b[...], 1) * jnp.asarray(self.scale, x.dtype)


def factors_for(
    spec: ModelSpec,
    target: str,
    inside: dict[str, int],
    outside: dict[str, int],
    *,
    rngs: nnx.Rngs,
) -> Factors | None:
    """Return the factors beside the weight `target`, or None where it has none."""
    if spec.lora is None or target not in spec.lora.targets:
        return None
    return Factors(spec, inside, outside, rngs=rngs)
