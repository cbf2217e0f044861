"""Grouped-query self-attention with rotary positions and an optional KV cache.

B sequences, T tokens, S cache slots, D model, N query heads, K key/value heads, H head
size.
"""

from __future__ import annotations

import jax
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.attention import attention, rotary_attention, rotate
from llmos_jax.models.annotate import annotate
from llmos_jax.models.cache import KVCache, write
from llmos_jax.models.layers import normal
from llmos_jax.models.project import project


class Attention(nnx.Module):
    """o(attend(rope(q x), rope(k x), v x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, H = spec.embed_dim, spec.head_dim
        N, K = spec.num_heads, spec.num_kv_heads
        self.q = normal(rngs, (D, N, H), D**-0.5, ("embed", "heads", "head_dim"))
        self.k = normal(rngs, (D, K, H), D**-0.5, ("embed", "kv_heads", "head_dim"))
        self.v = normal(rngs, (D, K, H), D**-0.5, ("embed", "kv_heads", "head_dim"))
        out_scale = (2 * spec.num_layers * N * H) ** -0.5
        self.o = normal(rngs, (N, H, D), out_scale, ("heads", "head_dim", "embed"))

    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend; with a cache, write these keys first and attend to all of it."""
        q_BTNH = project(x_BTD, self.q[...])
        k_BTKH = project(x_BTD, self.k[...])
        v_BTKH = project(x_BTD, self.v[...])
        q_BTNH = annotate(q_BTNH, "batch", "seq", "heads", "head_dim")
        k_BTKH = annotate(k_BTKH, "batch", "seq", "kv_heads", "head_dim")
        v_BTKH = annotate(v_BTKH, "batch", "seq", "kv_heads", "head_dim")
        if cache is None:
            out_BTNH = rotary_attention(q_BTNH, k_BTKH, v_BTKH, position_BT, angles)
        else:
            start = position_BT[0, 0]
            k_BTKH = rotate(k_BTKH, angles)
            cache = KVCache(
                k=write(cache.k, k_BTKH, start), v=write(cache.v, v_BTKH, start)
            )
            out_BTNH = attention(rotate(q_BTNH, angles), cache.k, cache.v, position_BT)
        out_BTNH = annotate(out_BTNH, "batch", "seq", "heads", "head_dim")
        return project(out_BTNH, self.o[...], contract=2), cache
