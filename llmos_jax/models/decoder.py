"""A decoder-only transformer: embedding, L equal blocks scanned, norm, head.

B sequences, T tokens, D model, L layers, V vocabulary. The blocks' parameters are
stacked along a leading `layers` axis, so a model of any depth compiles one block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.models.annotate import annotate
from llmos_jax.models.attention import Attention
from llmos_jax.models.cache import KVCache
from llmos_jax.models.layers import Embedding, Head, RMSNorm, SwiGLU
from llmos_jax.models.remat import rematerialised
from llmos_jax.models.rope import rotary_angles


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        self.attention = Attention(spec, rngs=rngs)
        self.ffn_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        self.ffn = SwiGLU(
            spec.embed_dim, spec.ffn_dim, num_layers=spec.num_layers, rngs=rngs
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        out_BTD, cache = self.attention(
            self.attention_norm(x_BTD), position_BT, angles, cache
        )
        x_BTD = annotate(x_BTD + out_BTD, "batch", "seq", "embed")
        x_BTD = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return annotate(x_BTD, "batch", "seq", "embed"), cache


class Decoder(nnx.Module):
    """Tokens in, logits (or features before the head) out."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.embed = Embedding(spec.vocab_size, spec.embed_dim, rngs=rngs)

        @nnx.split_rngs(splits=spec.num_layers)
        @nnx.vmap(
            in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"}
        )
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(spec, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        if not spec.tied_embeddings:
            self.head = Head(spec.embed_dim, spec.vocab_size, rngs=rngs)

    def features(
        self,
        tokens_BT: jax.Array,
        position_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        remat: str = "none",
        unroll: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return [B, T, D] before the head, and the cache with this step written.

        Args:
            tokens_BT: int32 token ids.
            position_BT: int32 positions; None counts from 0.
            cache: keys and values of earlier tokens, or None.
            remat: a name in remat.REMAT_POLICIES.
            unroll: write all layers out instead of looping over one; faster on CPUs,
                where a loop copies what it keeps, and slower to compile.
        """
        B, T = tokens_BT.shape
        if position_BT is None:
            position_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        angles = rotary_angles(position_BT, self.spec)
        x_BTD = annotate(self.embed(tokens_BT), "batch", "seq", "embed")
        graph, stacked = nnx.split(self.layers)

        def body(
            x_BTD: jax.Array, layer: tuple[nnx.State, KVCache | None]
        ) -> tuple[jax.Array, KVCache | None]:
            block = nnx.merge(graph, layer[0])
            return block(x_BTD, position_BT, angles, layer[1])

        x_BTD, cache = jax.lax.scan(
            rematerialised(body, remat), x_BTD, (stacked, cache), unroll=unroll or 1
        )
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 [B, T, V] from features."""
        head = self.embed if self.spec.tied_embeddings else self.head
        return annotate(head.logits(x_BTD), "batch", "seq", "vocab")

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens_BT)[0])
