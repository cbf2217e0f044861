"""Rows times a matrix of few bits on a TPU: Pallas kernels, compiled by Mosaic.

m rows, K summed inputs, N made outputs, G groups of inputs, g = K/G, L layers.

One kernel body: a grid step multiplies a tile of rows with a piece of the matrix; steps
over inputs, the innermost, add up in VMEM; the last one scales. The layer is part of a
piece's address: no layer of a stack is sliced out. What differs is how a tile's product
is made:

- few-bit rows (W8A8): int8 x int8 in the matrix unit with int32 sums, or float8 by
  float8 with float32 ones. A few rows come as they are and are quantized in the kernel,
  which holds all inputs of a row; the arithmetic hides behind reading the matrix. More
  rows are quantized before it, once: each step would do it again (128 x 28672 by 128
  takes 9349 instructions on v5e, in which it reads 1.4 times as many bytes).
- weight-only: the piece is converted to the dtype of the rows, exactly, and scaled
  after the product.
- groups, and int4: the piece is scaled while it is converted, rounded once. Bytes of
  int4 hold inputs 2j and 2j + 1, and taking them apart in order would shuffle
  registers; instead rows come in two, of even and of odd inputs, and so does the
  piece. Bytes are masked four at a time, as 32-bit words. Where rows are int8 and a
  group has 128 inputs or more, groups are summed as whole numbers instead, and sums
  scaled: exact, and more than twice as fast.

Mosaic multiplies float8_e4m3fn on every generation; v5 and v6 do it as e4m3b11 with
another exponent. tpu7x has no int8 product; Mosaic makes it of bfloat16.

A partitioner cannot split a kernel: in a program for many devices call it under
`models.per_shard`. On other platforms it runs in Pallas's interpreter, for tests. No
tile was timed on a TPU: blocks.toml says what they rest on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.errors import LowerError
from llmos_jax.kernels.int8_matmul.blocks import (
    FEW_ROWS,
    VMEM_BYTES,
    Blocks,
    Product,
    blocks_for,
    generation,
    vmem_bytes,
)
from llmos_jax.kernels.int8_matmul.reference import Activations, quantized_rows
from llmos_jax.kernels.int8_matmul.weight import Weight
from llmos_jax.kernels.target import current_target

SMALLEST = 512
"""Inputs and outputs below which a matrix is read in less than a kernel's launch."""

_LANES = 128
_WHOLE_GROUP = 128
"""Inputs of a group from which on sums of whole numbers are faster (compiled for v5e:
1137 instructions for 2818, of 16 x 4096 by 512 int4; groups of 32: 3793 for 3121)."""

_OUTPUTS_A_ROW = 2
"""Outputs of a step for each row that is quantized in it, so that reading the piece
takes longer than some six vector operations on each number of the rows."""

_BFLOAT16_ARITHMETIC = ("v6e", "tpu7x")
"""Chips whose vector units compute in bfloat16 (v6e, groups of 32: 1663 instructions
for 3063)."""


class _How(NamedTuple):
    """What a kernel must know of a product beside its blocks."""

    activations: Activations
    """What rows become in the kernel; none: they come as they are multiplied."""
    int4: bool
    grouped: bool
    transposed: bool
    narrow: bool
    """Whether pieces are scaled in bfloat16: rounded once either way."""


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: Activations = "none",
    transposed: bool = False,
    layer: jax.Array | None = None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """See `api.int8_matmul`.

    Args:
        blocks: a tile to use instead of the table's; its inputs must divide K.

    Raises:
        LowerError: no tile of these arrays fits VMEM.
    """
    m, K = x_mK.shape
    product = _product_of(x_mK, w, activations, transposed)
    tile = blocks or blocks_for(product, generation())
    if vmem_bytes(tile, product) > VMEM_BYTES:
        raise LowerError(
            f"The TPU kernel's tile {tuple(tile)} of {m} rows, {K} inputs and "
            f"{product.N} outputs takes {vmem_bytes(tile, product) / 2**20:.0f} MiB of "
            f'{VMEM_BYTES / 2**20:.0f}. Use implementation="xla".'
        )
    dtype = x_mK.dtype
    grouped = w.kind == "int4" or w.scale.ndim == 2
    row_m1 = jnp.ones((m, 1), jnp.float32)
    inside = not grouped and tile.inputs == K and m <= FEW_ROWS
    inside = inside and m <= tile.outputs // _OUTPUTS_A_ROW
    if activations != "none" and not inside:
        x_mK, row_m1 = quantized_rows(x_mK, activations)
        if grouped and not _sums_groups(w, activations):
            x_mK = x_mK.astype(jnp.bfloat16)
    how = _How(
        activations=activations if inside else "none",
        int4=w.kind == "int4",
        grouped=grouped,
        transposed=transposed,
        narrow=generation() in _BFLOAT16_ARITHMETIC and x_mK.dtype == jnp.bfloat16,
    )
    parts = (x_mK[:, 0::2], x_mK[:, 1::2]) if how.int4 else (x_mK,)
    scale = w.scale.reshape(-1, product.N)
    return _call(parts, row_m1, w.values, layer, scale, how, product, tile, dtype)


def suits(
    x_mK: jax.Array, w: Weight, activations: Activations, transposed: bool
) -> bool:
    """Whether this kernel is the one for these arrays on a TPU."""
    product = _product_of(x_mK, w, activations, transposed)
    chip = generation()
    tile = blocks_for(product, chip)
    return (
        chip != "v4"
        and min(product.K, product.N) >= SMALLEST
        and product.K % _LANES == 0
        and (w.scale.ndim == 1 or (product.K // w.scale.shape[0]) % 32 == 0)
        and vmem_bytes(tile, product) <= VMEM_BYTES
    )


def _sums_groups(w: Weight, activations: Activations) -> bool:
    """Whether groups are summed as whole numbers."""
    group = w.group or w.inputs
    return activations == "int8" and group % _WHOLE_GROUP == 0


def _product_of(
    x_mK: jax.Array, w: Weight, activations: Activations, transposed: bool
) -> Product:
    m, K = x_mK.shape
    N = w.scale.shape[-1]
    group = K // w.scale.shape[0] if w.scale.ndim == 2 else None
    grouped = w.kind == "int4" or group is not None
    kind = f"{w.kind}-{activations}"
    row_bytes: float = x_mK.dtype.itemsize
    if activations != "none" and (m > FEW_ROWS or grouped):
        row_bytes = 2 if grouped and not _sums_groups(w, activations) else 1
    return Product(
        kind=kind if not grouped else f"{kind}-{group or K}",
        m=m,
        K=K,
        N=N,
        row_bytes=row_bytes,
        bits=4 if w.kind == "int4" else 8,
        # A block of bfloat16 scales has 8 rows or all of them; of rows, 128 columns,
        # of which int4 has half in each part.
        least=max(8 * group if group else 0, 256 if w.kind == "int4" else _LANES),
    )


def _call(
    parts: tuple[jax.Array, ...],
    row_m1: jax.Array,
    values: jax.Array,
    layer: jax.Array | None,
    scale_GN: jax.Array,
    how: _How,
    product: Product,
    tile: Blocks,
    dtype: jnp.dtype,
) -> jax.Array:
    # Imported here: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, outputs, inputs = tile
    m, K, N = product.m, product.K, product.N
    steps = K // inputs
    assert steps * inputs == K, (tile, K)
    halves = len(parts)
    G = scale_GN.shape[0] // steps if how.grouped and scale_GN.shape[0] > 1 else 1
    moves = scale_GN.shape[0] > 1
    at_layer = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    row_spec = pl.BlockSpec((rows, inputs // halves), lambda i, j, k, _: (i, k))
    piece = (outputs, inputs) if how.transposed else (inputs // halves, outputs)

    def of_matrix(i: Any, j: Any, k: Any, layer: Any) -> tuple[Any, ...]:
        at = (j, k) if how.transposed else (k, j)
        return (layer[0], *at)[-values.ndim :]

    whole_sums = parts[0].dtype == jnp.int8 or how.activations == "int8"
    sums = jnp.int32 if whole_sums and not how.grouped else jnp.float32
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        y_mN: jax.Array = pl.pallas_call(
            functools.partial(_kernel, how=how, steps=steps, sums=sums),
            out_shape=jax.ShapeDtypeStruct((m, N), dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(pl.cdiv(m, rows), pl.cdiv(N, outputs), steps),
                in_specs=[
                    *[row_spec] * halves,
                    pl.BlockSpec((rows, 1), lambda i, j, k, _: (i, 0)),
                    pl.BlockSpec((None, *piece)[-values.ndim :], of_matrix),
                    pl.BlockSpec(
                        (G, outputs), lambda i, j, k, _: (k if moves else 0, j)
                    ),
                ],
                out_specs=pl.BlockSpec((rows, outputs), lambda i, j, k, _: (i, j)),
                scratch_shapes=[pltpu.VMEM((rows, outputs), sums)] * (steps > 1),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES + 8 * 2**20,
            ),
            interpret=current_target().platform != "tpu",
            name=f"int8_matmul_{product.kind.replace('-', '_')}",
        )(at_layer, *parts, row_m1, values, scale_GN)
    return y_mN


def _kernel(layer: Any, *refs: Any, how: _How, steps: int, sums: Any) -> None:
    """One grid step: a tile's product, added up; the last one scales."""
    from jax.experimental import pallas as pl

    halves = 2 if how.int4 else 1
    parts, (row_ref, w_ref, scale_ref, y_ref), rest = (
        refs[:halves],
        refs[halves : halves + 4],
        refs[halves + 4 :],
    )
    row_m1 = row_ref[...]
    if how.activations != "none":
        q_mK, row_m1 = quantized_rows(parts[0][...], how.activations)
        sum_mN = _dot(q_mK, w_ref[...], sums, how.transposed)
    elif how.grouped:
        sum_mN = _groups_product([part[...] for part in parts], w_ref, scale_ref, how)
    else:
        x_mK, w_KN = parts[0][...], w_ref[...]
        if x_mK.dtype.itemsize > 1:
            w_KN = w_KN.astype(x_mK.dtype)
        sum_mN = _dot(x_mK, w_KN, sums, how.transposed)

    def finish(sum_mN: jax.Array) -> None:
        y_mN = sum_mN.astype(jnp.float32) * row_m1
        if not how.grouped:
            y_mN = y_mN * scale_ref[...]
        y_ref[...] = y_mN.astype(y_ref.dtype)

    if steps == 1:
        finish(sum_mN)
        return
    (total_ref,) = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total_ref[...] = sum_mN

    @pl.when(step > 0)
    def _() -> None:
        total_ref[...] += sum_mN

    @pl.when(step == steps - 1)
    def _() -> None:
        finish(total_ref[...])


def _groups_product(
    parts: list[jax.Array], w_ref: Any, scale_ref: Any, how: _How
) -> jax.Array:
    """A tile's product with a piece whose groups have scales, float32 [m, N]."""
    numbers = _taken_apart(w_ref[...]) if how.int4 else [w_ref[...]]
    G, N = scale_ref.shape
    K = numbers[0].shape[0]
    if parts[0].dtype == jnp.int8:
        sum_mN = jnp.zeros((parts[0].shape[0], N), jnp.float32)
        for first in range(0, K, K // G):
            group = slice(first, first + K // G)
            products = [
                _dot(x_mK[:, group], n_KN[group], jnp.int32)
                for x_mK, n_KN in zip(parts, numbers, strict=True)
            ]
            whole_mN = sum(products[1:], products[0]).astype(jnp.float32)
            at = first * G // K
            sum_mN += whole_mN * scale_ref[at : at + 1, :].astype(jnp.float32)
        return sum_mN
    kind = jnp.bfloat16 if how.narrow else jnp.float32
    scale_G1N = scale_ref[...].astype(kind)[:, None, :]
    products = []
    for x_mK, n_KN in zip(parts, numbers, strict=True):
        w_GgN = n_KN.astype(kind).reshape(G, K // G, N) * scale_G1N
        w_KN = w_GgN.reshape(K, N).astype(x_mK.dtype)
        products.append(_dot(x_mK, w_KN, jnp.float32))
    return sum(products[1:], products[0])


def _taken_apart(pairs: jax.Array) -> list[jax.Array]:
    """uint8 pairs of int4 to int8 [K/2, N] twice: of even and of odd inputs."""
    from jax.experimental.pallas import tpu as pltpu

    words = pltpu.bitcast(pairs, jnp.int32)
    mask, eights = jnp.int32(0x0F0F0F0F), jnp.int32(0x08080808)
    tops = jnp.int32(-0x7F7F7F80)  # 0x80 in each byte, so that none borrows of the next
    halves = (words & mask, (words >> 4) & mask)
    signed = (((half | tops) - eights) ^ tops for half in halves)
    return [pltpu.bitcast(half, jnp.int8) for half in signed]


def _dot(
    x_mK: jax.Array, w_KN: jax.Array, kind: Any, transposed: bool = False
) -> jax.Array:
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x_mK, w_KN, dims, preferred_element_type=kind)
