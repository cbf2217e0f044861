"""A matrix in few bits: whole numbers and their scales.

K summed inputs, N made outputs, G groups of inputs, g = K/G inputs of a group.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Kind = Literal["int8", "int4", "float8"]

FLOAT8 = jnp.float8_e4m3fn
LARGEST: dict[Kind, float] = {"int8": 127.0, "int4": 8.0, "float8": 448.0}
"""Of the numbers that are stored; int4 goes from -8 to 7. 448 is the largest finite
float8_e4m3fn (arXiv 2209.05433, table 1)."""


class Weight(NamedTuple):
    """values * scale is the matrix [K, N].

    `values` may be those of all layers, with an L in front; `scale` is of one.
    """

    values: jax.Array
    """int8 or float8_e4m3fn [K, N]; or uint8 [K/2, N]: two of int4, each plus 8, of
    input 2j in the low half and of 2j + 1 in the high half of byte j."""
    scale: jax.Array
    """float32 [N], of each output; or bfloat16 [G, N], of each group of inputs."""

    @property
    def kind(self) -> Kind:
        """In what the numbers are stored."""
        if self.values.dtype == jnp.uint8:
            return "int4"
        return "int8" if self.values.dtype == jnp.int8 else "float8"

    @property
    def inputs(self) -> int:
        """K."""
        return self.values.shape[-2] * (2 if self.values.dtype == jnp.uint8 else 1)

    @property
    def outputs(self) -> int:
        """N."""
        return self.values.shape[-1]

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None: all of an output."""
        return None if self.scale.ndim == 1 else self.inputs // self.scale.shape[0]


def quantized(w_KN: jax.Array, kind: Kind = "int8", group: int | None = None) -> Weight:
    """Round a matrix to the nearest numbers of a kind.

    The largest of each group becomes the largest number. For int4 that is -8, and the
    scale has the sign that makes it so, as in llama.cpp's Q4_0.

    Args:
        w_KN: floating-point numbers.
        kind: what to store.
        group: inputs that share a scale, dividing K; None: all of an output.
    """
    K, N = w_KN.shape
    g = K if group is None else group
    assert K % g == 0, (K, g)
    w_GgN = w_KN.astype(jnp.float32).reshape(K // g, g, N)
    index_G1N = jnp.argmax(jnp.abs(w_GgN), axis=1, keepdims=True)
    largest_GN = jnp.take_along_axis(w_GgN, index_G1N, axis=1)[:, 0]
    if kind == "int4":
        scale_GN = largest_GN / -LARGEST[kind]
    else:
        scale_GN = jnp.abs(largest_GN) / LARGEST[kind]
    scale_GN = jnp.where(scale_GN == 0, jnp.float32(1), scale_GN)
    if group is not None:
        scale_GN = scale_GN.astype(jnp.bfloat16)
    return rounded(w_KN, scale_GN if group is not None else scale_GN[0], kind)


def rounded(w_KN: jax.Array, scale: jax.Array, kind: Kind) -> Weight:
    """Round a matrix to the nearest numbers of a kind, with given scales.

    Args:
        w_KN: floating-point numbers.
        scale: as in Weight.
        kind: what to store.
    """
    ratio_KN = w_KN.astype(jnp.float32) / spread(scale, w_KN.shape[0])
    if kind == "float8":
        return Weight(jnp.clip(ratio_KN, -448.0, 448.0).astype(FLOAT8), scale)
    if kind == "int8":
        whole_KN = jnp.clip(jnp.round(ratio_KN), -127, 127)
        return Weight(whole_KN.astype(jnp.int8), scale)
    whole_KN = jnp.clip(jnp.round(ratio_KN), -8, 7)
    return Weight(packed_int4(whole_KN.astype(jnp.int8)), scale)


def spread(scale: jax.Array, K: int) -> jax.Array:
    """The scale of each weight, float32 [K, N] (or [1, N], of an output)."""
    if scale.ndim == 1:
        return scale.astype(jnp.float32)[None, :]
    return jnp.repeat(scale.astype(jnp.float32), K // scale.shape[0], axis=0)


def packed_int4(whole_KN: jax.Array) -> jax.Array:
    """Two numbers from -8 to 7 into each byte: int8 [K, N] to uint8 [K/2, N]."""
    nibbles_KN = (whole_KN + jnp.int8(8)).astype(jnp.uint8)
    return nibbles_KN[0::2] | (nibbles_KN[1::2] << jnp.uint8(4))


def whole(w: Weight) -> jax.Array:
    """The numbers as they are multiplied: int8 or float8 [K, N]."""
    if w.kind != "int4":
        return w.values
    low, high = w.values & jnp.uint8(15), w.values >> jnp.uint8(4)
    both = jnp.stack([low, high], axis=1).astype(jnp.int8) - jnp.int8(8)
    return both.reshape(w.inputs, w.outputs)


def dequantized(w: Weight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The matrix [K, N] that the numbers stand for."""
    return (whole(w).astype(jnp.float32) * spread(w.scale, w.inputs)).astype(dtype)
