"""Choose an implementation of causal grouped-query attention and check its arguments.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from llmos_jax.kernels.attention import reference

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.attention,
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attend each query to the keys at or before its position.

    Key `s` is visible to a query at position `p` if and only if `s <= p`. In training
    `position = arange(T)`; with a KV cache it is where the query stands in the cache.

    Args:
        q_BTNH: queries, rotated; scaled by H**-0.5 here.
        k_BSKH: keys, rotated. N must be a multiple of K.
        v_BSKH: values.
        position_BT: int32 position of each query among the S keys.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [B, T, N, H] in the dtype of `v_BSKH`; softmax is taken in float32.
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    assert k_BSKH.shape == v_BSKH.shape, (k_BSKH.shape, v_BSKH.shape)
    assert position_BT.shape == q_BTNH.shape[:2], (position_BT.shape, q_BTNH.shape)
    return IMPLEMENTATIONS[implementation or "reference"](
        q_BTNH, k_BSKH, v_BSKH, position_BT
    )
