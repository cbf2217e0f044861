"""Causal attention on a TPU: the splash kernel of jax.experimental.pallas, whole
sequences only.

B sequences, T tokens, N query heads, K key/value heads, G = N/K, H head size.

Tiling: a grid step holds one head's `block` queries and `block` keys; `_block` picks
1024, or less where padding T to it would cost more than 1/16 or VMEM is short. A query
head reads the key/value head it shares (head n of q, head n // G of k), so nothing is
repeated. Blocks above the diagonal, or wholly before the window, are neither read nor
computed.

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

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llmos_jax.errors import LowerError
from llmos_jax.kernels.attention.reference import (
    CONTEXT,
    PLAIN,
    Score,
    Segments,
    above_masked,
    hide_unseen,
    rotate,
)
from llmos_jax.kernels.target import current_target

_BLOCKS = (1024, 512, 256, 128)
"""Rows of a tile, best first; the kernel takes keys in multiples of 128."""

_BLOCK_BYTES = 1024 * 512
"""What one tile of q, k or v may take: 1024 rows of 256 bfloat16."""

_PADDING = -(2**31)
"""The segment of padding: no document's."""

Pair: TypeAlias = tuple[jax.Array, jax.Array]

_KEPT = ("attn_logits_soft_cap", "is_mqa", "mask_function", "mask_value", "interpret")
"""Settings of a made kernel that its parts, called alone, take too."""

SHORTEST = 256
"""Below, whole scores are small: a head's take at most 256 KiB."""


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
        LowerError: a position was given, or queries and keys are not as many.
    """
    q_BTNH = _scaled(q_BTNH, score)
    return _attend(q_BTNH, k_BTKH, v_BTKH, position_BT, segment_BT, score)


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
        LowerError: a position was given.
    """
    # Scaled in float32 while it is rotated: a bfloat16 query is rounded once.
    scale = jnp.float32(score.factor(q_BTNH.shape[-1]))
    cos, sin = angles
    q_BTNH = rotate(q_BTNH, (cos * scale, sin * scale))
    k_BTKH = rotate(k_BTKH, angles)
    return _attend(q_BTNH, k_BTKH, v_BTKH, position_BT, segment_BT, score)


def forward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
    score: Score = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward_part`."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    block, kernel = _part_kernel(q_BTNH, S, causal, score)
    ids = _segment_ids(segments, q_BTNH.shape[0], T, S, block, causal)
    names = ("block_sizes", *_KEPT)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> Pair:
        out, (lse,) = _kernels()._splash_attention_forward(
            *(kernel.fwd_mask_info, q, k, v, ids, None),
            residual_checkpoint_name=None,
            save_residuals=True,
            **{name: kernel.kwargs[name] for name in names},
        )
        return out, lse

    q, k, v = (_heads_first(x, block) for x in (_scaled(q_BTNH, score), k_BSKH, v_BSKH))
    out_BNTH, lse_BNT = jax.vmap(one)(q, k, v, ids)
    return hide_unseen(_tokens_first(out_BNTH, T), lse_BNT[..., :T])


def backward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    dout_BTNH: jax.Array,
    lse_BNT: jax.Array,
    mean_BNT: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
    score: Score = PLAIN,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.backward_part`."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    block, kernel = _part_kernel(q_BTNH, S, causal, score)
    ids = _segment_ids(segments, q_BTNH.shape[0], T, S, block, causal)
    head_minor = kernel.kwargs["block_sizes"].q_layout
    common = {
        **{name: kernel.kwargs[name] for name in _KEPT},
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), head_minor),
        "bq": block,
        "bkv": block,
    }

    def one(
        q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, *rows: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dout, lse, mean = rows
        operands = (q, k, v, ids, None, lse, dout, mean)
        dq = _kernels()._splash_attention_bwd_dq(
            *operands, mask_info=kernel.dq_mask_info, **common
        )
        _, dk, dv = _kernels()._splash_attention_bwd_dkv(
            *operands,
            mask_info=kernel.dkv_mask_info,
            bkv_compute=block,
            use_fused_bwd_kernel=False,
            **common,
        )
        return dq, dk, dv

    q, k, v = (_heads_first(x, block) for x in (_scaled(q_BTNH, score), k_BSKH, v_BSKH))
    missing = [(0, 0), (0, 0), (0, -T % block)]
    lse_BNT, mean_BNT = (jnp.pad(x, missing) for x in (above_masked(lse_BNT), mean_BNT))
    dout_BNTH = _heads_first(dout_BTNH, block)
    dq, dk, dv = jax.vmap(one)(q, k, v, ids, dout_BNTH, lse_BNT, mean_BNT)
    # The kernel knows the scaled queries only.
    dq_BTNH = _scaled(_tokens_first(dq, T), score)
    return dq_BTNH, _tokens_first(dk, S), _tokens_first(dv, S)


def suits(q_BTNH: jax.Array, k_BSKH: jax.Array, position_BT: jax.Array | None) -> bool:
    """Whether this kernel is the one for these arrays on a TPU."""
    T = q_BTNH.shape[1]
    return (
        position_BT is None
        and k_BSKH.shape[1] == T
        and T >= SHORTEST
        and takes(q_BTNH, k_BSKH)
    )


def takes(q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether this kernel is made for heads like these."""
    H = q_BTNH.shape[3]
    return H % 16 == 0 and 32 <= H <= 256 and q_BTNH.dtype == k_BSKH.dtype


def _attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None,
    score: Score,
) -> jax.Array:
    """Attend; queries come scaled."""
    B, T, _, H = q_BTNH.shape
    if position_BT is not None or k_BTKH.shape[1] != T:
        raise LowerError(
            "The splash kernel attends whole sequences from position 0; it was given "
            f"{T} queries, {k_BTKH.shape[1]} keys and "
            f"{'no' if position_BT is None else 'their'} positions. "
            'Use implementation="blocked".'
        )
    block = _block(T, H * q_BTNH.dtype.itemsize)
    segments = None if segment_BT is None else (segment_BT, segment_BT)
    ids = _segment_ids(segments, B, T, T, block, causal=True)
    # Padded keys come after every query; what padded queries see is cut off.
    operands = [_heads_first(x, block) for x in (q_BTNH, k_BTKH, v_BTKH)]
    kernel = _kernel(T + -T % block, block, score)
    return _tokens_first(jax.vmap(kernel)(*operands, ids), T)


def _scaled(q_BTNH: jax.Array, score: Score) -> jax.Array:
    scale = jnp.float32(score.factor(q_BTNH.shape[-1]))
    return (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)


def _heads_first(x_BTNH: jax.Array, block: int) -> jax.Array:
    """[B, N, T, H], with T padded to whole blocks."""
    padding = [(0, 0), (0, 0), (0, -x_BTNH.shape[1] % block), (0, 0)]
    return jnp.pad(jnp.moveaxis(x_BTNH, 1, 2), padding)


def _tokens_first(x_BNTH: jax.Array, T: int) -> jax.Array:
    """[B, T, N, H], without padding."""
    return jnp.moveaxis(x_BNTH[:, :, :T], 2, 1)


def _segment_ids(
    segments: Segments | None, B: int, T: int, S: int, block: int, causal: bool
) -> Any:
    """The library's segments, padded; where nothing else hides padded keys, too."""
    if segments is None:
        if causal or S % block == 0:
            return None
        segments = (jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32))
    q, kv = (
        jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)], constant_values=_PADDING)
        for x in segments
    )
    return _kernels().SegmentIds(q=q, kv=kv)


def _block(T: int, row_bytes: int) -> int:
    """The largest block that pads T by at most 1/16 and fits VMEM; else the least."""
    for block in _BLOCKS:
        if -T % block <= T // 16 and block * row_bytes <= _BLOCK_BYTES:
            return block
    return _BLOCKS[-1]


def _part_kernel(
    q_BTNH: jax.Array, S: int, causal: bool, score: Score
) -> tuple[int, Any]:
    """The block for T queries and S keys, and a kernel for the mask."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    block = _block(min(T, S), H * q_BTNH.dtype.itemsize)
    kernel = _kernel(T + -T % block, block, score)
    if causal:
        return block, kernel
    # Without a word about them all blocks are computed and none is masked.
    everything = kernel.fwd_mask_info._replace(
        data_next=None, mask_next=None, block_mask=None, q_sequence=None
    )
    full = type(kernel)(
        *(everything, everything, everything),
        **{**kernel.kwargs, "mask_function": None},
    )
    return block, full


def _kernels() -> Any:
    # Imported late: Pallas for TPUs takes a second that other platforms need not.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
    )

    return splash_attention_kernel


def _masks(T: int, block: int, window: int | None) -> tuple[Any, Any]:
    """The mask, and a smaller one with the same blocks if it is cut in blocks of 3.

    The library looks at every element of a mask to know which blocks are empty and
    which are full (88 s for T = 131072), so it is shown the smaller one; inside the
    kernels a mask is made by its function. Blocks of 3 are the least that tell apart
    windows that end with a block from those that end in one.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    small = 3 * T // block
    if window is None:
        return masks.CausalMask((T, T)), masks.CausalMask((small, small))
    small_window = 3 * (window // block) + min(window % block, 2)
    return (
        masks.LocalMask((T, T), (window - 1, 0), 0),
        masks.LocalMask((small, small), (small_window - 1, 0), 0),
    )


def _kernel(T: int, block: int, score: Score = PLAIN) -> Any:
    """(q [N, T, H], k [K, T, H], v [K, T, H], segments) -> [N, T, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    kernels = _kernels()

    def sizes(block: int) -> Any:
        return kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        )

    mask, small_mask = _masks(T, block, score.window)
    made = kernels.make_splash_mha(
        masks.MultiHeadMask([small_mask]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes(3),
        attn_logits_soft_cap=score.softcap,
        residual_checkpoint_name=CONTEXT,
        interpret=current_target().platform != "tpu",
    )
    rows = jnp.asarray(mask.q_sequence)
    kernel: Any = kernels.SplashAttentionKernel(
        made.fwd_mask_info._replace(q_sequence=rows),
        made.dq_mask_info._replace(q_sequence=rows),
        made.dkv_mask_info._replace(q_sequence=rows),
        **{
            **made.kwargs,
            "block_sizes": sizes(block),
            "mask_function": mask.mask_function,
        },
    )
    return kernel
