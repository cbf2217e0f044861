"""A classifier of texts: a transformer whose tokens see each other both ways.

B sequences, T tokens, D model, N query heads, K key/value heads, H head size, G queries
of a key. The blocks are a decoder's, rotary positions included; only the mask differs:
padding is seen by nobody. Beside the features of the last block the embeddings are
pooled and say what they know: few texts teach single words better than their order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.attention import rotate
from llmos_jax.models.annotate import annotate
from llmos_jax.models.attention import Angles, Attention
from llmos_jax.models.classes import ClassHead, Noise, counts, dropped, words_dropped
from llmos_jax.models.draw import stacked
from llmos_jax.models.layers import Embedding, FeedForward, RMSNorm
from llmos_jax.models.project import project
from llmos_jax.models.rope import rotary_angles


class BothWays(Attention):
    """Attention without a causal mask, over the tokens that are text."""

    def over(
        self, x_BTD: jax.Array, angles: Angles, is_text_BT: jax.Array
    ) -> jax.Array:
        """Attend; what comes out where there is no text means nothing."""
        q_BTNH, k_BTKH, v_BTKH = self.projected(x_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        B, T, N, H = q_BTNH.shape
        K = k_BTKH.shape[2]
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
        )
        is_seen = jnp.broadcast_to(is_text_BT[:, None, None, None, :], scores.shape)
        weights = jax.nn.softmax(
            jnp.where(is_seen, scores * jnp.float32(H**-0.5), jnp.float32(-1e30)),
            axis=-1,
        )
        out_BTKGH = jnp.einsum(
            "BKGTS,BSKH->BTKGH", weights.astype(v_BTKH.dtype), v_BTKH
        )
        out_BTNH = annotate(
            out_BTKGH.reshape(B, T, N, H), "batch", "seq", "heads", "head_dim"
        )
        return project(out_BTNH, self.o[...], name="out", contract=2)


class EncoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, spec.embed_dim, spec.norm_eps)
        self.attention_norm = norm()
        self.attention = BothWays(spec, rngs=rngs)
        self.ffn_norm = norm()
        self.ffn = FeedForward(spec, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        angles: Angles,
        is_text_BT: jax.Array,
        noise: Noise | None,
    ) -> jax.Array:
        """Return [B, T, D]."""
        out_BTD = self.attention.over(self.attention_norm(x_BTD), angles, is_text_BT)
        x_BTD = _added(x_BTD, out_BTD, noise and noise.of(0))
        out_BTD = self.ffn(self.ffn_norm(x_BTD))
        return _added(x_BTD, out_BTD, noise and noise.of(1))


def _added(x_BTD: jax.Array, out_BTD: jax.Array, noise: Noise | None) -> jax.Array:
    return annotate(x_BTD + dropped(out_BTD, noise), "batch", "residual", "embed")


class TransformerClassifier(nnx.Module):
    """Tokens in, logits of classes out."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        assert spec.classes is not None
        self.spec = spec
        self.embed = Embedding(spec, rngs=rngs)
        self.layers: EncoderBlock = stacked(
            lambda rngs: EncoderBlock(spec, rngs=rngs), spec.num_layers, rngs
        )
        self.final_norm = RMSNorm(spec.embed_dim, spec.norm_eps)
        head = functools.partial(ClassHead, spec.classes, spec.embed_dim, "embed")
        self.classifier, self.word_classifier = head(rngs=rngs), head(rngs=rngs)

    def class_logits(
        self, tokens_BT: jax.Array, lengths_B: jax.Array, noise: Noise | None = None
    ) -> jax.Array:
        """Return float32 [B, C].

        Args:
            tokens_BT: int32, padded on the right.
            lengths_B: int32, tokens of each text, at least 1.
            noise: in training.
        """
        B, T = tokens_BT.shape
        at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
        angles, is_text_BT = rotary_angles(at_BT, self.spec), counts(T, lengths_B)
        x_BTD = self.embed(tokens_BT, self.final_norm.scale[...].dtype)
        if noise is not None:
            x_BTD = dropped(words_dropped(x_BTD, noise.of(0)), noise.of(1))
        word_BTD = x_BTD = annotate(x_BTD, "batch", "residual", "embed")
        graph, state = nnx.split(self.layers)

        def body(
            x_BTD: jax.Array, layer: tuple[nnx.State, jax.Array]
        ) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, layer[0])
            own = None if noise is None else noise._replace(key=layer[1])
            return block(x_BTD, angles, is_text_BT, own), None

        keys = jax.random.split(
            jax.random.key(0) if noise is None else noise.of(2).key,
            self.spec.num_layers,
        )
        x_BTD, _ = jax.lax.scan(body, x_BTD, (state, keys))
        of_all = self.classifier(self.final_norm(x_BTD), lengths_B, noise)
        own = None if noise is None else noise.of(3)
        return of_all + self.word_classifier(word_BTD, lengths_B, own)
