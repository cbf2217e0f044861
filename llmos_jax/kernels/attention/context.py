"""Causal attention of sequences that a mesh axis splits: each device holds some tokens.

B sequences, T query tokens, S key tokens of one device, N query heads, K key/value
heads, H head size. C devices hold a sequence, so it has C * T tokens.

Zig-zag (Llama 3, arXiv 2407.21783, section 3.3.2): a sequence is cut into 2C chunks,
and device i holds chunks i and 2C-1-i. So its tokens' positions increase, its queries
see as many keys as any other device's, and what they see of a device j is

| j | queries | keys |
|---|---|---|
| j = i | all | those before them: causal |
| j < i | all | the first half, all of them |
| j > i | the second half | all |

so every visit costs the same, too. Visits are merged by their log-sum-exp (ring
attention, arXiv 2310.01889). How keys and values travel (ir/plan.py, EXCHANGES):

- ring: C - 1 times to the next device, while the present ones are attended to; in the
  backward pass the gradients of keys and values, float32, follow theirs and go home.
- gather: all at once, kept for the pass; gradients are scattered once. Needs memory for
  whole sequences and fewer, larger messages.

What is attended to in one visit is a part, and an implementation of parts has two
functions, defined by `reference.forward_part` and `reference.backward_part`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.errors import LowerError
from llmos_jax.kernels.attention import blocked, reference, splash
from llmos_jax.kernels.attention.reference import CONTEXT, PLAIN, Score, Segments
from llmos_jax.kernels.target import current_target

PARTS: dict[str, ModuleType] = {
    "splash": splash,
    "blocked": blocked,
    "reference": reference,
}

Pair: TypeAlias = tuple[jax.Array, jax.Array]
Keys: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]
"""Keys, values and segments of one device."""
Saved: TypeAlias = tuple[jax.Array, Keys, jax.Array, jax.Array]
"""Queries, keys, output and log-sum-exp of this device."""


class Way(NamedTuple):
    """What the tracer knows of a call."""

    mesh_axes: tuple[str, ...]
    exchange: str
    implementation: str
    score: Score


def device_order(T: int, C: int) -> np.ndarray:
    """Return the position, int32 [T], of each token of a sequence split over C devices,
    device after device."""
    assert T % (2 * C) == 0, f"{T} tokens cannot be cut into 2 x {C} equal chunks"
    chunks = np.arange(T, dtype=np.int32).reshape(2 * C, -1)
    return np.stack([chunks[:C], chunks[: C - 1 : -1]], axis=1).reshape(T)


def context_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    mesh_axes: tuple[str, ...],
    *,
    exchange: str,
    score: Score = PLAIN,
    implementation: str | None = None,
) -> jax.Array:
    """Attend each of this device's queries to the keys of its document at or before its
    position, wherever they are. Call it inside a shard_map.

    The output and the log-sum-exp are named CONTEXT for remat policies; with both saved
    nothing travels for the forward pass again.

    Args:
        q_BTNH: this device's queries, rotated; scaled here. Tokens are in
            `device_order`.
        k_BTKH: keys of the same tokens, rotated. N must be a multiple of K.
        v_BTKH: values of the same tokens.
        segment_BT: int32 document of each of them, or None, as in `api.attention`.
        mesh_axes: those that split a sequence, major first.
        exchange: a name in EXCHANGES.
        score: how scores are made.
        implementation: a name in PARTS; None picks the fastest for the target.

    Returns:
        [B, T, N, H] in the dtype of `v_BTKH`.

    Raises:
        LowerError: the score has a window.
    """
    if score.window is not None:
        raise LowerError(
            "Attention over sequences that devices share sees all earlier keys; this "
            f"model's sees a window of {score.window}. Set plan.mesh.context=1."
        )
    T = q_BTNH.shape[1]
    assert T % 2 == 0, f"a device holds two chunks, which {T} tokens cannot make"
    assert k_BTKH.shape == v_BTKH.shape, (k_BTKH.shape, v_BTKH.shape)
    assert k_BTKH.shape[1] == T, (q_BTNH.shape, k_BTKH.shape)
    assert exchange in _EXCHANGES, exchange
    name = implementation or _fastest(q_BTNH, k_BTKH)
    way = Way(mesh_axes, exchange, name, score)
    return _attend(q_BTNH, (k_BTKH, v_BTKH, segment_BT), way)


def _fastest(q_BTNH: jax.Array, k_BTKH: jax.Array) -> str:
    half = q_BTNH.shape[1] // 2
    if current_target().platform == "tpu" and half >= splash.SHORTEST:
        if splash.takes(q_BTNH, k_BTKH):
            return "splash"
    return "blocked" if blocked.suits(half) else "reference"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(q_BTNH: jax.Array, here: Keys, way: Way) -> jax.Array:
    return _forward(q_BTNH, here, way)[0]


def _forward(q_BTNH: jax.Array, here: Keys, way: Way) -> tuple[jax.Array, Saved]:
    """Return the output, and what the backward pass reads."""
    index, half = jax.lax.axis_index(way.mesh_axes), q_BTNH.shape[1] // 2
    forward_part = PARTS[way.implementation].forward_part
    attend = functools.partial(forward_part, score=way.score)

    def first_keys(sums: Pair, there: Keys) -> Pair:
        k, v, segments = _meeting(here, there, keys=slice(half))
        return _merged(sums, attend(q_BTNH, k, v, segments, causal=False))

    def last_queries(sums: Pair, there: Keys) -> Pair:
        k, v, segments = _meeting(here, there, queries=slice(half, None))
        out, lse = sums[0][:, half:], sums[1][..., half:]
        part = attend(q_BTNH[:, half:], k, v, segments, causal=False)
        out, lse = _merged((out, lse), part)
        return (
            jnp.concatenate([sums[0][:, :half], out], axis=1),
            jnp.concatenate([sums[1][..., :half], lse], axis=2),
        )

    def visit(sums: Pair, there: Keys, source: jax.Array) -> tuple[Pair, tuple[()]]:
        sums = jax.lax.cond(source < index, first_keys, last_queries, sums, there)
        return sums, ()

    k, v, segments = _meeting(here, here)
    out_BTNH, lse_BNT = attend(q_BTNH, k, v, segments, causal=True)
    sums = out_BTNH.astype(jnp.float32), lse_BNT
    sums, _ = _EXCHANGES[way.exchange](way.mesh_axes, visit, sums, here, ())
    out_BTNH = checkpoint_name(sums[0].astype(v.dtype), CONTEXT)
    lse_BNT = checkpoint_name(sums[1], CONTEXT)
    return out_BTNH, (q_BTNH, here, out_BTNH, lse_BNT)


def _backward(
    way: Way, saved: Saved, dout_BTNH: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, None]]:
    q_BTNH, here, out_BTNH, lse_BNT = saved
    index, half = jax.lax.axis_index(way.mesh_axes), q_BTNH.shape[1] // 2
    mean_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )

    def pull(there: Keys, queries: slice, keys: slice, causal: bool) -> Any:
        k, v, segments = _meeting(here, there, queries, keys)
        parts = PARTS[way.implementation].backward_part(
            *(q_BTNH[:, queries], k, v, dout_BTNH[:, queries]),
            *(lse_BNT[..., queries], mean_BNT[..., queries], segments),
            causal=causal,
            score=way.score,
        )
        dq, dk, dv = (x.astype(jnp.float32) for x in parts)
        return dq, (dk, dv)

    def first_keys(there: Keys) -> tuple[jax.Array, Pair]:
        dq, (dk, dv) = pull(there, slice(None), slice(half), False)
        return dq, (_beside_zeros(dk, last=False), _beside_zeros(dv, last=False))

    def last_queries(there: Keys) -> tuple[jax.Array, Pair]:
        dq, gradients = pull(there, slice(half, None), slice(None), False)
        return _beside_zeros(dq, last=True), gradients

    def visit(
        dq_BTNH: jax.Array, there: Keys, source: jax.Array
    ) -> tuple[jax.Array, Pair]:
        part, gradients = jax.lax.cond(source < index, first_keys, last_queries, there)
        return dq_BTNH + part, gradients

    dq, gradients = pull(here, slice(None), slice(None), True)
    exchange = _EXCHANGES[way.exchange]
    dq, (dk, dv) = exchange(way.mesh_axes, visit, dq, here, gradients)
    k, v, _ = here
    return dq.astype(q_BTNH.dtype), (dk.astype(k.dtype), dv.astype(v.dtype), None)


_attend.defvjp(_forward, _backward)


def _meeting(
    here: Keys, there: Keys, queries: slice = slice(None), keys: slice = slice(None)
) -> tuple[jax.Array, jax.Array, Segments | None]:
    """Some keys from there, and the segments of some queries from here and of these."""
    k, v, k_segment_BS = there
    if here[2] is None or k_segment_BS is None:
        return k[:, keys], v[:, keys], None
    return k[:, keys], v[:, keys], (here[2][:, queries], k_segment_BS[:, keys])


def _merged(sums: Pair, part: Pair) -> Pair:
    """Attention to two sets of keys from attention to each."""
    lse_BNT = jnp.logaddexp(sums[1], part[1])
    weights = (jnp.exp(x[1] - lse_BNT) for x in (sums, part))
    old, new = (jnp.moveaxis(weight, 1, 2)[..., None] for weight in weights)
    return sums[0] * old + part[0].astype(jnp.float32) * new, lse_BNT


def _beside_zeros(x: jax.Array, *, last: bool) -> jax.Array:
    """Half of the tokens' gradients among those of all."""
    parts = [jnp.zeros_like(x), x] if last else [x, jnp.zeros_like(x)]
    return jnp.concatenate(parts, axis=1)


Visit: TypeAlias = Callable[[Any, Keys, jax.Array], tuple[Any, Any]]
"""(state, keys, the device they are from) -> (state, the keys' gradients)."""


def _ring(
    mesh_axes: tuple[str, ...], visit: Visit, state: Any, keys: Keys, gradients: Any
) -> tuple[Any, Any]:
    """Visit the keys of all others as they pass by; return the state, and the
    gradients of our own once they are home."""
    C, index = jax.lax.axis_size(mesh_axes), jax.lax.axis_index(mesh_axes)
    to_next = [(i, (i + 1) % C) for i in range(C)]

    def pass_on(tree: Any) -> Any:
        return jax.lax.ppermute(tree, mesh_axes, to_next)

    def meet(state: Any, keys: Keys, gradients: Any, step: Any) -> tuple[Any, Any]:
        gradients = pass_on(gradients)  # those of the keys that are here now
        state, more = visit(state, keys, (index - step) % C)
        return state, jax.tree.map(jnp.add, gradients, more)

    def turn(carry: tuple[Any, Keys, Any], step: jax.Array) -> tuple[Any, None]:
        state, keys, gradients = carry
        following = pass_on(keys)  # on the way while `keys` are visited
        state, gradients = meet(state, keys, gradients, step)
        return (state, following, gradients), None

    carry = (state, pass_on(keys), gradients)
    if C > 2:
        carry, _ = jax.lax.scan(turn, carry, jnp.arange(1, C - 1))
    state, keys, gradients = carry
    state, gradients = meet(state, keys, gradients, C - 1)
    return state, pass_on(gradients)


def _gather(
    mesh_axes: tuple[str, ...], visit: Visit, state: Any, keys: Keys, gradients: Any
) -> tuple[Any, Any]:
    """As `_ring`, with all keys fetched first and all gradients returned last."""
    C, index = jax.lax.axis_size(mesh_axes), jax.lax.axis_index(mesh_axes)
    every_key = jax.lax.all_gather(keys, mesh_axes)

    def place(all_C: jax.Array, one: jax.Array, source: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(all_C, one, source, 0)

    def turn(carry: tuple[Any, Any], step: jax.Array) -> tuple[Any, None]:
        state, every_gradient = carry
        source = (index - step) % C
        there = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, source, 0, keepdims=False),
            every_key,
        )
        state, more = visit(state, there, source)
        put = functools.partial(place, source=source)
        return (state, jax.tree.map(put, every_gradient, more)), None

    every_gradient = jax.tree.map(
        lambda x: place(jnp.zeros((C, *x.shape), x.dtype), x, index), gradients
    )
    carry, _ = jax.lax.scan(turn, (state, every_gradient), jnp.arange(1, C))
    state, every_gradient = carry
    return state, jax.lax.psum_scatter(every_gradient, mesh_axes)


_EXCHANGES = {"ring": _ring, "gather": _gather}
