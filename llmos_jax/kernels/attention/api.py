"""Choose an implementation of causal grouped-query attention and check its arguments.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads,
H head size.

| implementation | where it is picked |
|---|---|
| cpu | float32, the CPU backend, one device, and a C++ compiler |
| reference | everywhere else |
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax

from llmos_jax.kernels.attention import cpu, reference
from llmos_jax.telemetry import log

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}


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
    Every query must see a key (`p >= 0`): what comes out for one that sees none is
    finite, but differs between implementations.

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
    chosen = IMPLEMENTATIONS[implementation or _fastest(q_BTNH, k_BSKH, v_BSKH)]
    return chosen.attention(q_BTNH, k_BSKH, v_BSKH, position_BT)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Rotate queries and keys by the same angles, then attend among these T tokens.

    For whole sequences, without a KV cache. The angles are constants: no gradient flows
    to them.

    Args:
        q_BTNH: queries, not rotated. H must be even.
        k_BTKH: keys of the same tokens, not rotated.
        v_BTKH: values.
        position_BT: int32 position of each query among the T keys, as in `attention`.
        angles: cos and sin, float32 [B, T, H/2].
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [B, T, N, H] in the dtype of `v_BTKH`.
    """
    B, T, N, H = q_BTNH.shape
    assert k_BTKH.shape[:2] == (B, T), (q_BTNH.shape, k_BTKH.shape)
    assert k_BTKH.shape == v_BTKH.shape, (k_BTKH.shape, v_BTKH.shape)
    assert N % k_BTKH.shape[2] == 0, (q_BTNH.shape, k_BTKH.shape)
    assert position_BT.shape == (B, T), (position_BT.shape, q_BTNH.shape)
    assert H % 2 == 0, q_BTNH.shape
    assert all(part.shape == (B, T, H // 2) for part in angles), q_BTNH.shape
    cos, sin = (jax.lax.stop_gradient(part) for part in angles)
    chosen = IMPLEMENTATIONS[implementation or _fastest(q_BTNH, k_BTKH, v_BTKH)]
    return chosen.rotary_attention(q_BTNH, k_BTKH, v_BTKH, position_BT, (cos, sin))


def _fastest(*arrays: jax.Array) -> str:
    if not cpu.suits(*arrays):
        return "reference"
    reason = cpu.unavailable()
    if reason is None:
        return "cpu"
    _say_once(reason)
    return "reference"


@functools.cache
def _say_once(reason: str) -> None:
    log(f"attention runs in plain XLA, which is slower: {reason}")
