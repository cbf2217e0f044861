"""A matrix of few bits times rows, as its definition reads.

m rows, K summed inputs, N made outputs, G groups of inputs, g = K/G. The oracle for
every other implementation: whole numbers are summed as such, everything else in
float32, and no step is left to a compiler's choice of precision.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from llmos_jax.kernels.int8_matmul.weight import FLOAT8, LARGEST, Weight, whole

Activations: TypeAlias = Literal["none", "int8", "float8"]
"""What rows become on their way into the product: none, they stay as they are."""

_LEAST = 2.0**-100
"""What the largest number of a row counts as at least: a row of zeros stays one, and
its scale has an inverse."""


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: Activations = "none",
    transposed: bool = False,
) -> jax.Array:
    """See `api.int8_matmul`."""
    (m, K), dtype = x_mK.shape, x_mK.dtype
    w_KN = w.values.T if transposed else whole(w)
    scale_GN = w.scale.reshape(-1, w_KN.shape[1]).astype(jnp.float32)
    row_m1 = jnp.ones((m, 1), jnp.float32)
    if activations != "none":
        x_mK, row_m1 = quantized_rows(x_mK, activations)
    kind = jnp.int32 if x_mK.dtype == jnp.int8 else jnp.float32
    G = scale_GN.shape[0]
    sum_mGN = jnp.einsum(
        "mGg,GgN->mGN",
        x_mK.reshape(m, G, K // G).astype(kind),
        w_KN.reshape(G, K // G, -1).astype(kind),
        precision=jax.lax.Precision.HIGHEST,
    )
    return scaled(sum_mGN, row_m1, scale_GN).astype(dtype)


def quantized_rows(
    x_mK: jax.Array, activations: Activations
) -> tuple[jax.Array, jax.Array]:
    """Round each row to few bits, so that its largest becomes the largest number.

    Plain operations on float32 that may also stand in a kernel. The constant's inverse
    is multiplied with because compilers make that of a division by it anyway, and all
    must agree.

    Returns:
        Numbers [m, K], int8 or float8_e4m3fn, and what to multiply them by, float32
        [m, 1].
    """
    assert activations != "none", activations
    most = jnp.float32(LARGEST[activations])
    x_mK = x_mK.astype(jnp.float32)
    largest_m1 = jnp.max(jnp.abs(x_mK), axis=1, keepdims=True)
    largest_m1 = jnp.maximum(largest_m1, jnp.float32(_LEAST))
    ratio_mK = x_mK * (most / largest_m1)
    row_m1 = largest_m1 * jnp.float32(1 / LARGEST[activations])
    if activations == "float8":
        return ratio_mK.astype(FLOAT8), row_m1
    return jnp.round(ratio_mK).astype(jnp.int8), row_m1


def scaled(sum_mGN: jax.Array, row_m1: jax.Array, scale_GN: jax.Array) -> jax.Array:
    """Sums of groups, int32 or float32 [m, G, N], to float32 [m, N].

    With one group, the scale of the row comes first: all implementations round alike.
    """
    sum_mGN = sum_mGN.astype(jnp.float32)
    if scale_GN.shape[0] == 1:
        return sum_mGN[:, 0] * row_m1 * scale_GN
    return jnp.sum(sum_mGN * scale_GN[None], axis=1) * row_m1
