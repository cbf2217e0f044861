"""Causal attention on a GPU: the Triton kernel of jax.experimental.pallas, whole
sequences only.

B sequences, T tokens, N query heads, K key/value heads, H head size.

Tiling: the library's defaults. A program of the forward kernel holds 128 queries of one
head and passes over its keys in blocks of 128, up to the diagonal; one of the backward
kernel makes 32 rows of dk and dv and then 32 rows of dq, each from blocks of 32. T is
padded to a multiple of 128. The kernel knows one key/value head per query head, so
these are repeated; a group's gradients are summed outside.

Output and log-sum-exp are named CONTEXT for remat policies; with both saved the forward
kernel does not run again. A partitioner cannot split a kernel: in a program for many
devices call it under `models.per_shard`. On other platforms it runs in Pallas's
interpreter, for tests. Not run on a GPU. JAX 0.12 still has the kernel but calls it,
and Pallas's Triton backend, deprecated.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.errors import LowerError
from llmos_jax.kernels.attention.reference import CONTEXT, PLAIN, Score
from llmos_jax.kernels.target import current_target

_BLOCK = 128
"""Rows that the library's default tiles divide."""

SHORTEST = 256
"""Below, whole scores are small: a head's take at most 256 KiB."""

_ROW_BYTES = 256
"""Of a head: 128 queries and two blocks each of 128 keys and values then take 160 KiB
of shared memory, of the 163 that a program may have on an A100 and 227 on an H100
(CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0)."""

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.attention`.

    Raises:
        LowerError: a position, a window or a softcap was given, or queries and keys are
            not as many.
    """
    if score.window is not None or score.softcap is not None:
        raise LowerError(
            "The GPU kernel sees all earlier keys and caps no scores; it was given "
            f'{score}. Use implementation="blocked".'
        )
    T, N, H = q_BTNH.shape[1:]
    if position_BT is not None or k_BTKH.shape[1] != T:
        raise LowerError(
            "The GPU kernel attends whole sequences from position 0; it was given "
            f"{T} queries, {k_BTKH.shape[1]} keys and "
            f"{'no' if position_BT is None else 'their'} positions. "
            'Use implementation="blocked".'
        )
    G = N // k_BTKH.shape[2]
    # Padded keys come after every query; what padded queries see is cut off.
    k_BTNH, v_BTNH = (jnp.repeat(x, G, axis=2) for x in (k_BTKH, v_BTKH))
    ids = None if segment_BT is None else _pad(segment_BT)
    scale = score.factor(H)
    out_BTNH = _attend(_pad(q_BTNH), _pad(k_BTNH), _pad(v_BTNH), ids, scale)
    return out_BTNH[:, :T]


def suits(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    position_BT: jax.Array | None,
    score: Score = PLAIN,
) -> bool:
    """Whether this kernel is the one for these arrays on a GPU."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    return (
        position_BT is None
        and score.window is None
        and score.softcap is None
        and k_BSKH.shape[1] == T
        and T >= SHORTEST
        and H >= 16
        and H * q_BTNH.dtype.itemsize <= _ROW_BYTES
        and q_BTNH.dtype == k_BSKH.dtype
        and q_BTNH.dtype in _DTYPES
    )


def _pad(x: jax.Array) -> jax.Array:
    """Pad tokens with zeros to whole blocks."""
    missing = -x.shape[1] % _BLOCK
    return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)])


def _library() -> Any:
    # Imported late: Pallas for GPUs takes a second that other platforms need not.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as library
    return library


def _settings(scale: float) -> dict[str, Any]:
    return {
        "sm_scale": scale,
        "causal": True,
        "block_sizes": _library().BlockSizes.get_default(),
        "backward_pass_impl": "triton",
        "num_warps": None,
        "num_stages": 2,
        "grid": None,
        "interpret": current_target().platform != "gpu",
        "debug": False,
        "return_residuals": False,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    segment_BT: jax.Array | None,
    scale: float,
) -> jax.Array:
    return _forward(q_BTNH, k_BTNH, v_BTNH, segment_BT, scale)[0]


def _forward(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    segment_BT: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Return the output, and what the library's backward pass reads."""
    operands = (q_BTNH, k_BTNH, v_BTNH, segment_BT)
    _, (*_, out, lse) = _library()._mha_forward(*operands, **_settings(scale))
    out_BTNH, lse_BNT = (checkpoint_name(x, CONTEXT) for x in (out, lse))
    return out_BTNH, (*operands, out_BTNH, lse_BNT)


def _backward(scale: float, saved: tuple[Any, ...], dout_BTNH: jax.Array) -> Any:
    return _library()._mha_backward(*_settings(scale).values(), saved, dout_BTNH)


_attend.defvjp(_forward, _backward)
