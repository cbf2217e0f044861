"""Choose an implementation of causal grouped-query attention and check its arguments.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads,
H head size.

The target, not this process's backend, decides (`kernels.target`). The first that
suits is picked:

| implementation | where it is picked |
|---|---|
| cpu | float32, no segments, for one device of this machine's CPU, a C++ compiler |
| splash | for TPUs: whole sequences of at least 256 tokens, 32 <= H <= 256 |
| pallas_gpu | for GPUs: the same, 16 <= H, <= 256 bytes of a head, no window or cap |
| blocked | more than 512 queries |
| reference | everywhere else |

In a program for many devices `splash` and `pallas_gpu` must see one device's part of
the arrays, the others may: call these functions under `models.per_shard`. Where
sequences are split over devices, see `context`.
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax

from llmos_jax.kernels.attention import blocked, cpu, gpu, reference, splash
from llmos_jax.kernels.attention.reference import PLAIN, Score, rotate
from llmos_jax.kernels.target import current_target
from llmos_jax.telemetry import log

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "cpu": cpu,
    "splash": splash,
    "pallas_gpu": gpu,
    "blocked": blocked,
    "reference": reference,
}


ROTATING: dict[str, ModuleType] = {"cpu": cpu, "splash": splash}
"""Those with a `rotary_attention` of their own: one kernel, or one rounding less."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
    implementation: str | None = None,
) -> jax.Array:
    """Attend each query to the keys of its document at or before its position.

    Key `s` is visible to a query at position `p` if and only if `s <= p`, both are of
    one segment and, with a window, `s > p - window`. In training query `t` stands at
    `t`; with a KV cache it is where the query stands in the cache. Every query must see
    a key: what comes out for one that sees none is finite, but differs between
    implementations.

    The output, and the log-sum-exp where an implementation has one, are named CONTEXT
    for remat policies.

    Args:
        q_BTNH: queries, rotated; scaled here.
        k_BSKH: keys, rotated. N must be a multiple of K.
        v_BSKH: values.
        position_BT: int32 position of each query among the S keys. None: query `t` at
            `t`, known to the compiler; some implementations need that.
        segment_BT: int32 document of each query and, as T = S then, of each key; any
            numbers but the least one. None: all are of one, as with a KV cache.
        score: how scores are made; its window is 1 or more, its softcap above 0.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [B, T, N, H] in the dtype of `v_BSKH`; softmax is taken in float32.
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    assert k_BSKH.shape == v_BSKH.shape, (k_BSKH.shape, v_BSKH.shape)
    assert segment_BT is None or k_BSKH.shape[1] == q_BTNH.shape[1], k_BSKH.shape
    _check_tokens(q_BTNH, position_BT, segment_BT)
    score = _checked(score, q_BTNH, position_BT)
    tokens = (position_BT, segment_BT)
    name = implementation or _fastest(q_BTNH, k_BSKH, v_BSKH, *tokens, score)
    out_BTNH: jax.Array = IMPLEMENTATIONS[name].attention(
        q_BTNH, k_BSKH, v_BSKH, *tokens, score=score
    )
    return out_BTNH


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
    implementation: str | None = None,
) -> jax.Array:
    """Rotate queries and keys by the same angles, then attend among these T tokens.

    For whole sequences, without a KV cache. The angles are constants: no gradient flows
    to them.

    Args:
        q_BTNH: queries, not rotated. H must be even.
        k_BTKH: keys of the same tokens, not rotated.
        v_BTKH: values.
        position_BT: int32 position of each query among the T keys, or None, as in
            `attention`.
        angles: cos and sin, float32 [B, T, H/2].
        segment_BT: int32 document of each token, or None, as in `attention`.
        score: as in `attention`.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [B, T, N, H] in the dtype of `v_BTKH`.
    """
    B, T, N, H = q_BTNH.shape
    assert k_BTKH.shape[:2] == (B, T), (q_BTNH.shape, k_BTKH.shape)
    assert k_BTKH.shape == v_BTKH.shape, (k_BTKH.shape, v_BTKH.shape)
    assert N % k_BTKH.shape[2] == 0, (q_BTNH.shape, k_BTKH.shape)
    _check_tokens(q_BTNH, position_BT, segment_BT)
    assert H % 2 == 0, q_BTNH.shape
    assert all(part.shape == (B, T, H // 2) for part in angles), q_BTNH.shape
    cos, sin = (jax.lax.stop_gradient(part) for part in angles)
    score = _checked(score, q_BTNH, position_BT)
    tokens = (position_BT, segment_BT)
    name = implementation or _fastest(q_BTNH, k_BTKH, v_BTKH, *tokens, score)
    out_BTNH: jax.Array
    if name in ROTATING:
        out_BTNH = ROTATING[name].rotary_attention(
            q_BTNH, k_BTKH, v_BTKH, position_BT, (cos, sin), segment_BT, score=score
        )
    else:
        q_BTNH, k_BTKH = (rotate(x, (cos, sin)) for x in (q_BTNH, k_BTKH))
        out_BTNH = IMPLEMENTATIONS[name].attention(
            q_BTNH, k_BTKH, v_BTKH, *tokens, score=score
        )
    return out_BTNH


def _check_tokens(q_BTNH: jax.Array, *per_token: jax.Array | None) -> None:
    for x_BT in per_token:
        assert x_BT is None or x_BT.shape == q_BTNH.shape[:2], (x_BT, q_BTNH.shape)


def _checked(score: Score, q_BTNH: jax.Array, position_BT: jax.Array | None) -> Score:
    """The score, without a window that hides nothing."""
    window, softcap, _ = score
    assert window is None or window >= 1, score
    assert softcap is None or softcap > 0, score
    if window is not None and position_BT is None and window >= q_BTNH.shape[1]:
        return score._replace(window=None)
    return score


def _fastest(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    score: Score = PLAIN,
) -> str:
    if segment_BT is None and cpu.suits(q_BTNH, k_BSKH, v_BSKH):
        reason = cpu.unavailable()
        if reason is None:
            return "cpu"
        _say_once(reason)
    platform = current_target().platform
    if platform == "tpu" and splash.suits(q_BTNH, k_BSKH, position_BT):
        return "splash"
    if platform == "gpu" and gpu.suits(q_BTNH, k_BSKH, position_BT, score):
        return "pallas_gpu"
    return "blocked" if blocked.suits(q_BTNH.shape[1]) else "reference"


@functools.cache
def _say_once(reason: str) -> None:
    log(f"attention runs in plain XLA, which is slower: {reason}")
