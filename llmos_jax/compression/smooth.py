"""Move the range of activations into the weights before them: SmoothQuant's fold
(arXiv 2211.10438).

K inputs of a matrix. A few inputs are much larger than the others, and one scale for
all inputs of a token has to reach the largest. Dividing input j by s_j and multiplying
its weights by s_j changes nothing in exact arithmetic; here s_j is
largest|x_j|^alpha / largest|w_j|^(1 - alpha) (equation 4). The division disappears into
what makes the input: the norm before q, k, v and before gate, up; the columns of `up`
before `down` (what the gate makes is multiplied with them); those of `v` before `o`,
where all query heads of a key/value head share one s, for they share its values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llmos_jax.compression.calibrate import Moments, Seen
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params

SMALLEST = 1e-5
"""Of a largest magnitude, so that a channel that is always zero divides by no zero."""


@functools.partial(jax.jit, static_argnames=("spec", "alpha"))
def smoothed(
    layer: Params, seen: Seen, spec: ModelSpec, alpha: float
) -> tuple[Params, Seen]:
    """One layer with its activations' range moved into its weights, and what its
    matrices take then.

    Args:
        layer: float parameters by path without `layers.`.
        seen: what its matrices take.
        spec: the model.
        alpha: how much of the range is moved: 0 none, 1 all.
    """
    made = {path: x.astype(jnp.float32) for path, x in layer.items()}
    factors = {
        "query": _fold_norm(
            *(made, "attention_norm.scale", [f"attention.{name}" for name in "qkv"]),
            *(seen["query"], spec, alpha),
        ),
        "ffn_gate": _fold_norm(
            *(made, "ffn_norm.scale", ["ffn.gate", "ffn.up"]),
            *(seen["ffn_gate"], spec, alpha),
        ),
        "ffn_out": _fold_gated(made, seen["ffn_out"], alpha),
        "out": _fold_values(made, seen["out"], spec, alpha),
    }
    return made, {takes: _divided(seen[takes], s_K) for takes, s_K in factors.items()}


def _fold_norm(
    made: Params,
    norm: str,
    paths: list[str],
    moments: Moments,
    spec: ModelSpec,
    alpha: float,
) -> jax.Array:
    """Divide a norm's scale, multiply the rows of all that takes what it gives."""
    s_D = _factor(moments.largest_K, [made[path] for path in paths], alpha)
    # Norms that multiply by 1 + scale keep what is left of 1.
    one = 1.0 if spec.norm_offset else 0.0
    made[norm] = (made[norm] + one) / s_D - one
    for path in paths:
        made[path] *= s_D.reshape(-1, *[1] * (made[path].ndim - 1))
    return s_D


def _fold_gated(made: Params, moments: Moments, alpha: float) -> jax.Array:
    """Divide the columns of up, multiply the rows of down."""
    s_F = _factor(moments.largest_K, [made["ffn.down"]], alpha)
    made["ffn.up"] /= s_F[None, :]
    made["ffn.down"] *= s_F[:, None]
    return s_F


def _fold_values(
    made: Params, moments: Moments, spec: ModelSpec, alpha: float
) -> jax.Array:
    """Divide the columns of v (and its bias), multiply the rows of o."""
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
    o_KGHD = made["attention.o"].reshape(K, N // K, H, -1)
    largest_KH = jnp.max(moments.largest_K.reshape(K, N // K, H), axis=1)
    o_KHX = jnp.moveaxis(o_KGHD, 1, 2).reshape(K * H, -1)
    s_KH = _factor(largest_KH.reshape(-1), [o_KHX], alpha).reshape(K, H)
    made["attention.v"] /= s_KH[None]
    if "attention.v_bias" in made:
        made["attention.v_bias"] /= s_KH
    o_KGHD = o_KGHD * s_KH[:, None, :, None]
    made["attention.o"] = o_KGHD.reshape(made["attention.o"].shape)
    return jnp.repeat(s_KH, N // K, axis=0).reshape(-1)


def _divided(moments: Moments, s_K: jax.Array) -> Moments:
    """What is taken where each input is divided by its s."""
    return Moments(
        products_KK=moments.products_KK / (s_K[:, None] * s_K[None, :]),
        largest_K=moments.largest_K / s_K,
    )


def _factor(largest_K: jax.Array, weights: list[jax.Array], alpha: float) -> jax.Array:
    """s of each input, for all matrices that take it."""
    K = largest_K.shape[0]
    reach = [jnp.max(jnp.abs(w.reshape(K, -1)), axis=1) for w in weights]
    weight_K = jnp.maximum(jnp.max(jnp.stack(reach), axis=0), SMALLEST)
    return jnp.maximum(largest_K, SMALLEST) ** alpha / weight_K ** (1 - alpha)
