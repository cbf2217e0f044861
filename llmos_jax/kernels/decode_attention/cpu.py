"""Turn projected rows into attention over a KV cache on one CPU device: one C++ call.

m rows (tokens of any sequences), L layers, P pages of the cache, c tokens of a page, B
slots (sequences) of M pages each, S = M c tokens of a slot, N query heads, K key/value
heads, H head size, h = H/2, C = (N + 2K) H.

`attend_rows` does all that stands between two matrix products of a layer: norms of
heads, rotation, quantization, writing the cache in place, attention (`cpu.cc`). It
runs on XLA's own threads. What comes out for a row is the same bits in any batch, in a
chunk of any size and with any number of threads. Float32 and int8 caches; no gradient,
no vmap, one device.

The source is compiled at first use (`kernels.native`).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import LowerError
from llmos_jax.kernels import native
from llmos_jax.kernels.attention.reference import PLAIN, Score

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGETS = {
    jnp.dtype(jnp.float32): "llmos_attend_rows_float",
    jnp.dtype(jnp.int8): "llmos_attend_rows_int8",
}
_UNLIMITED = np.iinfo(np.int32).max

Cache = tuple[jax.Array, ...]
"""k and v [L, P, K, c, H], float32 or int8; if int8, also their scales, float32
[L, P, K, c]."""

PAGE = 64
"""What the tokens of a page are a multiple of: keys that the kernel takes together."""


@functools.cache
def unavailable() -> str | None:
    """Compile and register the kernel if need be; return why it cannot be, or None.

    Raises:
        ConfigError: LLMOS_CPU_KERNELS is neither 0 nor 1.
    """
    return native.register(_SOURCE, tuple(_TARGETS.values()))


def attend_rows(
    qkv_mC: jax.Array,
    cos_mh: jax.Array,
    sin_mh: jax.Array,
    q_norm_H: jax.Array | None,
    k_norm_H: jax.Array | None,
    slot_m: jax.Array,
    position_m: jax.Array,
    cache: Cache,
    layer: jax.Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    score: Score = PLAIN,
    norm_eps: float = 0.0,
    rotate_keys: bool = False,
    window: jax.Array | None = None,
    table_BM: jax.Array | None = None,
    is_written: bool = False,
) -> tuple[jax.Array, Cache]:
    """Norm and rotate queries and keys, write the cache, attend to it.

    A row sees the keys of its slot from 0 to its position, and of those its window. All
    rows are written before any attends. Rows of one slot that follow each other share
    the work on its keys. A row whose slot or position lies outside the cache (padding)
    is not written, and gets zeros.

    Args:
        qkv_mC: float32 query heads, key heads, value heads of each row, not rotated.
        cos_mh: float32, of the angles of each row.
        sin_mh: float32.
        q_norm_H: float32, what normed queries are multiplied by; None: no norm.
        k_norm_H: the same of keys.
        slot_m: int32 slot of each row.
        position_m: int32 position of each row in its slot.
        cache: of all layers; donate it, for it is updated in place.
        layer: int32 scalar.
        num_heads: N.
        num_kv_heads: K.
        score: how scores are made.
        norm_eps: added to the mean squares of heads.
        rotate_keys: turn queries and keys by the Hadamard matrix, too; H is then a
            power of two.
        window: int32 scalar that takes the place of the score's, so that one program
            serves layers that differ. Large: none.
        table_BM: int32, the page of the cache that holds places i c to (i + 1) c - 1 of
            a slot. One outside of it is no page: a row whose place it would hold is
            padding. c is a multiple of PAGE. None: slot b is page b, of any length.
        is_written: the cache has these rows' keys and values, and stays as it is.

    Returns:
        float32 [m, N*H], and the cache.

    Raises:
        LowerError: the kernel cannot be used here, and why.
    """
    k = cache[0]
    target = _TARGETS.get(k.dtype)
    reason = unavailable()
    if target is None:
        reason = f"it reads float32 and int8 caches, not {k.dtype}"
    if reason is not None:
        raise LowerError(f"the CPU decode kernel cannot be used: {reason}.")
    _check(qkv_mC, cos_mh, cache, num_heads, num_kv_heads, rotate_keys)
    assert table_BM is None or k.shape[3] % PAGE == 0, k.shape
    if window is None:
        window = jnp.int32(_UNLIMITED if score.window is None else score.window)
    if table_BM is None:
        table_BM = jnp.arange(k.shape[1], dtype=jnp.int32)[:, None]
    none = jnp.zeros((0,), jnp.float32)
    operands = (
        *(qkv_mC, cos_mh, sin_mh),
        *(none if scale is None else scale for scale in (q_norm_H, k_norm_H)),
        *(slot_m, position_m, layer, window, table_BM),
    )
    H, softcap = k.shape[-1], score.softcap
    kinds = [jax.ShapeDtypeStruct((qkv_mC.shape[0], num_heads * H), jnp.float32)]
    kinds += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
    call = jax.ffi.ffi_call(
        target or "",
        kinds,
        input_output_aliases={len(operands) + i: 1 + i for i in range(len(cache))},
    )
    out_mC, *cache_list = call(
        *operands,
        *cache,
        num_heads=np.int64(num_heads),
        softcap=np.float32(np.inf if softcap is None else softcap),
        scale=np.float32(score.factor(H)),
        epsilon=np.float32(norm_eps),
        rotate_keys=rotate_keys,
        written=is_written,
    )
    return out_mC, tuple(cache_list)


def decode_attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    k_scale_BKS: jax.Array | None,
    v_scale_BKS: jax.Array | None,
    *,
    score: Score,
    table_BM: jax.Array | None = None,
) -> jax.Array:
    """See `api.decode_attention`; float32 queries, H even."""
    B, T, N, H = q_BTNH.shape
    m, K = B * T, k_BKSH.shape[1]
    q_mC = q_BTNH.reshape(m, N * H)
    given = (k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS)
    out_mC, _ = attend_rows(
        jnp.concatenate([q_mC, jnp.zeros((m, 2 * K * H), q_mC.dtype)], axis=1),
        *(jnp.ones((m, H // 2), jnp.float32), jnp.zeros((m, H // 2), jnp.float32)),
        *(None, None),
        jnp.repeat(jnp.arange(B, dtype=jnp.int32), T),
        position_BT.reshape(m).astype(jnp.int32),
        tuple(x[None] for x in given if x is not None),
        jnp.int32(0),
        num_heads=N,
        num_kv_heads=K,
        score=score,
        table_BM=table_BM,
        is_written=True,
    )
    return out_mC.reshape(B, T, N, H)


def _check(
    qkv_mC: jax.Array,
    cos_mh: jax.Array,
    cache: Cache,
    N: int,
    K: int,
    rotate_keys: bool,
) -> None:
    k, v, *scales = cache
    m, H = qkv_mC.shape[0], k.shape[-1]
    assert qkv_mC.shape == (m, (N + 2 * K) * H), (qkv_mC.shape, N, K, H)
    assert cos_mh.shape == (m, H // 2) and H % 2 == 0, (cos_mh.shape, H)
    assert k.shape[2] == K and N % K == 0, (k.shape, N, K)
    assert v.shape == k.shape and v.dtype == k.dtype, (k, v)
    assert len(scales) == (2 if k.dtype == jnp.int8 else 0), len(cache)
    assert all(scale.shape == k.shape[:-1] for scale in scales), scales
    assert not rotate_keys or H & (H - 1) == 0, H
