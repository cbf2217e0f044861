"""Attention on one CPU device, fused: one call forward, one backward, in C++.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads,
H head size.

XLA:CPU writes scores and weights to memory and copies them between layouts; `cpu.cc`
keeps them in cache and rotates queries and keys while it packs them. It runs on XLA's
own threads (a custom call through `jax.ffi`) and gives the same bits with any number
of them. Float32 only, any score, no segments, no vmap. The partitioner cannot see
inside a custom call and would gather its inputs, so `api` picks it only where there is
one device.

The source is compiled at first use (`kernels.native`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.errors import LowerError
from llmos_jax.kernels import native
from llmos_jax.kernels.attention.reference import CONTEXT, PLAIN, Score, whole
from llmos_jax.kernels.target import Target, current_target

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGETS = ("llmos_attention_forward", "llmos_attention_backward")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.attention`.

    Raises:
        LowerError: the kernel cannot be used here, and why.
    """
    _refuse(segment_BT)
    B, T = q_BTNH.shape[:2]
    if position_BT is None:
        position_BT = whole(B, T)
    no_angles = jnp.zeros((B, T, 0), jnp.float32)
    return _call(q_BTNH, k_BSKH, v_BSKH, position_BT, no_angles, no_angles, score)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.rotary_attention`.

    Raises:
        LowerError: the kernel cannot be used here, and why.
    """
    _refuse(segment_BT)
    if position_BT is None:
        position_BT = whole(*q_BTNH.shape[:2])
    return _call(q_BTNH, k_BTKH, v_BTKH, position_BT, *angles, score)


def suits(*arrays: jax.Array) -> bool:
    """Whether this kernel, if it can be built, is the one for these arrays.

    It is compiled for the CPU that is here, so that must be the target, too.
    """
    return (
        all(x.dtype == jnp.float32 for x in arrays)
        and current_target() == Target("cpu", 1)
        and jax.default_backend() == "cpu"
    )


@functools.cache
def unavailable() -> str | None:
    """Compile and register the kernel if need be; return why it cannot be, or None.

    Raises:
        ConfigError: LLMOS_CPU_KERNELS is neither 0 nor 1.
    """
    return native.register(_SOURCE, _TARGETS)


def _refuse(segment_BT: jax.Array | None) -> None:
    if segment_BT is not None:
        raise LowerError(
            "The CPU attention kernel knows no documents (segments). Use "
            'implementation="blocked".'
        )


Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    score: Score,
) -> jax.Array:
    return _forward(q, k, v, position, cos, sin, score)[0]


def _attributes(score: Score, H: int) -> dict[str, np.number[Any]]:
    """The score as numbers for C++: what is not wanted is too large to matter."""
    window, softcap, _ = score
    return {
        "window": np.int64(np.iinfo(np.int32).max if window is None else window),
        "softcap": np.float32(np.inf if softcap is None else softcap),
        "scale": np.float32(score.factor(H)),
    }


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    score: Score,
) -> tuple[jax.Array, Arrays]:
    reason = unavailable()
    if reason is not None:
        raise LowerError(f"the CPU attention kernel cannot be used: {reason}.")
    B, T, N, H = q.shape
    inputs = (q, k, v, position, cos, sin)
    kinds = (_like(q), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    out, statistics = (
        checkpoint_name(x, CONTEXT)
        for x in jax.ffi.ffi_call(_TARGETS[0], kinds)(*inputs, **_attributes(score, H))
    )
    return out, (*inputs, out, statistics)


def _backward(
    score: Score, saved: Arrays, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    kinds = tuple(_like(x) for x in saved[:3])
    attributes = _attributes(score, dout.shape[-1])
    dq, dk, dv = jax.ffi.ffi_call(_TARGETS[1], kinds)(*saved, dout, **attributes)
    return dq, dk, dv, None, None, None


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


_call.defvjp(_forward, _backward)
