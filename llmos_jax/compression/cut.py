"""Take channels, heads and layers out of a model, and mend what is left.

D model, F feed-forward, L layers, K summed inputs, N made outputs, H head size. Three
things are put right, each for the text that the model was studied on:

    inputs   what lost inputs added is added by those that stay, as far as they tell it:
             W' = W_kept + (C_kept + ridge)^-1 C_kept,lost W_lost, C their second
             moments: least squares of what the matrix made (OSSCAR, arXiv 2403.12983)
    norms    RMSNorm divides by the root mean square of fewer channels; its scale takes
             up how that differs from all channels', and epsilon what it was of
    tables   `scaled_embeddings` multiplies by the root of fewer channels; the table
             takes that up, and where it is the head, too, the final norm gives it back

Where all that goes is zero, what is left computes what the whole model did.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compression.calibrate import Moments, Study
from llmos_jax.compression.importance import Importance, Studied
from llmos_jax.compression.matrices import LAYERS, MATRICES, flat, layer, stacked
from llmos_jax.compression.shapes import Shape
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton, skeleton

RIDGE = 0.01
"""Of each kept input's own second moment, added to it: GPTQ's damping (arXiv
2210.17323, section 3.3), each input's own, for a few are far larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Indices of what stays, ascending."""

    layers: np.ndarray
    embed_D: np.ndarray
    kv_heads_LK: np.ndarray
    """For each of all layers, [L, kept]."""
    ffn_LF: np.ndarray

    def explain(self) -> dict[str, str]:
        """In short: what goes, for sizes that shrink the same in all layers."""
        return {
            "layers": _ranges(self.layers),
            "embed_channels": _ranges(self.embed_D),
            "kv_heads_by_layer": "; ".join(
                _ranges(self.kv_heads_LK[index]) for index in self.layers
            ),
        }


def kept(importance: Importance, shape: Shape) -> Kept:
    """The most important parts, as many as a shape has."""
    return Kept(
        layers=_largest(importance.layers_L, shape.num_layers),
        embed_D=_largest(importance.embed_D, shape.embed_dim),
        kv_heads_LK=_largest(importance.kv_heads_LK, shape.num_kv_heads),
        ffn_LF=_largest(importance.ffn_LF, shape.ffn_dim),
    )


def lost(importance: Importance, chosen: Kept) -> float:
    """How much of what counts goes, to compare shapes by.

    A layer's attention and its feed-forward block count 1 each, and lose the shares of
    the heads and channels that go; of a layer that goes, all. An embedding channel
    takes part in what both take and in what both give, so its share counts 4 times.
    Means over layers. The 4 is a judgement, made after eight shapes of SmolLM2-135M
    had been tried: README.md of this room has them beside what they really lost.
    """
    stays = chosen.layers
    blocks = 0.0
    for whole, indices in (
        (importance.kv_heads_LK, chosen.kv_heads_LK),
        (importance.ffn_LF, chosen.ffn_LF),
    ):
        kept_L = np.take_along_axis(whole, indices, axis=1).sum(axis=1)
        blocks += 1 - kept_L[stays].sum() / len(kept_L)
    return float(blocks + 4 * (1 - importance.embed_D[chosen.embed_D].sum()))


def cut(
    source: Skeleton, params: Params, studied: Studied, shape: Shape, chosen: Kept
) -> tuple[Skeleton, Params]:
    """The smaller model, its parameters in the dtypes that they had."""
    spec = source.spec
    made = skeleton(_with_layers(shape.of(spec), spec, chosen.layers))
    layers = [
        _cut_layer(
            layer(params, index),
            studied.layers[index],
            spec,
            jnp.asarray(chosen.embed_D),
            jnp.asarray(chosen.kv_heads_LK[index]),
            jnp.asarray(chosen.ffn_LF[index]),
        )
        for index in map(int, chosen.layers)
    ]
    found = _cut_outer(params, studied.final, spec, jnp.asarray(chosen.embed_D))
    found |= stacked(layers)
    return made, {path: x.astype(params[path].dtype) for path, x in found.items()}


_SLIDES: dict[bool, Literal["sliding", "full"]] = {True: "sliding", False: "full"}


def _with_layers(made: ModelSpec, spec: ModelSpec, layers: np.ndarray) -> ModelSpec:
    """The pattern of the layers that stay."""
    if not spec.layer_pattern:
        return made
    kinds = tuple(_SLIDES[spec.is_sliding[index]] for index in layers)
    made = replace(made, layer_pattern=kinds)
    return replace(made, layer_pattern=kinds[: made.layer_period]).check()


@functools.partial(jax.jit, static_argnames="spec")
def _cut_layer(
    one: Params,
    study: Study,
    spec: ModelSpec,
    embed: jax.Array,
    kv_heads: jax.Array,
    ffn: jax.Array,
) -> Params:
    """One layer with the channels and heads of these indices."""
    H, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    heads = (kv_heads[:, None] * group + jnp.arange(group)[None]).reshape(-1)
    inside = (heads[:, None] * H + jnp.arange(H)[None]).reshape(-1)
    inputs = {"query": embed, "out": inside, "ffn_gate": embed, "ffn_out": ffn}
    outputs = {"q": heads, "k": kv_heads, "v": kv_heads, "gate": ffn, "up": ffn}
    made = dict(one)
    for matrix in MATRICES:
        w, stays = one[matrix.path], inputs[matrix.takes]
        outside = w.shape[matrix.contract :]
        w_KN = mended(flat(w, matrix), study.seen[matrix.takes], stays)
        chosen = outputs.get(matrix.path.rpartition(".")[2], embed)
        w = jnp.take(w_KN.reshape(-1, *outside), chosen, axis=1)
        made[matrix.path] = w.reshape(-1, H, w.shape[-1]) if matrix.contract == 2 else w
    biases = {"q": heads, "k": kv_heads, "v": kv_heads, "o": embed}
    for name, chosen in biases.items():
        path = f"attention.{name}_bias"
        if path in one:
            made[path] = one[path][chosen]
    for name, square_D in study.normed.items():
        path = f"{name}.scale"
        made[path] = _norm(one[path], square_D, embed, spec)
    return made


def _cut_outer(
    params: Params, final: Study, spec: ModelSpec, embed: jax.Array
) -> Params:
    """The table, the final norm and the head with these channels."""
    made = {
        "embed.table": params["embed.table"].astype(jnp.float32)[:, embed],
        "final_norm.scale": _norm(
            params["final_norm.scale"], final.normed["final_norm"], embed, spec
        ),
    }
    if not spec.tied_embeddings:
        kernel_DV = params["head.kernel"].astype(jnp.float32)
        made["head.kernel"] = mended(kernel_DV, final.seen["head"], embed)
    if spec.scaled_embeddings:
        more = jnp.float32((spec.embed_dim / embed.shape[0]) ** 0.5)
        made["embed.table"] *= more
        if spec.tied_embeddings:
            scale_D = made["final_norm.scale"]
            one = jnp.float32(spec.norm_offset)
            made["final_norm.scale"] = (scale_D + one) / more - one
    rest = {path: x for path, x in params.items() if not path.startswith(LAYERS)}
    assert rest.keys() == made.keys(), (rest.keys(), made.keys())
    return made


@jax.jit
def mended(w_KN: jax.Array, moments: Moments, stays: jax.Array) -> jax.Array:
    """The rows of a matrix that stay, with what the others added.

    Args:
        w_KN: float32.
        moments: of its inputs.
        stays: indices of the inputs that stay.
    """
    K = w_KN.shape[0]
    if stays.shape[0] == K:
        return w_KN
    is_lost_K = jnp.ones(K, bool).at[stays].set(False)
    lost_KN = jnp.where(is_lost_K[:, None], w_KN, jnp.float32(0))
    products_kK = moments.products_KK[stays]
    products_kk = products_kK[:, stays]
    own_k = jnp.diagonal(products_kk)
    # An input that was always zero has no say.
    ridge_k = jnp.where(own_k == 0, jnp.float32(1), RIDGE * own_k)
    with jax.default_matmul_precision("highest"):
        added_kN = jax.scipy.linalg.solve(
            products_kk + jnp.diag(ridge_k), products_kK @ lost_KN, assume_a="pos"
        )
    return w_KN[stays] + added_kN


def _norm(
    scale_D: jax.Array, square_D: jax.Array, stays: jax.Array, spec: ModelSpec
) -> jax.Array:
    """The scale of a norm over fewer channels."""
    one = jnp.float32(spec.norm_offset)
    ratio = jnp.sqrt(jnp.mean(square_D[stays]) / jnp.mean(square_D))
    return (scale_D.astype(jnp.float32)[stays] + one) * ratio - one


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest along the last axis, ascending."""
    order = np.argsort(-x, axis=-1, kind="stable")
    return np.sort(order[..., :count], axis=-1)


def _ranges(indices: np.ndarray) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs
    )
