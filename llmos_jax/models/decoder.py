"""A decoder-only transformer: embedding, L equal blocks scanned, norm, head.

B sequences, T tokens, D model, L layers, V vocabulary. The blocks' parameters are
stacked along a leading `layers` axis, so a model of any depth compiles one block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.ir import ModelSpec
from llmos_jax.models.annotate import Axes, annotate
from llmos_jax.models.attention import Attention
from llmos_jax.models.cache import KVCache
from llmos_jax.models.layers import Embedding, Head, RMSNorm, SwiGLU
from llmos_jax.models.moe import MoE, Routing
from llmos_jax.models.remat import rematerialised
from llmos_jax.models.rope import rotary_angles


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        self.attention = Attention(spec, rngs=rngs)
        self.ffn_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        self.ffn: SwiGLU | MoE = (
            MoE(spec, rngs=rngs)
            if spec.num_experts
            else SwiGLU(
                spec.embed_dim, spec.ffn_dim, num_layers=spec.num_layers, rngs=rngs
            )
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array | None,
        angles: tuple[jax.Array, jax.Array],
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, tuple[KVCache | None, Routing | None]]:
        out_BTD, cache = self.attention(
            self.attention_norm(x_BTD), position_BT, angles, cache
        )
        x_BTD = annotate(x_BTD + out_BTD, "batch", "seq", "embed")
        made = self.ffn(self.ffn_norm(x_BTD))
        out_BTD, routing = made if isinstance(made, tuple) else (made, None)
        x_BTD = annotate(x_BTD + out_BTD, "batch", "seq", "embed")
        return x_BTD, (cache, routing)


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
        offload: tuple[str, ...] = (),
        unroll: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return [B, T, D] before the head, and the cache with this step written.

        Args:
            tokens_BT: int32 token ids.
            position_BT: int32 positions; None counts from 0.
            cache: keys and values of earlier tokens, or None.
            remat: what a backward pass finds saved (ir/plan.py, REMATS).
            offload: saved tensors that wait for it in host memory.
            unroll: write all layers out instead of looping over one; faster on CPUs,
                where a loop copies what it keeps, and slower to compile.
        """
        x_BTD, cache, _ = self.routed_features(
            *(tokens_BT, position_BT, cache),
            remat=remat,
            offload=offload,
            unroll=unroll,
        )
        return x_BTD, cache

    def routed_features(
        self,
        tokens_BT: jax.Array,
        position_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        remat: str = "none",
        offload: tuple[str, ...] = (),
        unroll: bool = False,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """Return what `features` does, and what each layer's router did: arrays with a
        leading L, or None for a model without experts."""
        B, T = tokens_BT.shape
        counted_BT = position_BT
        if counted_BT is None:
            counted_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        angles = rotary_angles(counted_BT, self.spec)
        x_BTD = annotate(self.embed(tokens_BT), "batch", "seq", "embed")
        graph, stacked = nnx.split(self.layers)

        def body(
            x_BTD: jax.Array, layer: tuple[nnx.State, KVCache | None]
        ) -> tuple[jax.Array, tuple[KVCache | None, Routing | None]]:
            block = nnx.merge(graph, layer[0])
            if "layer_input" in offload:
                x_BTD = checkpoint_name(x_BTD, "layer_input")
            return block(x_BTD, position_BT, angles, layer[1])

        x_BTD, (cache, routing) = jax.lax.scan(
            rematerialised(body, remat, offload),
            x_BTD,
            (stacked, cache),
            unroll=unroll or 1,
        )
        return self.final_norm(x_BTD), cache, routing

    def head_kernel(self) -> tuple[jax.Array, Axes]:
        """Return the weight that makes logits, and its axes: vocab first if tied."""
        if self.spec.tied_embeddings:
            return self.embed.table[...], ("vocab", "embed")
        return self.head.kernel[...], ("embed", "vocab")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 [B, T, V] from features."""
        head = self.embed if self.spec.tied_embeddings else self.head
        return annotate(head.logits(x_BTD), "batch", "seq", "vocab")

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens_BT)[0])
