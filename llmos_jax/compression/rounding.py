"""Round a matrix to few bits, each scale searched for the least squared error.

K summed inputs, N made outputs, G groups of inputs, g = K/G inputs of a group. The
largest weight of a group is seldom worth the coarser steps that it asks of all others.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llmos_jax.kernels.int8_matmul.weight import (
    Kind,
    Weight,
    kept_scale,
    largest_scale,
    rounded,
    snapped,
)

FACTORS: dict[Kind, tuple[float, ...]] = {
    "int8": (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7),
    "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65),
    "float8": (1.0,),
}
"""Tried times the scale at which the largest weight is the largest number. float8 has
the same relative steps at any scale."""


def best_scale(
    w_GgN: jax.Array, kind: Kind, *, clip: bool, importance_Gg: jax.Array | None = None
) -> jax.Array:
    """A scale [G, N] for each group and output.

    Args:
        w_GgN: float32.
        kind: what weights become.
        clip: search; else the largest weight becomes the largest number.
        importance_Gg: what the square of an error of each input counts; None: 1.
    """
    first_GN = largest_scale(w_GgN, kind)
    if not clip or len(FACTORS[kind]) == 1:
        return first_GN
    factors = jnp.asarray(FACTORS[kind], jnp.float32)
    if kind == "int4":  # the other sign too: what is small at -8 may be large at 7
        factors = jnp.concatenate([factors, -factors * (8 / 7), -factors])

    def try_one(
        best: tuple[jax.Array, jax.Array], factor: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale_GN = first_GN * factor
        ratio_GgN = w_GgN / scale_GN[:, None]
        error_GgN = jnp.square(
            (ratio_GgN - snapped(ratio_GgN, kind)) * scale_GN[:, None]
        )
        if importance_Gg is not None:
            error_GgN = error_GgN * importance_Gg[:, :, None]
        error_GN = jnp.sum(error_GgN, axis=1)
        is_less = error_GN < best[0]
        return (
            jnp.where(is_less, error_GN, best[0]),
            jnp.where(is_less, scale_GN, best[1]),
        ), None

    worst_GN = jnp.full(first_GN.shape, jnp.inf, jnp.float32)
    (_, scale_GN), _ = jax.lax.scan(try_one, (worst_GN, first_GN), factors)
    return scale_GN


@functools.partial(jax.jit, static_argnames=("kind", "group", "clip"))
def nearest(
    w_KN: jax.Array,
    importance_K: jax.Array | None = None,
    *,
    kind: Kind,
    group: int | None = None,
    clip: bool = True,
) -> Weight:
    """Round each weight by itself.

    Args:
        w_KN: float32.
        importance_K: what the square of an error of each input counts; None: 1.
        kind: what to store.
        group: inputs that share a scale, dividing K; None: all of an output.
        clip: search for scales.
    """
    K, N = w_KN.shape
    g = K if group is None else group
    importance_Gg = None if importance_K is None else importance_K.reshape(K // g, g)
    scale_GN = best_scale(
        w_KN.reshape(K // g, g, N), kind, clip=clip, importance_Gg=importance_Gg
    )
    return rounded(w_KN, kept_scale(scale_GN, group), kind)
