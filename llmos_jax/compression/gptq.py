"""Round a matrix so that what it makes of its inputs stays: GPTQ (arXiv 2210.17323).

K summed inputs, N made outputs, G groups of inputs, g = K/G inputs of a group (or of a
block, where an output has one scale). Inputs are rounded one after another, and what an
input's error does to the outputs is made good, as far as can be, by those that are
still to be rounded. How is in the inverse of the inputs' second moments H: with
H^-1 = U'U, U upper triangular, an error e of input j is spread over k > j as
-e U[j, k] / U[j, j].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from llmos_jax.compression.rounding import best_scale
from llmos_jax.kernels.int8_matmul.weight import (
    Kind,
    Weight,
    kept_scale,
    rounded,
    snapped,
)

DAMPING = 0.01
"""Added to the diagonal of H, times its mean (GPTQ, section 3.3, step 3)."""
BLOCK = 128
"""Inputs whose errors are spread over the rest at once (GPTQ, section 3.3, step 2)."""


def spreading(h_KK: jax.Array) -> jax.Array:
    """U of damped H: upper triangular, H^-1 = U'U.

    Reversed in both directions H = R R' with R upper triangular, so U is R^-1: one
    Cholesky factor and no inverse of H.
    """
    K = h_KK.shape[0]
    diagonal_K = jnp.diagonal(h_KK)
    # An input that was always zero has no say: its row of H becomes the identity's.
    dead_K = jnp.where(diagonal_K == 0, jnp.float32(1), jnp.float32(0))
    damped_K = dead_K + DAMPING * jnp.mean(diagonal_K)
    h_KK = h_KK + jnp.diag(damped_K)
    r_KK = jnp.linalg.cholesky(h_KK[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(r_KK, jnp.eye(K, dtype=jnp.float32), lower=False)


@functools.partial(jax.jit, static_argnames=("kind", "group", "clip"))
def gptq(
    w_KN: jax.Array,
    h_KK: jax.Array,
    *,
    kind: Kind,
    group: int | None = None,
    clip: bool = True,
) -> Weight:
    """Round a matrix for inputs with given second moments.

    The scales of a group are set when its turn comes, for what is then to be rounded.

    Args:
        w_KN: float32.
        h_KK: sum over tokens of x x', float32.
        kind: what to store.
        group: inputs that share a scale, dividing K; None: all of an output.
        clip: search for scales.
    """
    with jax.default_matmul_precision("highest"):
        return _gptq(w_KN, h_KK, kind, group, clip)


def _gptq(
    w_KN: jax.Array, h_KK: jax.Array, kind: Kind, group: int | None, clip: bool
) -> Weight:
    K, N = w_KN.shape
    w_KN = jnp.where(jnp.diagonal(h_KK)[:, None] == 0, jnp.float32(0), w_KN)
    u_KK = spreading(h_KK)
    # What rounding an input by itself costs once the others have made it good.
    cost_K = 1 / jnp.square(jnp.diagonal(u_KK))
    g = _block(K) if group is None else group
    whole_1N = None
    if group is None:
        whole_1N = best_scale(w_KN[None], kind, clip=clip, importance_Gg=cost_K[None])

    def round_block(
        w_KN: jax.Array, block: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start = block * g
        w_gN = jax.lax.dynamic_slice_in_dim(w_KN, start, g)
        u_gK = jax.lax.dynamic_slice_in_dim(u_KK, start, g)
        u_gg = jax.lax.dynamic_slice_in_dim(u_gK, start, g, axis=1)
        scale_1N = whole_1N
        if scale_1N is None:
            cost_g = jax.lax.dynamic_slice_in_dim(cost_K, start, g)
            scale_1N = best_scale(
                w_gN[None], kind, clip=clip, importance_Gg=cost_g[None]
            )
            scale_1N = scale_1N.astype(jnp.bfloat16).astype(jnp.float32)
        made_gN, error_gN = _round_rows(w_gN, u_gg, scale_1N, kind)
        # Rows before `start` take nothing, for U is zero there.
        return w_KN - u_gK.T @ error_gN, (made_gN, scale_1N[0])

    _, (made_GgN, scale_GN) = jax.lax.scan(round_block, w_KN, jnp.arange(K // g))
    return rounded(made_GgN.reshape(K, N), kept_scale(scale_GN, group), kind)


def _round_rows(
    w_gN: jax.Array, u_gg: jax.Array, scale_1N: jax.Array, kind: Kind
) -> tuple[jax.Array, jax.Array]:
    """Round inputs one after another; return them, and errors over U's diagonal."""

    def round_row(
        w_gN: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        w_1N, u_1g = w_gN[index][None], u_gg[index][None]
        made_1N = snapped(w_1N / scale_1N, kind) * scale_1N
        error_1N = (w_1N - made_1N) / u_gg[index, index]
        return w_gN - u_1g.T * error_1N, (made_1N[0], error_1N[0])

    _, found = jax.lax.scan(round_row, w_gN, jnp.arange(w_gN.shape[0]))
    return found


def _block(K: int) -> int:
    """The largest divisor of K up to BLOCK."""
    return max(size for size in range(1, min(K, BLOCK) + 1) if K % size == 0)
