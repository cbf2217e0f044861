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
    return rounded(w_KN, _own_scale(w_KN, kind, group), kind)


def nearest_numbers(
    w_KN: jax.Array, kind: Kind = "int8", group: int | None = None
) -> jax.Array:
    """`dequantized(quantized(w_KN, kind, group))`, bit for bit, without packing it:
    what a weight is while it is trained to be stored so. float32 [K, N]."""
    scale = _own_scale(w_KN, kind, group)
    return snapped(_ratio(w_KN, scale), kind) * spread(scale, w_KN.shape[0])


def _own_scale(w_KN: jax.Array, kind: Kind, group: int | None) -> jax.Array:
    K, N = w_KN.shape
    g = K if group is None else group
    assert K % g == 0, (K, g)
    w_GgN = w_KN.astype(jnp.float32).reshape(K // g, g, N)
    return kept_scale(largest_scale(w_GgN, kind), group)


def largest_scale(w_GgN: jax.Array, kind: Kind) -> jax.Array:
    """The scales [G, N] at which the largest of each group becomes the largest number;
    1 where all are 0. A sum picks it out: any partitioner can split that."""
    index_G1N = jnp.argmax(jnp.abs(w_GgN), axis=1, keepdims=True)
    is_it_GgN = index_G1N == jnp.arange(w_GgN.shape[1])[None, :, None]
    largest_GN = jnp.sum(jnp.where(is_it_GgN, w_GgN, jnp.float32(0)), axis=1)
    if kind == "int4":  # -8 to 7: the largest becomes -8, whatever its sign
        scale_GN = largest_GN * jnp.float32(-1 / LARGEST[kind])
    else:
        scale_GN = jnp.abs(largest_GN) * jnp.float32(1 / LARGEST[kind])
    return jnp.where(scale_GN == 0, jnp.float32(1), scale_GN)


def kept_scale(scale_GN: jax.Array, group: int | None) -> jax.Array:
    """Scales as Weight has them: float32 [N], or bfloat16 [G, N].

    Rounded by name: XLA may leave a float32 as it is where it is converted to bfloat16
    and back (xla_allow_excess_precision), and numbers would then be rounded with
    another scale than the one that is stored.
    """
    if group is None:
        return scale_GN[0]
    exact = jax.lax.reduce_precision(scale_GN, exponent_bits=8, mantissa_bits=7)
    return exact.astype(jnp.bfloat16)


def snapped(ratio: jax.Array, kind: Kind) -> jax.Array:
    """The nearest numbers of a kind, as float32."""
    if kind == "float8":
        limit = LARGEST[kind]
        return jnp.clip(ratio, -limit, limit).astype(FLOAT8).astype(jnp.float32)
    low, high = (-8, 7) if kind == "int4" else (-127, 127)
    return jnp.clip(jnp.round(ratio), low, high)


def rounded(w_KN: jax.Array, scale: jax.Array, kind: Kind) -> Weight:
    """Round a matrix to the nearest numbers of a kind, with given scales.

    Args:
        w_KN: floating-point numbers.
        scale: as in Weight.
        kind: what to store.
    """
    whole_KN = snapped(_ratio(w_KN, scale), kind)
    if kind == "int4":
        return Weight(packed_int4(whole_KN.astype(jnp.int8)), scale)
    return Weight(whole_KN.astype(jnp.int8 if kind == "int8" else FLOAT8), scale)


def quantized_table(table_VD: jax.Array) -> Weight:
    """A table in int8 with a scale for each row, and its rows in front as before."""
    w_VD = table_VD.astype(jnp.float32)
    scale_V = _table_scale(w_VD)
    whole_VD = jnp.round(w_VD * _inverse(scale_V)[:, None])
    return Weight(whole_VD.astype(jnp.int8), scale_V)


def nearest_table(table_VD: jax.Array) -> jax.Array:
    """The float32 table that `quantized_table` stands for, bit for bit."""
    w_VD = table_VD.astype(jnp.float32)
    scale_V = _table_scale(w_VD)
    return jnp.round(w_VD * _inverse(scale_V)[:, None]) * scale_V[:, None]


def _table_scale(w_VD: jax.Array) -> jax.Array:
    largest_V = jnp.max(jnp.abs(w_VD), axis=1)
    scale_V = largest_V * jnp.float32(1 / LARGEST["int8"])
    return jnp.where(scale_V == 0, jnp.float32(1), scale_V)


def _ratio(w_KN: jax.Array, scale: jax.Array) -> jax.Array:
    """How many of its scales each weight is, float32 [K, N]."""
    return w_KN.astype(jnp.float32) * spread(_inverse(scale), w_KN.shape[0])


def _inverse(scale: jax.Array) -> jax.Array:
    """One over each scale, in float32.

    Written out, and kept apart from what it multiplies: XLA makes a product of a
    division by what is broadcast in some programs and not in others (split over a mesh,
    it did), and a weight half way between two numbers would go either way.
    """
    inverse: jax.Array = jax.lax.optimization_barrier(1 / scale.astype(jnp.float32))
    return inverse


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
