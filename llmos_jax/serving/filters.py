"""Say how far below the most likely token a token may lie and still be drawn.

B sequences, V vocabulary, C candidates.

The depth of a token is how far its logit lies below the best one: weights exp(-depth)
are then its probability but for a factor, and top-k, top-p and min-p all become one
number per row, the depth of the last token that stays. All three say the same kind of
thing: a token stays if the tokens above it weigh less than some target (top-k counts
them, top-p adds up their probabilities: nucleus sampling, arXiv 1904.09751; min-p,
arXiv 2407.01082, has its depth written down). Tokens of equal logits stay together.

Nearly always the answer is among the C most likely tokens. A row in which it is not
(top_k > C, or a flat distribution) is searched as a whole: depths are not negative, so
they are ordered as the bits of their floats are, and 31 steps find a number of 31 bits.
The search reads all of V at each step, so it is done only for rows that need it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CANDIDATES = 128
"""C: more than top_k usually is; lax.top_k takes longer for more."""


class Keep(NamedTuple):
    """Which tokens stay, per row; all of them with (0, 1, 0)."""

    top_k_B: jax.Array
    """int32."""
    top_p_B: jax.Array
    """float32."""
    min_p_B: jax.Array
    """float32."""


def deepest_kept(depth_BV: jax.Array, keep: Keep) -> jax.Array:
    """Return float32 [B]: tokens at most this deep may be drawn.

    Args:
        depth_BV: float32, >= 0, and 0 for the best token.
        keep: top-k applies first, then top-p to what stays, then min-p.
    """
    C = min(CANDIDATES, depth_BV.shape[1])
    near_BC = -jax.lax.top_k(-depth_BV, C)[0]
    top_k_B, top_p_B, min_p_B = keep

    has_k_B = top_k_B > 0
    kth_B = _at(near_BC, jnp.clip(top_k_B, 1, C) - 1)
    kth_B = jnp.where(has_k_B, kth_B, jnp.inf)
    target_B = top_p_B * _mass(depth_BV, kth_B)

    cumulated_BC = jnp.cumsum(jnp.exp(-near_BC), axis=1)
    reached_BC = cumulated_BC >= target_B[:, None]
    pth_B = _at(near_BC, jnp.argmax(reached_BC, axis=1))
    # Rounding may leave the sum of all k tokens short of top_p of them: all stay.
    pth_B = jnp.where((top_p_B < 1) & reached_BC[:, -1], pth_B, jnp.inf)

    is_far_B = jnp.where(has_k_B, top_k_B > C, (top_p_B < 1) & ~reached_BC[:, -1])
    is_far_B &= C < depth_BV.shape[1]
    deepest_B = _searched_where(is_far_B, depth_BV, keep, jnp.minimum(kth_B, pth_B))
    return jnp.minimum(deepest_B, -jnp.log(min_p_B))


def _at(x_BC: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BC, index_B[:, None], axis=1)[:, 0]


def _mass(depth_BV: jax.Array, deepest_B: jax.Array) -> jax.Array:
    """What the tokens of at most this depth weigh together."""
    weight_BV = jnp.exp(-depth_BV)
    return jnp.where(depth_BV <= deepest_B[:, None], weight_BV, 0.0).sum(axis=1)


def _searched_where(
    is_far_B: jax.Array, depth_BV: jax.Array, keep: Keep, deepest_B: jax.Array
) -> jax.Array:
    """`deepest_B`, but for far rows, one after another, what a whole search finds."""
    far_B = jnp.nonzero(is_far_B, size=len(is_far_B), fill_value=0)[0]

    def search_next(step: jax.Array, deepest_B: jax.Array) -> jax.Array:
        row = far_B[step]
        found = _searched(depth_BV[row], keep.top_k_B[row], keep.top_p_B[row])
        return deepest_B.at[row].set(found)

    count = is_far_B.sum(dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, search_next, deepest_B)


def _searched(depth_V: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The depth of the last token of one row that top-k and then top-p keep."""
    ones_V = jnp.ones_like(depth_V)
    kth = jnp.where(
        top_k > 0, _last_kept(depth_V, ones_V, top_k.astype(jnp.float32)), jnp.inf
    )
    weight_V = jnp.where(depth_V <= kth, jnp.exp(-depth_V), 0.0)
    pth = _last_kept(depth_V, weight_V, top_p * weight_V.sum())
    return jnp.minimum(kth, jnp.where(top_p < 1, pth, jnp.inf))


def _last_kept(depth_V: jax.Array, weight_V: jax.Array, target: jax.Array) -> jax.Array:
    """The largest depth such that the tokens above weigh less than `target`."""
    bits_V = jax.lax.bitcast_convert_type(depth_V, jnp.int32)

    def decided(step: jax.Array, prefix: jax.Array) -> jax.Array:
        wider = prefix | (jnp.int32(1) << (30 - step))
        above = jnp.where(bits_V < wider, weight_V, 0.0).sum()
        return jnp.where(above < target, wider, prefix)

    found = jax.lax.fori_loop(0, 31, decided, jnp.int32(0))
    # All stay: the largest pattern is a NaN, and nothing is deeper than infinity.
    depth = jax.lax.bitcast_convert_type(found, jnp.float32)
    return jnp.where(jnp.isnan(depth), jnp.inf, depth)
