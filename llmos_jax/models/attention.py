"""Grouped-query self-attention with rotary positions and an optional KV cache.

B sequences, T tokens, S cache slots, D model, N query heads, K key/value heads, H head
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.attention import (
    attention,
    context_attention,
    device_order,
    rotary_attention,
    rotate,
)
from llmos_jax.models.annotate import annotate, mesh_axes_of, per_shard, ways_of
from llmos_jax.models.cache import KVCache, write
from llmos_jax.models.layers import normal
from llmos_jax.models.project import project

Angles = tuple[jax.Array, jax.Array]
"""Cos and sin, float32 [B, T, H/2]."""

Tokens = dict[str, jax.Array]
"""What else is known of tokens: "position" and "segment", each int32 [B, T]."""

_Q_AXES = ("batch", "seq", "heads", "head_dim")


class Sight(NamedTuple):
    """What attention sees by."""

    position_BT: jax.Array | None
    """int32 positions. None: whole sequences from position 0, for which the fastest
    kernels are; a cache is then only written."""
    angles: Angles
    """Of the same positions."""
    segment_BT: jax.Array | None = None
    """int32 document of each token; tokens see those of their own alone."""
    exchange: str = "ring"
    """How keys and values of a split sequence travel (ir/plan.py, EXCHANGES)."""


def token_order(T: int) -> np.ndarray | None:
    """Return the position, int32 [T], of each token of a sequence, where a mesh splits
    sequences and attention wants them in another order; None: their own.

    There, tokens and all that goes with them (targets, segments) come in this order.
    """
    ways = ways_of("seq", T)
    return None if ways == 1 else device_order(T, ways)


class Attention(nnx.Module):
    """o(attend(rope(norm(q x)), rope(norm(k x)), v x)); norm only with `qk_norm`."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, H = spec.embed_dim, spec.head_dim
        N, K = spec.num_heads, spec.num_kv_heads
        self.q = normal(rngs, (D, N, H), D**-0.5, ("embed", "heads", "head_dim"))
        self.k = normal(rngs, (D, K, H), D**-0.5, ("embed", "kv_heads", "head_dim"))
        self.v = normal(rngs, (D, K, H), D**-0.5, ("embed", "kv_heads", "head_dim"))
        out_scale = (2 * spec.num_layers * N * H) ** -0.5
        self.o = normal(rngs, (N, H, D), out_scale, ("heads", "head_dim", "embed"))
        self.qk_norm = spec.qk_norm
        if spec.qk_norm:
            self.q_norm = HeadNorm(H, spec.norm_eps)
            self.k_norm = HeadNorm(H, spec.norm_eps)

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend; with a cache, write these keys first and attend to all of it.

        Args:
            x_BTD: normed activations.
            sight: where the tokens stand, and which of them see each other.
            cache: keys and values of earlier tokens, or None.
        """
        position_BT, angles = sight.position_BT, sight.angles
        is_split = bool(mesh_axes_of("seq", x_BTD.shape[1]))
        q_BTNH = project(x_BTD, self.q[...], name="query")
        k_BTKH = project(x_BTD, self.k[...], name="key")
        v_BTKH = project(x_BTD, self.v[...], name="value")
        q_BTNH = annotate(q_BTNH, "batch", "seq", "heads", "head_dim")
        k_BTKH = annotate(k_BTKH, "batch", "seq", "kv_heads", "head_dim")
        v_BTKH = annotate(v_BTKH, "batch", "seq", "kv_heads", "head_dim")
        if self.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if cache is None and not (is_split and position_BT is not None):
            attend = _attend_over_devices if is_split else _rotate_and_attend
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, sight)
        else:
            assert sight.segment_BT is None, "a cache holds one document"
            assert not is_split or position_BT is not None, "give a cache positions"
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
            keys, values = k_BTKH, v_BTKH
            if cache is not None:
                start = jnp.int32(0) if position_BT is None else position_BT[0, 0]
                cache = KVCache(
                    k=write(cache.k, k_BTKH, start), v=write(cache.v, v_BTKH, start)
                )
                if position_BT is not None:
                    keys, values = cache
            out_BTNH = _attend(q_BTNH, keys, values, position_BT)
        out_BTNH = annotate(out_BTNH, "batch", "seq", "heads", "head_dim")
        return project(out_BTNH, self.o[...], name="out", contract=2), cache


class HeadNorm(nnx.Module):
    """RMSNorm over each head (Qwen3, arXiv 2505.09388, section 2), in float32."""

    def __init__(self, H: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((H,), jnp.float32), out_sharding=("head_dim",))
        self.epsilon = epsilon

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        x32_BTNH = x_BTNH.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_BTNH), axis=-1, keepdims=True)
        scale_BTNH = self.scale[...].astype(jnp.float32)[None, None, None, :]
        y_BTNH = x32_BTNH * jax.lax.rsqrt(mean_square + self.epsilon) * scale_BTNH
        return y_BTNH.astype(x_BTNH.dtype)


def _rotate_and_attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, sight: Sight
) -> jax.Array:
    """Each device rotates and attends its sequences and heads."""

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, angles: Angles, tokens: Tokens
    ) -> jax.Array:
        return rotary_attention(
            q, k, v, tokens.get("position"), angles, tokens.get("segment")
        )

    return _per_device(part, q_BTNH, k_BTKH, v_BTKH, sight)


def _attend_over_devices(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, sight: Sight
) -> jax.Array:
    """Each device attends its tokens, in `token_order`, to those of others, too."""
    mesh_axes = mesh_axes_of("seq", q_BTNH.shape[1])

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, angles: Angles, tokens: Tokens
    ) -> jax.Array:
        q, k, segment = rotate(q, angles), rotate(k, angles), tokens.get("segment")
        return context_attention(q, k, v, segment, mesh_axes, exchange=sight.exchange)

    return _per_device(part, q_BTNH, k_BTKH, v_BTKH, sight)


def _per_device(
    part: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sight: Sight,
) -> jax.Array:
    """`part(q, k, v, angles, tokens)` of each device's sequences, tokens and heads."""
    k_BTKH, v_BTKH, heads = _like_queries(q_BTNH.shape[2], k_BTKH, v_BTKH)
    kv_axes = ("batch", "seq", heads, "head_dim")
    given = {"position": sight.position_BT, "segment": sight.segment_BT}
    tokens = {name: x_BT for name, x_BT in given.items() if x_BT is not None}

    def flat(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
        cos, sin, *per_token = rest
        return part(q, k, v, (cos, sin), dict(zip(tokens, per_token, strict=True)))

    out_BTNH: jax.Array = per_shard(
        flat,
        *(q_BTNH, k_BTKH, v_BTKH, *sight.angles, *tokens.values()),
        in_axes=(
            *(_Q_AXES, kv_axes, kv_axes),
            *(("batch", "seq", None), ("batch", "seq", None)),
            *(("batch", "seq") for _ in tokens),
        ),
        out_axes=_Q_AXES,
    )
    return out_BTNH


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    """Each device attends its sequences, heads and queries to all of their keys."""
    k_BSKH, v_BSKH, heads = _like_queries(q_BTNH.shape[2], k_BSKH, v_BSKH)
    kv_axes = ("batch", None, heads, "head_dim")

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, *position: jax.Array
    ) -> jax.Array:
        return attention(q, k, v, position[0] if position else None)

    positions = () if position_BT is None else (position_BT,)
    out_BTNH: jax.Array = per_shard(
        part,
        *(q_BTNH, k_BSKH, v_BSKH, *positions),
        in_axes=(_Q_AXES, kv_axes, kv_axes, *(("batch", "seq") for _ in positions)),
        out_axes=_Q_AXES,
    )
    return out_BTNH


def _like_queries(
    N: int, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, str]:
    """Return keys, values and the name of their heads' axis.

    Where rules split query heads and keep key/value heads whole (too few of them), a
    device would not know which of them its queries share: each query head gets its own.
    """
    K = k_BSKH.shape[2]
    if mesh_axes_of("heads", N) == mesh_axes_of("kv_heads", K):
        return k_BSKH, v_BSKH, "kv_heads"
    return (
        jnp.repeat(k_BSKH, N // K, axis=2),
        jnp.repeat(v_BSKH, N // K, axis=2),
        "heads",
    )
