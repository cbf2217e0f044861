"""Grouped-query self-attention with rotary positions and an optional KV cache.

B sequences, T tokens, S cache slots, D model, N query heads, K key/value heads, H head
size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.attention import (
    Score,
    attention,
    context_attention,
    device_order,
    rotary_attention,
    rotate,
)
from llmos_jax.kernels.attention.reference import whole
from llmos_jax.kernels.decode_attention import decode_attention
from llmos_jax.models.annotate import annotate, mesh_axes_of, per_shard, ways_of
from llmos_jax.models.cache import KVCache, rotated, stacked, written
from llmos_jax.models.layers import RMSNorm
from llmos_jax.models.lora import factors_for
from llmos_jax.models.project import project
from llmos_jax.models.weight import matrix

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
    local_angles: Angles | None = None
    """Of sliding layers, where they rotate otherwise."""


def token_order(T: int) -> np.ndarray | None:
    """Return the position, int32 [T], of each token of a sequence, where a mesh splits
    sequences and attention wants them in another order; None: their own.

    There, tokens and all that goes with them (targets, segments) come in this order.
    """
    ways = ways_of("seq", T)
    return None if ways == 1 else device_order(T, ways)


class Attention(nnx.Module):
    """o(attend(rope(norm(q x)), rope(norm(k x)), v x)); norm only with `qk_norm`.

    Where some layers of a model see a window and others all, the layer is told which it
    is (`is_sliding`): one program holds both.
    """

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, H = spec.embed_dim, spec.head_dim
        N, K = spec.num_heads, spec.num_kv_heads
        D_, NH = {"embed": D}, {"heads": N, "head_dim": H}
        KH = {"kv_heads": K, "head_dim": H}
        self.q = matrix(spec, rngs, D_, NH, D**-0.5)
        self.k = matrix(spec, rngs, D_, KH, D**-0.5)
        self.v = matrix(spec, rngs, D_, KH, D**-0.5)
        out_scale = (2 * spec.num_layers * N * H) ** -0.5
        self.o = matrix(spec, rngs, NH, D_, out_scale)
        has_bias = spec.qkv_bias
        self.q_bias = _bias((N, H), ("heads", "head_dim")) if has_bias else None
        self.k_bias = _bias((K, H), ("kv_heads", "head_dim")) if has_bias else None
        self.v_bias = _bias((K, H), ("kv_heads", "head_dim")) if has_bias else None
        self.o_bias = _bias((D,), ("norm",)) if spec.out_bias else None
        norm = functools.partial(
            RMSNorm, H, spec.norm_eps, offset=spec.norm_offset, axis="head_dim"
        )
        # Over each head (Qwen3, arXiv 2505.09388, section 2).
        self.q_norm = norm() if spec.qk_norm else None
        self.k_norm = norm() if spec.qk_norm else None
        self.q_lora = factors_for(spec, "q", D_, NH, rngs=rngs)
        self.k_lora = factors_for(spec, "k", D_, KH, rngs=rngs)
        self.v_lora = factors_for(spec, "v", D_, KH, rngs=rngs)
        self.o_lora = factors_for(spec, "o", NH, D_, rngs=rngs)
        self.kinds = frozenset(spec.is_sliding)
        self.full = Score(softcap=spec.attention_softcap, scale=spec.attention_scale)
        self.sliding = self.full._replace(window=spec.sliding_window)

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        cache: KVCache | None = None,
        is_sliding: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend; with a cache, write these keys first and attend to all of it.

        Args:
            x_BTD: normed activations.
            sight: where the tokens stand, and which of them see each other.
            cache: keys and values of earlier tokens, or None.
            is_sliding: bool scalar; needed where layers differ.
        """
        q_BTNH, k_BTKH, v_BTKH = self.projected(x_BTD)
        sight = self._turned(sight, is_sliding)
        position_BT = sight.position_BT
        is_split = bool(mesh_axes_of("seq", x_BTD.shape[1]))
        if cache is None and not (is_split and position_BT is not None):
            attend = _attend_over_devices if is_split else _rotate_and_attend
            out_BTNH = self._seeing(
                lambda score, q, k, v: attend(q, k, v, sight, score),
                *(is_sliding, q_BTNH, k_BTKH, v_BTKH),
            )
        else:
            assert sight.segment_BT is None, "a cache holds one document"
            assert not is_split or position_BT is not None, "give a cache positions"
            q_BTNH, k_BTKH = (rotate(x, sight.angles) for x in (q_BTNH, k_BTKH))
            reads_cache = False
            if cache is not None:
                if cache.rotate_keys:
                    q_BTNH, k_BTKH = rotated(q_BTNH), rotated(k_BTKH)
                at_BT = whole(*x_BTD.shape[:2]) if position_BT is None else position_BT
                cache = written(cache, k_BTKH, v_BTKH, at_BT)
                # A whole prompt's own keys are all that it sees. But where the cache
                # rounds them they are read back, so that a prompt gives the same
                # tokens whole and in pieces.
                reads_cache = position_BT is not None or cache.k.dtype != k_BTKH.dtype
            if cache is not None and reads_cache:
                out_BTNH = self._seeing(
                    lambda score, q, cache: _attend_to_cache(q, cache, at_BT, score),
                    *(is_sliding, q_BTNH, cache),
                )
            else:
                out_BTNH = self._seeing(
                    lambda score, q, k, v: _attend(q, k, v, position_BT, score),
                    *(is_sliding, q_BTNH, k_BTKH, v_BTKH),
                )
        out_BTNH = annotate(out_BTNH, "batch", "seq", "heads", "head_dim")
        out_BTD = project(
            *(out_BTNH, self.o[...]),
            name="out",
            contract=2,
            bias=_value(self.o_bias),
            beside=self.o_lora,
        )
        return out_BTD, cache

    def projected(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, normed where the model norms them."""
        q_BTNH = project(
            *(x_BTD, self.q[...]),
            name="query",
            bias=_value(self.q_bias),
            beside=self.q_lora,
        )
        k_BTKH = project(
            *(x_BTD, self.k[...]),
            name="key",
            bias=_value(self.k_bias),
            beside=self.k_lora,
        )
        v_BTKH = project(
            *(x_BTD, self.v[...]),
            name="value",
            bias=_value(self.v_bias),
            beside=self.v_lora,
        )
        q_BTNH = annotate(q_BTNH, "batch", "seq", "heads", "head_dim")
        k_BTKH = annotate(k_BTKH, "batch", "seq", "kv_heads", "head_dim")
        v_BTKH = annotate(v_BTKH, "batch", "seq", "kv_heads", "head_dim")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return q_BTNH, k_BTKH, v_BTKH

    def _turned(self, sight: Sight, is_sliding: jax.Array | None) -> Sight:
        """The sight of this layer, with its own angles."""
        if sight.local_angles is None or True not in self.kinds:
            return sight
        if is_sliding is None:
            return sight._replace(angles=sight.local_angles)
        chosen = jax.tree.map(
            lambda local, full: jnp.where(is_sliding, local, full),
            sight.local_angles,
            sight.angles,
        )
        return sight._replace(angles=chosen)

    def _seeing(
        self,
        attend: Callable[..., jax.Array],
        is_sliding: jax.Array | None,
        *operands: Any,
    ) -> jax.Array:
        """`attend(score, *operands)` as far as this layer sees."""
        if len(self.kinds) == 1:
            score = self.sliding if True in self.kinds else self.full
            return attend(score, *operands)
        assert is_sliding is not None, "layers differ: say which this is"
        out_BTNH: jax.Array = jax.lax.cond(
            is_sliding,
            functools.partial(attend, self.sliding),
            functools.partial(attend, self.full),
            *operands,
        )
        return out_BTNH


def _bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), out_sharding=axes)


def _value(bias: nnx.Param | None) -> jax.Array | None:
    return None if bias is None else bias[...]


def _rotate_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sight: Sight,
    score: Score,
) -> jax.Array:
    """Each device rotates and attends its sequences and heads."""

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, angles: Angles, tokens: Tokens
    ) -> jax.Array:
        return rotary_attention(
            *(q, k, v, tokens.get("position"), angles, tokens.get("segment")),
            score=score,
        )

    return _per_device(part, q_BTNH, k_BTKH, v_BTKH, sight)


def _attend_over_devices(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sight: Sight,
    score: Score,
) -> jax.Array:
    """Each device attends its tokens, in `token_order`, to those of others, too."""
    mesh_axes = mesh_axes_of("seq", q_BTNH.shape[1])

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, angles: Angles, tokens: Tokens
    ) -> jax.Array:
        q, k, segment = rotate(q, angles), rotate(k, angles), tokens.get("segment")
        return context_attention(
            q, k, v, segment, mesh_axes, exchange=sight.exchange, score=score
        )

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
    score: Score,
) -> jax.Array:
    """Each device attends its sequences, heads and queries to all of their keys."""
    k_BSKH, v_BSKH, heads = _like_queries(q_BTNH.shape[2], k_BSKH, v_BSKH)
    kv_axes = ("batch", None, heads, "head_dim")

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, *position: jax.Array
    ) -> jax.Array:
        return attention(q, k, v, position[0] if position else None, score=score)

    positions = () if position_BT is None else (position_BT,)
    out_BTNH: jax.Array = per_shard(
        part,
        *(q_BTNH, k_BSKH, v_BSKH, *positions),
        in_axes=(_Q_AXES, kv_axes, kv_axes, *(("batch", "seq") for _ in positions)),
        out_axes=_Q_AXES,
    )
    return out_BTNH


def _attend_to_cache(
    q_BTNH: jax.Array, cache: KVCache, position_BT: jax.Array, score: Score
) -> jax.Array:
    """Each device attends its sequences and heads to their part of the cache."""
    arrays, layer = stacked(cache)
    count, table = len(arrays), () if cache.table is None else (cache.table,)
    N, K = q_BTNH.shape[2], cache.k.shape[-3]
    is_alike = mesh_axes_of("heads", N) == mesh_axes_of("kv_heads", K)

    def part(
        q: jax.Array,
        position: jax.Array,
        head: jax.Array,
        layer: jax.Array,
        *given: jax.Array,
    ) -> jax.Array:
        arrays, table = given[:count], given[count:]
        if not is_alike:
            arrays = tuple(_of_heads(x, layer, head, N // K) for x in arrays)
            layer = jnp.int32(0)
        k, v, *scales = arrays
        k_scale, v_scale = scales if scales else (None, None)
        return decode_attention(
            *(q, k, v, position),
            k_scale_BKS=k_scale,
            v_scale_BKS=v_scale,
            layer=layer,
            table_BM=table[0] if table else None,
            score=score,
        )

    table_axes = tuple(("batch", None) for _ in table)
    out_BTNH: jax.Array = per_shard(
        part,
        *(q_BTNH, position_BT, jnp.arange(N), layer, *arrays, *table),
        in_axes=(
            *(_Q_AXES, ("batch", "seq"), ("heads",), ()),
            *(*cache.axes, *table_axes),
        ),
        out_axes=_Q_AXES,
    )
    return out_BTNH


def _of_heads(x: jax.Array, layer: jax.Array, head_N: jax.Array, G: int) -> jax.Array:
    """One layer of a cache [L, B, K, S, ...] or of pages, with the key/value heads that
    a device's query heads look at: one if they share it, else one for each."""
    x = jax.lax.dynamic_slice_in_dim(x, layer, 1, axis=0)
    if G % len(head_N) == 0:
        return jax.lax.dynamic_slice_in_dim(x, head_N[0] // G, 1, axis=2)
    return jnp.take(x, head_N // G, axis=2)


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
