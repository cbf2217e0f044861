"""What makes a classifier of features: pooling, noise in training, and a linear head.

B sequences, T tokens, D features, C classes. Sequences are padded on the right; what
stands there takes part in nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import Classes
from llmos_jax.models.annotate import annotate
from llmos_jax.models.draw import normal


class Noise(NamedTuple):
    """What makes training harder, so that less is learnt by heart."""

    key: jax.Array
    features: float
    """Share of features that are dropped (arXiv 1207.0580)."""
    words: float
    """Share of tokens whose embedding is dropped (arXiv 1512.05287)."""

    def of(self, number: int) -> Noise:
        """Noise of its own for one place of a model."""
        return self._replace(key=jax.random.fold_in(self.key, number))


def dropped(x: jax.Array, noise: Noise | None) -> jax.Array:
    """`x`, [B, D] or [B, T, D], with some features 0 and the others larger by as much;
    the same ones of all tokens of a text (arXiv 1512.05287), which also takes a T-th of
    the random numbers."""
    if noise is None:
        return x
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return _without(x, shape, noise.key, noise.features)


def words_dropped(x_BTD: jax.Array, noise: Noise | None) -> jax.Array:
    """Embeddings with those of some tokens 0."""
    if noise is None:
        return x_BTD
    B, T, _ = x_BTD.shape
    return _without(x_BTD, (B, T, 1), noise.key, noise.words)


def _without(
    x: jax.Array, shape: tuple[int, ...], key: jax.Array, share: float
) -> jax.Array:
    if share <= 0:
        return x
    stays = jax.random.bernoulli(key, 1 - share, shape)
    larger = x / jnp.asarray(1 - share, x.dtype)
    return jnp.where(jnp.broadcast_to(stays, x.shape), larger, jnp.zeros_like(x))


def counts(T: int, lengths_B: jax.Array) -> jax.Array:
    """bool [B, T]: which tokens are text."""
    return jnp.arange(T, dtype=jnp.int32)[None, :] < lengths_B[:, None]


def pooled(x_BTD: jax.Array, lengths_B: jax.Array, how: str) -> jax.Array:
    """Features of whole texts, [B, D]: `mean`, `max`, or those of the `last` token."""
    B, T, _ = x_BTD.shape
    is_text_BT1 = counts(T, lengths_B)[:, :, None]
    if how == "max":
        lowest = jnp.asarray(jnp.finfo(x_BTD.dtype).min, x_BTD.dtype)
        return jnp.max(jnp.where(is_text_BT1, x_BTD, lowest), axis=1)
    if how == "last":
        at_B1 = jnp.arange(T, dtype=jnp.int32)[None, :] == lengths_B[:, None] - 1
        is_text_BT1 = at_B1[:, :, None]
        number_B1 = jnp.ones((B, 1), jnp.float32)
    else:
        number_B1 = jnp.maximum(lengths_B, 1)[:, None].astype(jnp.float32)
    x32_BTD = jnp.where(is_text_BT1, x_BTD, jnp.zeros_like(x_BTD)).astype(jnp.float32)
    return (jnp.sum(x32_BTD, axis=1) / number_B1).astype(x_BTD.dtype)


class ClassHead(nnx.Module):
    """Pooled features -> logits of the classes."""

    def __init__(self, classes: Classes, width: int, axis: str, *, rngs: nnx.Rngs):
        """Draw the head.

        Args:
            classes: what is told apart, and how features are pooled.
            width: D, of the features.
            axis: its logical axis.
            rngs: to draw from.
        """
        C = len(classes.labels)
        self.kernel = normal(rngs, (width, C), width**-0.5, (axis, "classes"))
        self.out_bias = nnx.Param(
            jnp.zeros((C,), jnp.float32), out_sharding=("classes",)
        )
        self.pooling = classes.pooling

    def __call__(
        self, x_BTD: jax.Array, lengths_B: jax.Array, noise: Noise | None = None
    ) -> jax.Array:
        """Return float32 [B, C]."""
        x_BD = dropped(pooled(x_BTD, lengths_B, self.pooling), noise)
        logits_BC = jnp.einsum(
            "BD,DC->BC", x_BD, self.kernel[...], preferred_element_type=jnp.float32
        )
        logits_BC = logits_BC + self.out_bias[...].astype(jnp.float32)[None]
        return annotate(logits_BC, "batch", "classes")
