"""Causal attention on a TPU: the splash kernel of jax.experimental.pallas, whole
sequences only.

B sequences, T tokens, N query heads, K key/value heads, G = N/K, H head size.

Tiling: a grid step holds one head's `block` queries and `block` keys; `_block` picks
1024, or less where padding T to it would cost more than 1/16 or VMEM is short. A query
head reads the key/value head it shares (head n of q, head n // G of k), so nothing is
repeated. Blocks above the diagonal are neither read nor computed.

VMEM, of the 16 MiB a kernel may take on v4, v5e and v5p: 1024 x 1024 float32 scores are
4 MiB, their exponentials 4 MiB; q, k, v, out (and dq, dk, dv) of 1024 x 128 bfloat16
are 256 KiB each, twice; float32 sums 512 KiB each. 2048 does not fit, nor do 1024
heads' rows of more than 512 bytes (H = 256, float32: v4 and v5p).

Backward: one kernel for dq and one for dk and dv, each making the scores again from the
log-sum-exp. The library's fused kernel saves 2 of 7 products and writes T / block
partial dq; not used, for its memory. Output and log-sum-exp are named CONTEXT for remat
policies; with both saved the forward kernel does not run again.

A partitioner cannot split a kernel: in a program for many devices call it under
`models.per_shard`. On other platforms it runs in Pallas's interpreter, for tests.
No block size here was timed on a TPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmos_jax.errors import LowerError
from llmos_jax.kernels.attention.reference import CONTEXT, rotate
from llmos_jax.kernels.target import current_target

_BLOCKS = (1024, 512, 256, 128)
"""Rows of a tile, best first; the kernel takes keys in multiples of 128."""

_BLOCK_BYTES = 1024 * 512
"""What one tile of q, k or v may take: 1024 rows of 256 bfloat16."""

SHORTEST = 256
"""Below, whole scores are small: a head's take at most 256 KiB."""


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    """See `api.attention`.

    Raises:
        LowerError: a position was given, or queries and keys are not as many.
    """
    scale = jnp.float32(q_BTNH.shape[-1] ** -0.5)
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    return _attend(scaled_BTNH, k_BTKH, v_BTKH, position_BT)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """See `api.rotary_attention`.

    Raises:
        LowerError: a position was given.
    """
    # Scaled in float32 while it is rotated: a bfloat16 query is rounded once.
    scale = jnp.float32(q_BTNH.shape[-1] ** -0.5)
    cos, sin = angles
    q_BTNH = rotate(q_BTNH, (cos * scale, sin * scale))
    return _attend(q_BTNH, rotate(k_BTKH, angles), v_BTKH, position_BT)


def suits(q_BTNH: jax.Array, k_BSKH: jax.Array, position_BT: jax.Array | None) -> bool:
    """Whether this kernel is the one for these arrays on a TPU."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    return (
        position_BT is None
        and k_BSKH.shape[1] == T
        and T >= SHORTEST
        and H % 16 == 0
        and 32 <= H <= 256
        and q_BTNH.dtype == k_BSKH.dtype
    )


def _attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    T = q_BTNH.shape[1]
    if position_BT is not None or k_BTKH.shape[1] != T:
        raise LowerError(
            "The splash kernel attends whole sequences from position 0; it was given "
            f"{T} queries, {k_BTKH.shape[1]} keys and "
            f"{'no' if position_BT is None else 'their'} positions. "
            'Use implementation="blocked".'
        )
    block = _block(T, q_BTNH.shape[3] * q_BTNH.dtype.itemsize)
    padding = [(0, 0), (0, 0), (0, -T % block), (0, 0)]
    # Padded keys come after every query; what padded queries see is cut off.
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(jnp.moveaxis(x, 1, 2), padding) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    out_BNTH = jax.vmap(_kernel(q_BNTH.shape[2], block))(q_BNTH, k_BKTH, v_BKTH)
    return jnp.moveaxis(out_BNTH[:, :, :T], 2, 1)


def _block(T: int, row_bytes: int) -> int:
    """The largest block that pads T by at most 1/16 and fits VMEM; else the least."""
    for block in _BLOCKS:
        if -T % block <= T // 16 and block * row_bytes <= _BLOCK_BYTES:
            return block
    return _BLOCKS[-1]


def _kernel(T: int, block: int) -> Any:
    """(q [N, T, H], k [K, T, H], v [K, T, H]) -> [N, T, H]."""
    # Imported here: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    def sizes(block: int) -> Any:
        return kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        )

    # The library looks at every element of the mask (88 s for T = 131072). Which blocks
    # are full, mixed or empty is the same for blocks of 2, and so it asks only those.
    small = 2 * T // block
    made = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((small, small))]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes(2),
        residual_checkpoint_name=CONTEXT,
        interpret=current_target().platform != "tpu",
    )
    rows = jnp.arange(T, dtype=jnp.int32)
    kernel: Any = kernels.SplashAttentionKernel(
        made.fwd_mask_info._replace(q_sequence=rows),
        made.dq_mask_info._replace(q_sequence=rows),
        made.dkv_mask_info._replace(q_sequence=rows),
        **{**made.kwargs, "block_sizes": sizes(block)},
    )
    return kernel
