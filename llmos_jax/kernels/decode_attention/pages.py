"""Where tokens stand in a cache of pages, and the cache of some sequences out of it.

L layers, B sequences, T query tokens, P pages of C places, M pages of a sequence at
most, S = M * C places of a sequence, K key/value heads, H head size.

A table says which page holds which places: place s of sequence b is place s % C of page
table[b, s // C]. An entry outside [0, P) stands for no page. Sequences may share pages
that nobody writes any more.

A page holds what its last owner left, and that may be no number. What no query of a
sequence sees therefore counts as zero: a weight of nothing would not hide it, since
nothing times NaN is NaN. Queries that have no page are padding, and do not count. Of
int8 only the scales can be NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def span(
    position_BT: jax.Array, S: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The first and the last place, int32 [B], that a sequence's queries see.

    Queries whose position lies outside [0, S) do not count; where none is left, the
    last place is -1.
    """
    is_inside_BT = (position_BT >= 0) & (position_BT < S)
    last_B = jnp.max(jnp.where(is_inside_BT, position_BT, -1), axis=1)
    if window is None:
        return jnp.zeros_like(last_B), last_B
    least_B = jnp.min(jnp.where(is_inside_BT, position_BT, S - 1), axis=1)
    return jnp.maximum(least_B - window + 1, 0), last_B


def is_there(table_BM: jax.Array, P: int) -> jax.Array:
    """Which entries stand for a page."""
    return (table_BM >= 0) & (table_BM < P)


def places(
    position_BT: jax.Array, table_BM: jax.Array, P: int, C: int
) -> tuple[jax.Array, jax.Array]:
    """The page of each position, and the place in it; page P where there is none."""
    S = table_BM.shape[1] * C
    place_BT = jnp.clip(position_BT, 0, S - 1)
    page_BT = jnp.take_along_axis(table_BM, place_BT // C, axis=1)
    has_place_BT = (place_BT == position_BT) & is_there(page_BT, P)
    return jnp.where(has_place_BT, page_BT, P), place_BT % C


def placed(position_BT: jax.Array, table_BM: jax.Array, P: int, C: int) -> jax.Array:
    """Positions; -1 for those that have no page."""
    page_BT, _ = places(position_BT, table_BM, P, C)
    return jnp.where(page_BT < P, position_BT, -1)


def seen(
    position_BT: jax.Array, table_BM: jax.Array, P: int, C: int, window: int | None
) -> jax.Array:
    """bool [B, S]: the places that have a page and that some query sees."""
    S = table_BM.shape[1] * C
    first_B, last_B = span(placed(position_BT, table_BM, P, C), S, window)
    at_S = jnp.arange(S, dtype=jnp.int32)[None, :]
    is_near_BS = (at_S >= first_B[:, None]) & (at_S <= last_B[:, None])
    return is_near_BS & jnp.repeat(is_there(table_BM, P), C, axis=1)


def gathered(
    x: jax.Array, layer: jax.Array, table_BM: jax.Array, seen_BS: jax.Array
) -> jax.Array:
    """One layer of [L, P, K, C, ...] as [B, K, S, ...], with zeros for what is unseen.

    Integers come as they are.
    """
    P, K, C = x.shape[1:4]
    B, M = table_BM.shape
    page_BM = jnp.clip(table_BM, 0, P - 1)
    taken_BMKC = x.at[layer, page_BM].get(mode="promise_in_bounds")
    taken_BKS = taken_BMKC.swapaxes(1, 2).reshape(B, K, M * C, *x.shape[4:])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return taken_BKS
    is_seen = seen_BS.reshape(B, 1, M * C, *(1 for _ in x.shape[4:]))
    return jnp.where(is_seen, taken_BKS, jnp.zeros((), x.dtype))
