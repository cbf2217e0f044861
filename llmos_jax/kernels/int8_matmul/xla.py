"""A matrix of few bits times rows as XLA's own products; anywhere.

m rows, K summed inputs, N made outputs, G groups of inputs, g = K/G.

Whole numbers are multiplied as int8 with `preferred_element_type=int32`: without it
GPUs do not take their fast kernels (XLA issue 7117: 2.8 TOP/s on an A100). A weight
that is only stored in few bits is converted on its way into the product and scaled
after it, which TPUs and GPUs fuse into the operand.

CPUs do not. There each row becomes two int8 digits, together 15 bits, where bfloat16
has 8, and products are of whole numbers. Rows are padded to 8, without which XLA:CPU
multiplies one row with code that is not blocked. Groups of inputs are the exception: a
product as narrow as a group is slower than converting the weights. Each was found on a
busy machine by a factor of 4 and more; tools/bench/int8_matmul.py times this form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmos_jax.kernels.int8_matmul.reference import (
    Activations,
    quantized_rows,
    scaled,
)
from llmos_jax.kernels.int8_matmul.weight import FLOAT8, Weight, dequantized, whole
from llmos_jax.kernels.target import current_target

_CPU_ROWS = 8
"""Rows of an int8 product on a CPU: a multiple of this."""

_DIGIT = 128
"""A row of 15 bits is high * 128 + low; both from -64 or -127 to 127."""


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: Activations = "none",
    transposed: bool = False,
) -> jax.Array:
    """See `api.int8_matmul`."""
    w_KN = w.values.T if transposed else whole(w)
    scale_GN = w.scale.reshape(-1, w_KN.shape[1]).astype(jnp.float32)
    is_cpu = current_target().platform == "cpu"
    if activations != "none":
        q_mK, row_m1 = quantized_rows(x_mK, activations)
        sum_mGN = _sums(q_mK, w_KN, len(scale_GN))
        y_mN = scaled(sum_mGN, row_m1, scale_GN)
    elif is_cpu and w_KN.dtype == jnp.int8 and len(scale_GN) == 1:
        y_mN = _by_digits(x_mK, w_KN, scale_GN)
    elif len(scale_GN) > 1:
        w_KN = dequantized(w, x_mK.dtype)
        y_mN = jnp.matmul(x_mK, w_KN, preferred_element_type=jnp.float32)
    else:
        w_KN = w_KN.astype(x_mK.dtype)
        y_mN = jnp.matmul(x_mK, w_KN, preferred_element_type=jnp.float32) * scale_GN
    return y_mN.astype(x_mK.dtype)


def _by_digits(x_mK: jax.Array, w_KN: jax.Array, scale_GN: jax.Array) -> jax.Array:
    """A product with rows of 15 bits, float32 [m, N]."""
    m = len(x_mK)
    most = jnp.float32(127 * _DIGIT)
    x_mK = x_mK.astype(jnp.float32)
    largest_m1 = jnp.max(jnp.abs(x_mK), axis=1, keepdims=True)
    largest_m1 = jnp.maximum(largest_m1, jnp.float32(2.0**-100))
    number_mK = jnp.round(x_mK * (most / largest_m1)).astype(jnp.int32)
    high_mK = (number_mK + jnp.int32(_DIGIT // 2)) // jnp.int32(_DIGIT)
    low_mK = number_mK - high_mK * jnp.int32(_DIGIT)
    digits_mK = jnp.concatenate([high_mK, low_mK]).astype(jnp.int8)
    sum_mGN = _sums(digits_mK, w_KN, len(scale_GN)).astype(jnp.float32)
    sum_mGN = sum_mGN[:m] * jnp.float32(_DIGIT) + sum_mGN[m:]
    return scaled(sum_mGN, largest_m1 / most, scale_GN)


def _sums(q_mK: jax.Array, w_KN: jax.Array, G: int) -> jax.Array:
    """Products of few bits, summed by group: int32 or float32 [m, G, N]."""
    m, K = q_mK.shape
    platform = current_target().platform
    kind = jnp.int32 if q_mK.dtype == jnp.int8 else jnp.float32
    if platform == "cpu":
        q_mK = jnp.pad(q_mK, ((0, -m % _CPU_ROWS), (0, 0)))
    if q_mK.dtype == FLOAT8 and platform != "tpu":
        # GPUs know this pattern as a float8 product; CPUs have none.
        wide = jnp.bfloat16 if platform == "gpu" else jnp.float32
        q_mK, w_KN = q_mK.astype(wide), w_KN.astype(wide)
    if G == 1:
        sum_mN = jnp.matmul(q_mK, w_KN, preferred_element_type=kind)
        return sum_mN[:m, None]
    q_GmK = q_mK.reshape(-1, G, K // G).swapaxes(0, 1)
    w_GgN = w_KN.reshape(G, K // G, -1)
    sum_GmN = jnp.matmul(q_GmK, w_GgN, preferred_element_type=kind)
    return sum_GmN.swapaxes(0, 1)[:m]
