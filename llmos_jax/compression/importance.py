"""Turn a text into how much each part of a model does for it.

D model, F feed-forward, L layers, K key/value heads, G query heads of each, H head
size, N outputs. A channel counts as the mean square of what it adds to the sum that it
goes into: its activation's second moment times the squares of its weights. Those of a
head go together, so its whole covariance counts. An embedding channel goes into every
layer; the shares of all sums that it has are added. A layer counts as how far it turns
what passes through it: 1 - cosine (arXiv 2403.03853, equation 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from llmos_jax.compression.calibrate import Study, Walk
from llmos_jax.compression.matrices import layer
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton

Progress = Callable[[int, int], None]
"""Takes layers done and layers in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much each part counts: shares that sum to 1 over what it is chosen from."""

    ffn_LF: np.ndarray
    kv_heads_LK: np.ndarray
    embed_D: np.ndarray
    layers_L: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Studied:
    """A model as a text sees it."""

    layers: list[Study]
    final: Study
    importance: Importance
    num_tokens: int


def study(
    source: Skeleton,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    on_progress: Progress = lambda done, total: None,
) -> Studied:
    """Send a text through a model. All second moments stay in memory: 4 (F^2 + 2 D^2 +
    (N H)^2) bytes of each layer."""
    walk = Walk(source, params, batches)
    spec, layers = source.spec, []
    ffn, kv_heads, embed, turned = [], [], [], []
    for index in range(spec.num_layers):
        one = layer(params, index)
        seen = walk.study(one, index)
        layers.append(seen)
        ffn.append(_ffn(one, seen))
        kv_heads.append(_kv_heads(one, seen, spec))
        embed.extend(_embed(one, seen))
        turned.append(float(seen.turned) / walk.num_tokens)
        on_progress(index + 1, spec.num_layers)
    final = walk.finish()
    embed.append(_head(params, final, spec))
    return Studied(
        layers=layers,
        final=final,
        importance=Importance(
            ffn_LF=np.stack(ffn),
            kv_heads_LK=np.stack(kv_heads),
            embed_D=np.mean(embed, axis=0),
            layers_L=_shares(np.array(turned)),
        ),
        num_tokens=walk.num_tokens,
    )


def _ffn(one: Params, seen: Study) -> np.ndarray:
    square_F = np.diagonal(seen.seen["ffn_out"].products_KK)
    return _shares(square_F * _squares(one["ffn.down"]))


def _kv_heads(one: Params, seen: Study, spec: ModelSpec) -> np.ndarray:
    """What the query heads of each add, together."""
    K = spec.num_kv_heads
    products = seen.seen["out"].products_KK
    width = products.shape[0] // K
    w_KgD = one["attention.o"].astype(jnp.float32).reshape(K, width, -1)
    found = []
    for index in range(K):
        chosen = slice(index * width, (index + 1) * width)
        w_gD = w_KgD[index]
        found.append(float(jnp.sum(w_gD * (products[chosen, chosen] @ w_gD))))
    return _shares(np.array(found))


def _embed(one: Params, seen: Study) -> list[np.ndarray]:
    """Of what attention takes, and of what the feed-forward block takes."""
    found = []
    for takes, paths in (
        ("query", ["attention.q", "attention.k", "attention.v"]),
        ("ffn_gate", ["ffn.gate", "ffn.up"]),
    ):
        square_D = np.diagonal(seen.seen[takes].products_KK)
        weight_D = np.sum([_squares(one[path]) for path in paths], axis=0)
        found.append(_shares(square_D * weight_D))
    return found


def _head(params: Params, final: Study, spec: ModelSpec) -> np.ndarray:
    square_D = np.diagonal(final.seen["head"].products_KK)
    if spec.tied_embeddings:
        return _shares(square_D * _squares(params["embed.table"].T))
    return _shares(square_D * _squares(params["head.kernel"]))


def _squares(w: jnp.ndarray) -> np.ndarray:
    """Sum of the squares of each row of a matrix."""
    rows = w.reshape(w.shape[0], -1).astype(jnp.float32)
    return np.asarray(jnp.sum(jnp.square(rows), axis=1))


def _shares(x: np.ndarray) -> np.ndarray:
    """The same, summing to 1; alike where all is zero."""
    x = np.asarray(x, np.float64)
    total = x.sum()
    return x / total if total > 0 else np.full(len(x), 1 / len(x))
