"""A decoder-only transformer: embedding, L equal blocks scanned, norm, head.

B sequences, T tokens, D model, L layers, V vocabulary. The blocks' parameters are
stacked along a leading `layers` axis, so a model of any depth compiles one block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.ir import ModelSpec
from llmos_jax.models.annotate import Axes, annotate
from llmos_jax.models.attention import Attention, Sight, token_order
from llmos_jax.models.cache import KVCache
from llmos_jax.models.classes import ClassHead, Noise
from llmos_jax.models.draw import stacked
from llmos_jax.models.in_place import at_layer, left_whole
from llmos_jax.models.layers import Embedding, FeedForward, Head, RMSNorm, capped
from llmos_jax.models.moe import MoE, Routing
from llmos_jax.models.remat import rematerialised
from llmos_jax.models.rope import local_angles, rotary_angles


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); with `post_norms`, what is added
    is normed too."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        norm = functools.partial(
            RMSNorm, spec.embed_dim, spec.norm_eps, offset=spec.norm_offset
        )
        self.attention_norm = norm()
        self.attention = Attention(spec, rngs=rngs)
        self.ffn_norm = norm()
        self.ffn: FeedForward | MoE = (
            MoE(spec, rngs=rngs) if spec.num_experts else FeedForward(spec, rngs=rngs)
        )
        self.attention_out_norm = norm() if spec.post_norms else None
        self.ffn_out_norm = norm() if spec.post_norms else None

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        cache: KVCache | None = None,
        is_sliding: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache | None, Routing | None]]:
        normed_BTD = annotate(self.attention_norm(x_BTD), "batch", "seq", "embed")
        out_BTD, cache = self.attention(normed_BTD, sight, cache, is_sliding)
        x_BTD = _added(x_BTD, out_BTD, self.attention_out_norm)
        made = self.ffn(annotate(self.ffn_norm(x_BTD), "batch", "seq", "embed"))
        out_BTD, routing = made if isinstance(made, tuple) else (made, None)
        x_BTD = _added(x_BTD, out_BTD, self.ffn_out_norm)
        return x_BTD, (cache, routing)


def _added(x_BTD: jax.Array, out_BTD: jax.Array, norm: RMSNorm | None) -> jax.Array:
    """The residual stream with what a block gives."""
    if norm is not None:
        out_BTD = norm(annotate(out_BTD, "batch", "residual", "embed"))
    return annotate(x_BTD + out_BTD, "batch", "residual", "embed")


class Stack(NamedTuple):
    """Some consecutive layers of a decoder: plain data, to be cut and scanned."""

    graph: Any
    state: Any
    """Arrays with the layers in front."""


def _layers(stack: Stack) -> int:
    """How many layers a stack has."""
    layers: int = jax.tree.leaves(stack.state)[0].shape[0]
    return layers


class Pass(NamedTuple):
    """How layers run, forward and back (ir/plan.py, Way)."""

    remat: str = "none"
    """What a backward pass finds saved."""
    offload: tuple[str, ...] = ()
    """Saved tensors that wait for it in host memory."""
    unroll: bool = False
    """Write all layers out instead of looping over one: faster on CPUs, where a loop
    copies what it keeps, and slower to compile."""
    exchange: str = "ring"
    """How keys and values of a split sequence travel."""


PLAIN = Pass()


class Decoder(nnx.Module):
    """Tokens in, logits (of tokens or classes, or features before the head) out."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.embed = Embedding(spec, rngs=rngs)
        self.layers: Block = stacked(
            lambda rngs: Block(spec, rngs=rngs), spec.num_layers, rngs
        )
        self.final_norm = RMSNorm(
            spec.embed_dim, spec.norm_eps, offset=spec.norm_offset
        )
        if spec.classes is not None:
            self.classifier = ClassHead(
                spec.classes, spec.embed_dim, "embed", rngs=rngs
            )
        elif not spec.tied_embeddings:
            self.head = Head(spec, rngs=rngs)

    def features(
        self,
        tokens_BT: jax.Array,
        position_BT: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return [B, T, D] before the head, and the cache with this step written.

        Args:
            tokens_BT: int32 token ids.
            position_BT: int32 positions; None counts from 0.
            cache: keys and values of earlier tokens, or None.
        """
        sight = self.sight(tokens_BT.shape, position_BT)
        x_BTD, cache, _ = self.through(
            self.stack, self.embedded(tokens_BT), sight, cache
        )
        return self.final_norm(x_BTD), cache

    def routed_features(
        self,
        tokens_BT: jax.Array,
        segment_BT: jax.Array | None = None,
        how: Pass = PLAIN,
    ) -> tuple[jax.Array, Routing | None]:
        """Return features of whole sequences, and what each layer's router did: arrays
        with a leading L, or None for a model without experts.

        Args:
            tokens_BT: int32 token ids; where a mesh splits sequences, in the order of
                `token_order`.
            segment_BT: int32 document of each token, in the same order; tokens see
                those of their own alone. None: all are one.
            how: what a backward pass finds saved, and where.
        """
        sight = self.sight(tokens_BT.shape, None, segment_BT, how.exchange)
        x_BTD, _, routing = self.through(
            self.stack, self.embedded(tokens_BT), sight, how=how
        )
        return self.final_norm(x_BTD), routing

    def class_logits(
        self,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        noise: Noise | None = None,
        how: Pass = PLAIN,
    ) -> jax.Array:
        """Return float32 [B, C] of a decoder with `classes`.

        Args:
            tokens_BT: int32, padded on the right, where no token of a text looks.
            lengths_B: int32, tokens of each text, at least 1.
            noise: in training; it falls on what goes into the head.
            how: what a backward pass finds saved, and where.
        """
        features_BTD, _ = self.routed_features(tokens_BT, None, how)
        return self.classifier(features_BTD, lengths_B, noise)

    def sight(
        self,
        shape: tuple[int, ...],
        position_BT: jax.Array | None = None,
        segment_BT: jax.Array | None = None,
        exchange: str = "ring",
    ) -> Sight:
        """Return what attention sees by, for [B, T] tokens; None counts from 0."""
        B, T = shape
        counted_BT = position_BT
        if counted_BT is None:
            order = token_order(T)
            counted_T = jnp.arange(T) if order is None else jnp.asarray(order)
            counted_BT = jnp.broadcast_to(counted_T[None, :], (B, T))
        return Sight(
            position_BT,
            rotary_angles(counted_BT, self.spec),
            segment_BT,
            exchange,
            local_angles(counted_BT, self.spec),
        )

    def embedded(self, tokens_BT: jax.Array) -> jax.Array:
        """Return what the first layer takes: [B, T, D]."""
        dtype = self.final_norm.scale[...].dtype
        return annotate(self.embed(tokens_BT, dtype), "batch", "residual", "embed")

    @property
    def stack(self) -> Stack:
        """All layers."""
        return Stack(*nnx.split(self.layers))

    def through(
        self,
        stack: Stack,
        x_BTD: jax.Array,
        sight: Sight,
        cache: KVCache | None = None,
        how: Pass = PLAIN,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """Send activations through the layers of a stack, one after another.

        A cache goes along whole, and each layer writes its part in place: a loop that
        took it apart would copy all of it.
        """
        whole, sliced = left_whole(*stack)
        is_numbered = bool(whole) or cache is not None
        number_L = jnp.arange(_layers(stack), dtype=jnp.int32) if is_numbered else None

        def body(
            carry: tuple[jax.Array, KVCache | None],
            layer: tuple[nnx.State, jax.Array | None, jax.Array | None],
        ) -> tuple[tuple[jax.Array, KVCache | None], Routing | None]:
            (x_BTD, cache), (state, number, is_sliding) = carry, layer
            block = nnx.merge(stack.graph, state, whole)
            if number is not None and whole:
                at_layer(block, number)
            if cache is not None:
                cache = cache._replace(layer=number)
            if "layer_input" in how.offload:
                x_BTD = checkpoint_name(x_BTD, "layer_input")
            x_BTD, (cache, routing) = block(x_BTD, sight, cache, is_sliding)
            if cache is not None:
                cache = cache._replace(layer=None)
            return (x_BTD, cache), routing

        (x_BTD, cache), routing = jax.lax.scan(
            rematerialised(body, how.remat, how.offload),
            (x_BTD, cache),
            (sliced, number_L, self._kinds(stack)),
            unroll=how.unroll or 1,
        )
        return x_BTD, cache, routing

    def _kinds(self, stack: Stack) -> jax.Array | None:
        """Which layers of a stack slide, bool [l]; None where all are alike.

        A part of the layers must begin where the pattern does: the planner sees to it.
        """
        spec = self.spec
        if len(set(spec.is_sliding)) == 1:
            return None
        layers = _layers(stack)
        whole = layers == spec.num_layers
        assert whole or layers % spec.layer_period == 0, (layers, spec.layer_period)
        return jnp.asarray(spec.is_sliding[:layers])

    def head_kernel(self) -> tuple[jax.Array, Axes]:
        """Return the weight that makes logits, and its axes: vocab first if tied.

        Of a model in floating point: it is what training needs.
        """
        is_tied = self.spec.tied_embeddings
        kernel = self.embed.table[...] if is_tied else self.head.kernel[...]
        assert isinstance(kernel, jax.Array), "whole numbers are not trained"
        return kernel, ("vocab", "embed") if is_tied else ("embed", "vocab")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 [B, T, V] from features."""
        head = self.embed if self.spec.tied_embeddings else self.head
        logits_BTV = annotate(head.logits(x_BTD), "batch", "seq", "vocab")
        return capped(logits_BTV, self.spec.logit_softcap)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens_BT)[0])
