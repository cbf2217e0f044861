"""Attention as its definition reads: scores, mask, softmax, weighted sum.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
H head size. The oracle for every other implementation; whole scores are materialised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CONTEXT = "context"
"""Name under which remat policies know the output, and any log-sum-exp beside it.

Where it is saved, fused implementations do not run forward again in the backward pass;
this one must, for it needs the weights.
"""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    if position_BT is None:
        position_BT = whole(B, T)
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
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), CONTEXT)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """See `api.rotary_attention`."""
    q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
    return attention(q_BTNH, k_BTKH, v_BTKH, position_BT)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of dimensions (h, h + H/2) by its angle; computed in float32."""
    cos_BTNH, sin_BTNH = (part[:, :, None, :] for part in angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [
            first * cos_BTNH - second * sin_BTNH,
            second * cos_BTNH + first * sin_BTNH,
        ],
        axis=-1,
    )
    return rotated.astype(x_BTNH.dtype)


def whole(B: int, T: int) -> jax.Array:
    """int32 [B, T] positions of whole sequences."""
    return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
