"""A matrix of a model: floating-point numbers, or few bits and their scales.

A module says what goes in and what comes out by the names of logical axes; whether the
matrix is one parameter or two (`values` and `scale`) follows from the spec. Either is
read with `weight[...]` and multiplied by `project`.

B sequences, T tokens, K summed inputs, N made outputs, G groups of inputs, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec, ParamTable, Quantization
from llmos_jax.kernels.int8_matmul import (
    FLOAT8,
    Activations,
    Weight,
    dequantized,
    int8_matmul,
)
from llmos_jax.models.annotate import Axes, mesh_axes_of, per_shard
from llmos_jax.models.draw import normal

Sizes = dict[str, int]
"""Logical axis -> size, in the order of an array's dimensions."""


class Held(NamedTuple):
    """A quantized matrix as a module reads it."""

    values: jax.Array
    """[*inside, *outside]; of int4 the last of `inside` is halved. With `layer`, those
    of all layers, with an L in front."""
    scale: jax.Array
    """float32 [*outside], or bfloat16 [G, *outside]."""
    inside: Axes
    outside: Axes
    activations: Activations
    """What tokens are multiplied as (ir.Quantization)."""
    layer: jax.Array | None = None
    """int32 scalar: which layer is at work, where `values` have all of them."""

    @property
    def scale_axes(self) -> Axes:
        """Logical axes of `scale`: groups lie as the first inputs do."""
        is_grouped = self.scale.ndim > len(self.outside)
        return (self.inside[0], *self.outside) if is_grouped else self.outside


class QuantizedWeight(nnx.Module):
    """A matrix in few bits; born as zeros, filled by `compress`."""

    def __init__(
        self,
        inside: Sizes,
        outside: Sizes,
        *,
        kind: str,
        group: int | None = None,
        activations: Activations = "none",
        is_table: bool = False,
    ):
        """Lay out values and scales.

        Args:
            inside: logical axes that are summed over, and their sizes.
            outside: those that are made.
            kind: int8, int4 or float8.
            group: inputs that share a scale; None: all of an output.
            activations: what tokens are multiplied as.
            is_table: the outputs come first in `values`, as in a table of embeddings.
        """
        dtype = {"int8": jnp.int8, "int4": jnp.uint8, "float8": FLOAT8}[kind]
        stored = dict(inside)
        if kind == "int4":
            last = next(reversed(stored))
            stored[last] //= 2
        sizes = {**outside, **stored} if is_table else {**stored, **outside}
        self.values = nnx.Param(
            jnp.zeros(tuple(sizes.values()), dtype), out_sharding=tuple(sizes)
        )
        made, axes = tuple(outside.values()), tuple(outside)
        if group is None:
            self.scale = nnx.Param(jnp.ones(made, jnp.float32), out_sharding=axes)
        else:
            G = math.prod(inside.values()) // group
            self.scale = nnx.Param(
                jnp.ones((G, *made), jnp.bfloat16),
                out_sharding=(next(iter(inside)), *axes),
            )
        self.inside, self.outside = tuple(inside), axes
        self.activations = activations
        self.layer: jax.Array | None = None

    def __getitem__(self, _: object) -> Held:
        """`weight[...]`, as of a Param."""
        return Held(
            values=self.values[...],
            scale=self.scale[...],
            inside=self.inside,
            outside=self.outside,
            activations=self.activations,
            layer=self.layer,
        )


def matrix(
    spec: ModelSpec, rngs: nnx.Rngs, inside: Sizes, outside: Sizes, scale: float
) -> nnx.Param | QuantizedWeight:
    """A matrix of a layer: drawn from N(0, scale**2), or in few bits if the spec says.

    Args:
        spec: the model.
        rngs: to draw from.
        inside: logical axes that are summed over, and their sizes.
        outside: those that are made.
        scale: standard deviation of fresh weights.
    """
    how = spec.quantization
    if how is None:
        sizes = {**inside, **outside}
        return normal(rngs, tuple(sizes.values()), scale, tuple(sizes))
    return QuantizedWeight(
        inside,
        outside,
        kind=how.weights,
        group=how.group,
        activations=how.activations,
    )


def per_token_scales(
    how: Quantization, *, is_table: bool, D: int, V: int
) -> QuantizedWeight:
    """The table of embeddings, or the head, as int8 with a scale for each token."""
    return QuantizedWeight(
        {"embed": D},
        {"vocab": V},
        kind="int8",
        activations="int8" if how.activations == "int8" else "none",
        is_table=is_table,
    )


def quantized_product(
    x: jax.Array, w: Held, *, transposed: bool = False, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Multiply tokens by a matrix in few bits; each device its part of it.

    Where inputs are split over devices each quantizes its own part of a token, if
    tokens are quantized at all, and the parts are summed.

    Args:
        x: [B, T, *inside].
        w: the matrix; a table of embeddings if `transposed`.
        transposed: the outputs come first in `values`.
        dtype: of the result; None: that of x.

    Returns:
        [B, T, *outside].
    """
    made = dtype or x.dtype
    split = tuple(
        mesh_axis
        for axis, size in zip(w.inside, x.shape[2:], strict=True)
        for mesh_axis in mesh_axes_of(str(axis), size)
    )
    inside = len(w.inside)
    layers = () if w.layer is None else (w.layer,)

    def part(
        x: jax.Array, values: jax.Array, scale: jax.Array, *layers: jax.Array
    ) -> jax.Array:
        B, T = x.shape[:2]
        outside = scale.shape[scale.ndim - len(w.outside) :]
        N = math.prod(outside)
        rows = x.reshape(B * T, math.prod(x.shape[2:]))
        L = values.shape[: len(layers)]
        flat = values if transposed else values.reshape(*L, -1, N)
        assert transposed or values.ndim == len(L) + inside + len(w.outside)
        scales = scale.reshape(*scale.shape[: scale.ndim - len(w.outside)], N)
        y = int8_matmul(
            rows.astype(made),
            Weight(flat, scales),
            activations=w.activations,
            transposed=transposed,
            layer=layers[0] if layers else None,
        )
        y = jax.lax.psum(y, split) if split else y
        return y.reshape(B, T, *outside)

    value_axes = (*w.outside, *w.inside) if transposed else (*w.inside, *w.outside)
    if layers:
        value_axes = (None, *value_axes)
    y: jax.Array = per_shard(
        part,
        *(x, w.values, w.scale, *layers),
        in_axes=(
            ("batch", "seq", *w.inside),
            value_axes,
            w.scale_axes,
            *(() for _ in layers),
        ),
        out_axes=("batch", "seq", *w.outside),
    )
    return y


def as_float(
    values: jax.Array, scale: jax.Array, num_outside: int, *, is_table: bool = False
) -> jax.Array:
    """The float32 matrix [*inside, *outside] that values and scales stand for.

    Args:
        values: of one layer.
        scale: of one layer.
        num_outside: dimensions that are made.
        is_table: the outputs come first.
    """
    if is_table:
        return values.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    outside = values.shape[values.ndim - num_outside :]
    N = math.prod(outside)
    groups = scale.shape[: scale.ndim - num_outside]
    flat = dequantized(Weight(values.reshape(-1, N), scale.reshape(*groups, N)))
    *outer, last = values.shape[: values.ndim - num_outside]
    last = last * 2 if values.dtype == jnp.uint8 else last
    return flat.reshape(*outer, last, *outside)


def floats(table: ParamTable, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters of a quantized model as those of the model that it was made of:
    each matrix in few bits becomes the float32 numbers that it stands for.

    Args:
        table: of the quantized model.
        params: by path.
    """
    rows = {row.path: row for row in table.rows}
    made = {}
    for path, x in params.items():
        owner, _, leaf = path.rpartition(".")
        if f"{owner}.values" not in rows:
            made[path] = x
        if leaf != "values":
            continue
        axes, scale = rows[path].axes, params[f"{owner}.scale"]
        is_grouped = scale.dtype == jnp.bfloat16
        if axes[0] == "layers":
            num_outside = scale.ndim - 1 - is_grouped
            of_layer = functools.partial(as_float, num_outside=num_outside)
            made[owner] = jax.vmap(of_layer)(x, scale)
        else:
            made[owner] = as_float(x, scale, 1, is_table=axes[0] == "vocab")
    return made
