"""Attention as its definition reads: scores, mask, softmax, weighted sum.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
H head size. The oracle for every other implementation; whole scores are materialised.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CONTEXT = "context"
"""Name under which remat policies know the output, and any log-sum-exp beside it.

Where it is saved, fused implementations do not run forward again in the backward pass;
this one must, for it needs the weights.
"""

MASKED = float(jnp.finfo(jnp.float32).min)
"""The score of a key that is not seen: finite, so that no difference of two is NaN."""

UNSEEN = MASKED / 2
"""The log-sum-exp of a row that sees no key lies below; that of any other far above."""

Segments: TypeAlias = tuple[jax.Array, jax.Array]
"""int32 document of each query [B, T] and of each key [B, S]."""


class Score(NamedTuple):
    """How scores are made, and how far back a query sees: numbers that the compiler
    knows."""

    window: int | None = None
    """A query at `p` sees the keys `s` with p - window < s <= p; None: all s <= p."""
    softcap: float | None = None
    """Scaled scores s become c * tanh(s / c), before the mask; None: they stay (Gemma
    2, arXiv 2408.00118, section 2)."""
    scale: float | None = None
    """What a product of query and key is multiplied by; None: H**-0.5."""

    def factor(self, H: int) -> float:
        """What products of heads of size H are multiplied by."""
        return H**-0.5 if self.scale is None else self.scale


PLAIN = Score()
"""Of most models: scores scaled by H**-0.5, and all earlier keys seen."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.attention`."""
    B, T, N, H = q_BTNH.shape
    if position_BT is None:
        position_BT = whole(B, T)
    segments = None if segment_BT is None else (segment_BT, segment_BT)
    q_BTKGH = _grouped(q_BTNH, k_BSKH)
    scores_BKGTS = scores(q_BTKGH, k_BSKH, position_BT, segments, score)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), CONTEXT)


def forward_part(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments | None,
    *,
    causal: bool,
    score: Score = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """Attend to a part of the keys that the queries see.

    Args:
        q_BTNH: queries, rotated; scaled here.
        k_BSKH: keys, rotated.
        v_BSKH: values.
        segments: a query sees only keys of its own; None: all are of one.
        causal: query `t` sees keys 0 to `t`, and T = S; else each sees all.
        score: without a window: a part does not know its keys' distance.

    Returns:
        The output [B, T, N, H], and the log-sum-exp of the scores, float32 [B, N, T].
        A query that sees no key has output 0 and a log-sum-exp below UNSEEN.
    """
    B, T, N, H = q_BTNH.shape
    position_BT = part_position(T, k_BSKH.shape[1], causal)
    q_BTKGH = _grouped(q_BTNH, k_BSKH)
    scores_BKGTS = scores(q_BTKGH, k_BSKH, position_BT, segments, score)
    lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
    weights_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None]).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return hide_unseen(out_BTKGH.reshape(B, T, N, H), lse_BKGT.reshape(B, N, T))


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
    """Pull a part's gradients back, given what is known of whole rows.

    Args:
        q_BTNH: queries, and k_BSKH, v_BSKH, segments, causal, score: as in
            `forward_part`.
        dout_BTNH: the cotangent of the output.
        lse_BNT: the log-sum-exp over all keys that a query sees, in whatever part.
        mean_BNT: float32 product of the whole output and its cotangent.

    Returns:
        The part's gradients of q, k and v, in float32 or the dtype of the inputs.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    q_BTKGH, position_BT = _grouped(q_BTNH, k_BSKH), part_position(T, S, causal)
    scores_BKGTS = scores(q_BTKGH, k_BSKH, position_BT, segments, score)
    lse_BKGT1 = above_masked(lse_BNT).reshape(B, K, N // K, T, 1)
    weights_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT1)
    dout_BTKGH = _grouped(dout_BTNH, k_BSKH)
    dweights_BKGTS = einsum("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH)
    dweights_BKGTS = dweights_BKGTS - mean_BNT.reshape(B, K, N // K, T, 1)
    dscores_BKGTS = weights_BKGTS * dweights_BKGTS * slope(scores_BKGTS, H, score)
    dscores_BKGTS = dscores_BKGTS.astype(q_BTNH.dtype)
    weights_BKGTS = weights_BKGTS.astype(dout_BTNH.dtype)
    return (
        einsum("BKGTS,BSKH->BTKGH", dscores_BKGTS, k_BSKH).reshape(B, T, N, H),
        einsum("BKGTS,BTKGH->BSKH", dscores_BKGTS, q_BTKGH),
        einsum("BKGTS,BTKGH->BSKH", weights_BKGTS, dout_BTKGH),
    )


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


def part_position(T: int, S: int, causal: bool) -> jax.Array:
    """int32 [1, T] positions among S keys of a part's queries: all see all if full."""
    assert not causal or T == S, (T, S)
    return whole(1, T) if causal else jnp.full((1, T), S - 1, jnp.int32)


def hide_unseen(out_BTNH: jax.Array, lse_BNT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Make the output 0 where a row sees no key."""
    seen_BTN = jnp.moveaxis(lse_BNT, 1, 2) > jnp.float32(UNSEEN)
    return jnp.where(seen_BTN[..., None], out_BTNH, 0), lse_BNT


def above_masked(lse_BNT: jax.Array) -> jax.Array:
    """A log-sum-exp against which masked scores weigh nothing in every row."""
    return jnp.where(lse_BNT > jnp.float32(UNSEEN), lse_BNT, 0)


def _grouped(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """[B, T, K, G, H]: query heads by the key/value head they share."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    return q_BTNH.reshape(B, T, K, N // K, H)


def scores(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    position_BT: jax.Array,
    segments: Segments | None,
    score: Score,
    at_S: jax.Array | None = None,
) -> jax.Array:
    """Scaled, capped and masked scores [B, K, G, T, S] in float32; a query sees the
    keys at or before its position, as many as the window lets it.

    Args:
        at_S: int32 positions of the keys; None: 0 to S - 1.
    """
    H = q_BTKGH.shape[-1]
    if at_S is None:
        at_S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    scores_BKGTS = scores_BKGTS * jnp.float32(score.factor(H))
    if score.softcap is not None:
        cap = jnp.float32(score.softcap)
        scores_BKGTS = cap * jnp.tanh(scores_BKGTS / cap)
    visible_BTS = at_S[None, None, :] <= position_BT[:, :, None]
    if score.window is not None:
        visible_BTS &= at_S[None, None, :] > position_BT[:, :, None] - score.window
    if segments is not None:
        q_segment_BT, k_segment_BS = segments
        visible_BTS &= q_segment_BT[:, :, None] == k_segment_BS[:, None, :]
    masked = jnp.float32(MASKED)
    return jnp.where(visible_BTS[:, None, None, :, :], scores_BKGTS, masked)


def slope(scores_BKGTS: jax.Array, H: int, score: Score) -> jax.Array:
    """By what scores change with the products of queries and keys; of masked scores it
    is finite, and of no account."""
    factor = jnp.float32(score.factor(H))
    if score.softcap is None:
        return factor
    # A masked score is far below the least capped one.
    tanh_BKGTS = jnp.maximum(scores_BKGTS / jnp.float32(score.softcap), -1)
    return factor * (1 - tanh_BKGTS * tanh_BKGTS)


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """A product summed in float32."""
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)
