"""The grouped product as JAX's Pallas kernels for TPUs (MegaBlocks, arXiv 2211.15841).

m rows, E groups, K summed, N made.

Tiling: a grid step multiplies `rows` x `width` of x with `width` x `width` of one
group's matrix and sums over K in VMEM; a tile of rows that two groups share is visited
once for each. On average a group's last visit is half empty, so `rows` is at most a
quarter of an average group, between 128 and 512.

VMEM: with 512 x 1024 tiles of bfloat16, x and y take 1 MiB each, twice, the matrix 2
MiB, twice, float32 sums 2 MiB (4 MiB and 2 x 2 MiB out for the gradient of the
weights): at most 12 of the 16 MiB a kernel may take. Float32 has half the width.

Backward: the same kernel with the matrices read transposed for dx, a second one for dw,
which writes zeros for a group without rows. On other platforms it runs in Pallas's
interpreter, for tests. No tile size here was timed on a TPU.
"""

from __future__ import annotations

from typing import Any

import jax

from llmos_jax.kernels.target import current_target

_LEAST_ROWS = 128
_MOST_ROWS = 512
_WIDTH_BYTES = 2048
"""What one row of a tile may take: 1024 bfloat16."""


def suits(x_mK: jax.Array, w_EKN: jax.Array) -> bool:
    """Whether this kernel is the one for these arrays on a TPU."""
    m, E = x_mK.shape[0], w_EKN.shape[0]
    is_aligned = all(size % 128 == 0 for size in (m, *w_EKN.shape[1:]))
    return is_aligned and m >= E * _LEAST_ROWS


@jax.custom_vjp
def grouped_matmul(x_mK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`; m is a multiple of 128."""
    return _product(x_mK, w_EKN, sizes_E)


def _forward(
    x_mK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _product(x_mK, w_EKN, sizes_E), (x_mK, w_EKN, sizes_E)


def _backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy_mN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_mK, w_EKN, sizes_E = saved
    dx_mK = _product(dy_mN, w_EKN, sizes_E, is_transposed=True)
    return dx_mK, _weight_gradient(x_mK, dy_mN, w_EKN, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)


def _product(
    x_mK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    is_transposed: bool = False,
) -> jax.Array:
    """[m, N]; transposed, x is [m, N] and what comes out [m, K]."""
    # Imported here: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    E, K, N = w_EKN.shape
    summed, made = (N, K) if is_transposed else (K, N)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out: jax.Array = gmm(
            x_mK,
            w_EKN,
            sizes_E,
            preferred_element_type=x_mK.dtype,
            tiling=tiling(x_mK, E, summed, made),
            transpose_rhs=is_transposed,
            interpret=_is_interpreted(),
        )
    return out


def _weight_gradient(
    x_mK: jax.Array, dy_mN: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        dw_EKN: jax.Array = tgmm(
            x_mK.swapaxes(0, 1),
            dy_mN,
            sizes_E,
            preferred_element_type=w_EKN.dtype,
            tiling=tiling(x_mK, *w_EKN.shape),
            interpret=_is_interpreted(),
        )
    return dw_EKN


def tiling(x_mK: jax.Array, E: int, summed: int, made: int) -> tuple[int, int, int]:
    """Rows, summed and made elements of one grid step."""
    m, most = x_mK.shape[0], min(_MOST_ROWS, x_mK.shape[0] // E // 4)
    rows = _LEAST_ROWS
    while rows * 2 <= most and m % (rows * 2) == 0:
        rows *= 2
    width = _WIDTH_BYTES // x_mK.dtype.itemsize
    return rows, min(summed, width), min(made, width)


def _is_interpreted() -> Any:
    return current_target().platform != "tpu"
