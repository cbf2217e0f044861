"""Attention as its definition reads: scores, mask, softmax, weighted sum.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
H head size. The oracle for every other implementation; whole scores are materialised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, position_BT: jax.Array
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    visible_BTS = jnp.arange(S)[None, None, :] <= position_BT[:, :, None]
    scores_BKGTS = jnp.where(
        visible_BTS[:, None, None, :, :],
        scores_BKGTS * jnp.float32(H**-0.5),
        jnp.finfo(jnp.float32).min,
    )
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)
