"""Attention over a cache as its definition reads: numbers times scales, then attention.

B sequences, T query tokens, S cache slots, N query heads, K key/value heads, H head
size. The oracle for every other implementation; the whole cache becomes float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmos_jax.kernels.attention import reference
from llmos_jax.kernels.attention.reference import Score


def decode_attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    k_scale_BKS: jax.Array | None,
    v_scale_BKS: jax.Array | None,
    *,
    score: Score,
) -> jax.Array:
    """See `api.decode_attention`."""
    out_BTNH = reference.attention(
        q_BTNH.astype(jnp.float32),
        dequantized(k_BKSH, k_scale_BKS).swapaxes(1, 2),
        dequantized(v_BKSH, v_scale_BKS).swapaxes(1, 2),
        position_BT,
        score=score,
    )
    return out_BTNH.astype(q_BTNH.dtype)


def dequantized(x_BKSH: jax.Array, scale_BKS: jax.Array | None) -> jax.Array:
    """What a cache holds, in float32."""
    x_BKSH = x_BKSH.astype(jnp.float32)
    return x_BKSH if scale_BKS is None else x_BKSH * scale_BKS[..., None]
