"""Choose an implementation of attention over a KV cache and check its arguments.

L layers, B sequences, T query tokens, S cache slots, N query heads, K key/value heads,
H head size, P pages of C slots, M pages of a sequence at most.

A cache is contiguous, [L, B, K, S, H], or paged, [L, P, K, C, H] with a table [B, M]
that says which pages a sequence has (`pages`); then S = M * C.

The target, not this process's backend, decides (`kernels.target`). The first that
suits is picked:

| implementation | where it is picked |
|---|---|
| pallas_tpu | for TPUs: at most 8 tokens a sequence, H and S or C multiples of 128 |
| xla | everywhere else |

`cpu` is never picked: it is a face of `cpu.attend_rows`, for the laws; models hand that
function whole rows. In a program for many devices `pallas_tpu` must see one device's
part of the arrays: call these functions under `models.per_shard`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llmos_jax.kernels.attention.reference import PLAIN, Score
from llmos_jax.kernels.decode_attention import cpu, pages, pallas_tpu, reference, xla
from llmos_jax.kernels.target import current_target

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "pallas_tpu": pallas_tpu,
    "cpu": cpu,
    "xla": xla,
    "reference": reference,
}

WRITERS: dict[str, ModuleType] = {"pallas_tpu": pallas_tpu, "xla": xla}
"""Those with a `write_tokens`."""


def decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    position_BT: jax.Array,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    layer: jax.Array | None = None,
    table_BM: jax.Array | None = None,
    score: Score = PLAIN,
    implementation: str | None = None,
) -> jax.Array:
    """Attend each query to the keys of its sequence at or before its position.

    The key at slot `s` is seen by a query at position `p` if and only if `s <= p` and,
    with a window, `s > p - window`. What comes out for a query whose position lies
    outside the cache is finite, and of no account.

    Args:
        q_BTNH: queries, rotated; scaled here.
        k_BKSH: keys in their slots, rotated: in the dtype of the queries or another, or
            int8. With `layer`, of all layers: [L, B, K, S, H], and so are the values
            and both scales.
        v_BKSH: values.
        position_BT: int32 position of each query.
        k_scale_BKS: float32, what an int8 key is multiplied by; None: nothing.
        v_scale_BKS: the same of values.
        layer: int32 scalar. A kernel that is told it reads no other layer, where a
            slice of the cache might be copied first.
        table_BM: int32 pages of each sequence; keys and values are then pages
            [P, K, C, H], scales [P, K, C]. An entry outside [0, P) is no page: what a
            query that sees its places gets is of no account. What stands past the
            last query of a sequence, and in pages that it does not see, may be NaN.
        score: how scores are made.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [B, T, N, H] in the dtype of the queries; softmax is taken in float32.
    """
    given = (k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS)
    _check(q_BTNH, position_BT, given, layer, table_BM)
    window, softcap, _ = score
    assert window is None or window >= 1, score
    assert softcap is None or softcap > 0, score
    name = implementation or _fastest(q_BTNH, k_BKSH)
    implemented = IMPLEMENTATIONS[name].decode_attention
    options: dict[str, Any] = {"score": score}
    if name in ("pallas_tpu", "cpu"):
        options["table_BM"] = table_BM
    if name == "pallas_tpu":
        if layer is None:
            given, layer = _each(given, lambda x: x[None]), jnp.int32(0)
        options["layer"] = layer
    elif name == "cpu" or table_BM is None:
        given = _of_layer(given, layer)
    else:
        given = _unpaged(given, layer, table_BM, position_BT, window)
    out_BTNH: jax.Array = implemented(q_BTNH, position_BT, *given, **options)
    return out_BTNH


def write_tokens(
    cache: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    position_BT: jax.Array,
    layer: jax.Array,
    *,
    table_BM: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Write tokens to their slots; in place where the cache is donated.

    A token whose position lies outside the cache (padding), or where its sequence has
    no page, is not written. No two sequences may write to the same page.

    Args:
        cache: [L, B, K, S, H], and scales [L, B, K, S].
        new: for each, [B, T, K, H] or [B, T, K] in its dtype. T is at most S.
        position_BT: int32; of a sequence's tokens that are written, token `t` goes to
            position_BT[b, 0] + t.
        layer: int32 scalar.
        table_BM: int32 pages of each sequence; the cache is then pages
            [L, P, K, C, H], and scales [L, P, K, C].
        implementation: a name in WRITERS; None picks the fastest here.
    """
    B, T = position_BT.shape
    for old, tokens in zip(cache, new, strict=True):
        assert tokens.shape == (B, T, old.shape[2], *old.shape[4:]), (old, tokens)
        assert tokens.dtype == old.dtype, (old.dtype, tokens.dtype)
    name = implementation
    if name is None:
        on_tpu = current_target().platform == "tpu"
        name = "pallas_tpu" if on_tpu and pallas_tpu.writes(cache, T) else "xla"
    written: tuple[jax.Array, ...] = WRITERS[name].write_tokens(
        cache, new, position_BT, layer, table_BM=table_BM
    )
    return written


Given = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""Keys and values, and their scales."""


def _each(given: Given, change: Callable[[jax.Array], jax.Array]) -> Given:
    k, v, *scales = given
    k_scale, v_scale = (None if x is None else change(x) for x in scales)
    return change(k), change(v), k_scale, v_scale


def _of_layer(given: Given, layer: jax.Array | None) -> Given:
    if layer is None:
        return given
    return _each(
        given, lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    )


def _unpaged(
    given: Given,
    layer: jax.Array | None,
    table_BM: jax.Array,
    position_BT: jax.Array,
    window: int | None,
) -> Given:
    """The contiguous cache of one layer, as far as queries see it."""
    if layer is None:
        given, layer = _each(given, lambda x: x[None]), jnp.int32(0)
    index, (P, _, C) = layer, given[0].shape[1:4]
    seen_BS = pages.seen(position_BT, table_BM, P, C, window)
    return _each(given, lambda x: pages.gathered(x, index, table_BM, seen_BS))


def _check(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    given: Given,
    layer: jax.Array | None,
    table_BM: jax.Array | None,
) -> None:
    k, v, *scales = given
    assert k.ndim == (4 if layer is None else 5), (k.shape, layer)
    B, K, _, H = k.shape[-4:]
    if table_BM is not None:
        assert table_BM.ndim == 2 and table_BM.dtype == jnp.int32, table_BM
        B = table_BM.shape[0]
    assert k.shape == v.shape and k.dtype == v.dtype, (k, v)
    assert q_BTNH.shape[::3] == (B, H), (q_BTNH.shape, k.shape)
    assert q_BTNH.shape[2] % K == 0, (q_BTNH.shape, k.shape)
    assert position_BT.shape == q_BTNH.shape[:2], (position_BT.shape, q_BTNH.shape)
    is_whole = k.dtype == jnp.int8
    for scale in scales:
        assert (scale is not None) == is_whole, (k.dtype, scale)
        assert scale is None or scale.shape == k.shape[:-1], (scale.shape, k.shape)


def _fastest(q_BTNH: jax.Array, k: jax.Array) -> str:
    if current_target().platform == "tpu" and pallas_tpu.suits(q_BTNH, k):
        return "pallas_tpu"
    return "xla"
