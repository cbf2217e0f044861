"""Choose an implementation of the grouped matrix product and check its arguments.

m rows, E groups, K summed, N made. The target, not this process's backend, decides
(`kernels.target`). The first that suits is picked:

| implementation | where it is picked |
|---|---|
| megablox | for TPUs: a multiple of 128 rows, at least 128 for each group on average |
| ragged | everywhere else |

In a program for many devices call this under `models.per_shard`: a partitioner cannot
split either.
"""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp

from llmos_jax.kernels.grouped_matmul import megablox, ragged, reference
from llmos_jax.kernels.target import current_target

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "megablox": megablox,
    "ragged": ragged,
    "reference": reference,
}


def grouped_matmul(
    x_mK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply the first sizes[0] rows by w[0], the next sizes[1] by w[1], and so on.

    Differentiable by rows and weights; a group without rows gets a gradient of zeros.

    Args:
        x_mK: rows, sorted by group.
        w_EKN: one matrix for each group.
        sizes_E: int32 rows of each group; zeros are fine. Where they add up to fewer
            than m, the rows past them (and their gradients) must be zeros and what
            comes out for them, both ways, may be anything, NaN too; megablox does not
            spend time on them.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [m, N] in the dtype of `x_mK`; sums are taken in float32.
    """
    assert x_mK.shape[1] == w_EKN.shape[1], (x_mK.shape, w_EKN.shape)
    assert sizes_E.shape == w_EKN.shape[:1], (sizes_E.shape, w_EKN.shape)
    assert sizes_E.dtype == jnp.int32, sizes_E.dtype
    assert x_mK.dtype == w_EKN.dtype, (x_mK.dtype, w_EKN.dtype)
    name = implementation or _fastest(x_mK, w_EKN)
    out_mN: jax.Array = IMPLEMENTATIONS[name].grouped_matmul(x_mK, w_EKN, sizes_E)
    return out_mN


def _fastest(x_mK: jax.Array, w_EKN: jax.Array) -> str:
    if current_target().platform == "tpu" and megablox.suits(x_mK, w_EKN):
        return "megablox"
    return "ragged"
