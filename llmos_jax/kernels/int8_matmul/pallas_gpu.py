"""Rows times an int8 table on a Hopper GPU: a kernel of jax.experimental.pallas.

m rows, K summed inputs, N made outputs.

The library's kernel multiplies int8 [N, K], converted in registers, with bfloat16 [K,
m] from shared memory: the left side of a Hopper product may come from registers, the
right may not. So it takes tables ([N, K], `transposed`) as they are, rows and results
turned around it, which are small. A matrix [K, N] would have to be turned at every
call, at the price of reading it three times: XLA's own product is used for those.

Tiling: 128 outputs to a program, 64 to each of two warpgroups, by all rows up to 128;
three times 128 inputs on their way, 208 of the 227 KiB of shared memory with 128 rows.
Rows are padded to 16, 32, 64 or 128. Not run on a GPU; no tile was timed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmos_jax.errors import LowerError
from llmos_jax.kernels.int8_matmul.reference import Activations
from llmos_jax.kernels.int8_matmul.weight import Weight

_OUTPUTS = 64
_INPUTS = 128
_STEPS = 3
_ROWS = (16, 32, 64, 128)


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: Activations = "none",
    transposed: bool = False,
) -> jax.Array:
    """See `api.int8_matmul`.

    Raises:
        LowerError: the kernel does not take these arrays.
    """
    if not suits(x_mK, w, activations, transposed):
        raise LowerError(
            "The Hopper kernel multiplies bfloat16 rows with an int8 table [N, K] of "
            f"sizes that are multiples of {_INPUTS}; it was given {x_mK.dtype} rows, "
            f"activations={activations}, transposed={transposed} and {w.kind} values "
            f'{w.values.shape}. Use implementation="xla".'
        )
    # Imported late: Pallas for GPUs takes a second that other platforms need not.
    from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as library

    m = len(x_mK)
    rows = next((rows for rows in _ROWS if m <= rows), _ROWS[-1])
    config = library.TuningConfig(
        tile_m=_OUTPUTS,
        tile_n=rows,
        tile_k=_INPUTS,
        max_concurrent_steps=_STEPS,
        epi_tile_n=min(rows, 64),
        epi_tile_m=_OUTPUTS,
        wg_dimension=library.MatmulDimension.M,
    )
    x_Km = jnp.pad(x_mK, ((0, -m % rows), (0, 0))).T
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        sum_Nm: jax.Array = library.mixed_matmul_kernel(
            w.values, x_Km, out_dtype=jnp.dtype("float32"), config=config
        )
    return (sum_Nm.T[:m] * w.scale[None, :]).astype(x_mK.dtype)


def suits(
    x_mK: jax.Array, w: Weight, activations: Activations, transposed: bool
) -> bool:
    """Whether this kernel is the one for these arrays on a Hopper GPU."""
    return (
        transposed
        and activations == "none"
        and w.kind == "int8"
        and x_mK.dtype == jnp.bfloat16
        and all(size % _INPUTS == 0 for size in w.values.shape)
    )
