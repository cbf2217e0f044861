"""Mixture of experts: each token goes through the k feed-forward blocks it prefers.

B sequences, T tokens, D model, F width of an expert, E experts, k of them per token; n
tokens and m = n k assignments of one device. Nothing is dropped: assignments are sorted
by expert, and each expert multiplies its contiguous rows (MegaBlocks, arXiv
2211.15841). Each device routes its own tokens. Where experts are spread over devices,
rows go to the device that holds their expert and come back (`exchange`); a device then
has M rows, room for the worst case, of which those that did not arrive are nobody's.

Routing is in float32: the router's weight, its logits and all that follows them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.grouped_matmul import grouped_matmul
from llmos_jax.models.annotate import Stored, annotate, mesh_axes_of, per_shard
from llmos_jax.models.draw import normal
from llmos_jax.models.exchange import (
    arrived,
    bring,
    counted,
    lane_of,
    put_back,
    send,
    spread,
)
from llmos_jax.models.layers import swiglu

_X_AXES = ("batch", "seq", None)


class Routing(NamedTuple):
    """What a layer's router did with a batch, in float32; what losses are made of."""

    load_E: jax.Array
    """Share of the assignments that each expert got; no gradient."""
    probability_E: jax.Array
    """Mean over tokens of the router's probability."""
    square: jax.Array
    """Mean over tokens of the squared log-sum-exp of the logits."""


class MoE(nnx.Module):
    """Sum over the chosen experts of weight * down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, F, E = spec.embed_dim, spec.ffn_dim, spec.num_experts
        into, out = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
        self.router = normal(rngs, (D, E), D**-0.5, ("embed", "experts"))
        self.gate = normal(rngs, (E, D, F), D**-0.5, into)
        self.up = normal(rngs, (E, D, F), D**-0.5, into)
        self.down = normal(rngs, (E, F, D), (2 * spec.num_layers * F) ** -0.5, out)
        self.chosen = spec.experts_per_token
        self.renormalised = spec.norm_topk_prob

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        """Return the weighted sum of the chosen experts, and how tokens were routed."""
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits_BTE = annotate(logits_BTE, "batch", "seq", None)

        E, D, _ = self.gate.shape
        spread_over = mesh_axes_of("experts", E, stored=True)
        embed_over = mesh_axes_of("embed", D, stored=True)

        def part(
            x_btD: jax.Array,
            logits_btE: jax.Array,
            gate_edf: jax.Array,
            up_edf: jax.Array,
            down_efd: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            b, t, D = x_btD.shape
            weight_nk, expert_nk = choose(
                logits_btE.reshape(b * t, E), self.chosen, self.renormalised
            )
            y_nD, count_E = _through_experts(
                *(x_btD.reshape(b * t, D), weight_nk, expert_nk, E, spread_over),
                _Split(gate_edf, ((), embed_over, ())),
                _Split(up_edf, ((), embed_over, ())),
                _Split(down_efd, ((), (), embed_over)),
            )
            return y_nD.reshape(1, b, t, D), count_E[None, None].astype(jnp.float32)

        # Outputs come as one row for each part of the width. Their sum stands outside,
        # so that its gradient is a copy; that of a psum would be one more.
        into, out = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
        parts_BTD, counts_E = per_shard(
            part,
            *(x_BTD, logits_BTE, self.gate[...], self.up[...], self.down[...]),
            in_axes=(_X_AXES, _X_AXES, Stored(into), Stored(into), Stored(out)),
            out_axes=(("ffn", *_X_AXES), ("batch", "seq", None)),
        )
        y_BTD = annotate(_sum_first(parts_BTD), "batch", "seq", "embed")
        count_E = jnp.sum(counts_E, axis=(0, 1))
        log_sum_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
        probability_BTE = jnp.exp(logits_BTE - log_sum_BT1)
        return checkpoint_name(y_BTD, "ffn_out"), Routing(
            load_E=count_E / jnp.float32(self.chosen * x_BTD[..., 0].size),
            probability_E=jnp.mean(probability_BTE, axis=(0, 1)),
            square=jnp.mean(jnp.square(log_sum_BT1)),
        )


def choose(
    logits_nE: jax.Array, k: int, renormalised: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the weights and numbers [n, k] of each token's most probable experts.

    Probabilities are those over all experts; renormalised, the chosen ones' sum to 1,
    which is the softmax over the chosen logits alone. Equal logits: the first wins.
    """
    _, expert_nk = jax.lax.top_k(jax.lax.stop_gradient(logits_nE), k)
    probability_nE = jax.nn.softmax(logits_nE, axis=-1)
    # As a masked sum, its gradient is one too; that of a lookup would be a scatter.
    is_it_nkE = expert_nk[:, :, None] == jnp.arange(logits_nE.shape[1])[None, None, :]
    weight_nk = jnp.sum(jnp.where(is_it_nkE, probability_nE[:, None, :], 0.0), axis=-1)
    if renormalised:
        weight_nk = weight_nk / jnp.sum(weight_nk, axis=-1, keepdims=True)
    return weight_nk, expert_nk


class _Split(NamedTuple):
    """A device's part of a weight, and what it takes to make it whole."""

    part: jax.Array
    over: tuple[tuple[str, ...], ...]
    """For each dimension the mesh axes that it is gathered over."""


def _through_experts(
    x_nD: jax.Array,
    weight_nk: jax.Array,
    expert_nk: jax.Array,
    E: int,
    spread_over: tuple[str, ...],
    *weights: _Split,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum [n, D] over each token's experts, and each expert's rows [E]."""
    n, k = expert_nk.shape
    expert_m = expert_nk.reshape(n * k)
    order_m = jnp.argsort(expert_m)  # assignments by expert; token m // k
    place_m = jnp.argsort(order_m)  # where each assignment went
    is_mine_mE = expert_m[:, None] == jnp.arange(E)[None, :]
    count_E = jnp.sum(is_mine_mE, axis=0, dtype=jnp.int32)
    x_mD = spread(k, x_nD, order_m, place_m)
    weight_m = spread(1, weight_nk.reshape(n * k), order_m, place_m)
    if spread_over:
        lane = lane_of(spread_over, n, k, E)
        rows_XE = counted(spread_over, count_E)
        x_MD, weight_M = send(lane, x_mD, rows_XE), send(lane, weight_m, rows_XE)
        count_e = arrived(spread_over, rows_XE)
        is_row_M = jnp.arange(x_MD.shape[0]) < jnp.sum(count_e)
        y_MD = _feed_forward(x_MD, weight_M, count_e, is_row_M, *weights)
        y_mD = bring(lane, y_MD, rows_XE)
    else:
        y_mD = _feed_forward(x_mD, weight_m, count_E, None, *weights)
    y_nkD = put_back(y_mD, order_m, place_m).reshape(n, k, -1)
    return jnp.sum(y_nkD, axis=1), count_E


def _feed_forward(
    x_mD: jax.Array,
    weight_m: jax.Array,
    count_E: jax.Array,
    is_row_m: jax.Array | None,
    gate: _Split,
    up: _Split,
    down: _Split,
) -> jax.Array:
    """Each row through its expert, times its weight.

    The weight multiplies what goes into `down`, not what comes out: the same sum, but
    its gradient then needs no output, so a backward pass never runs `down` again.

    A product may leave anything in rows that belong to no group. `is_row_m` puts zeros
    there, on the way back too, so that no product ever multiplies what was left.
    """
    gate_mF = checkpoint_name(_product(x_mD, *gate, count_E), "ffn_gate")
    up_mF = checkpoint_name(_product(x_mD, *up, count_E), "ffn_up")
    if is_row_m is not None:
        gate_mF = jnp.where(is_row_m[:, None], gate_mF, 0)
        up_mF = jnp.where(is_row_m[:, None], up_mF, 0)
    h_mF = swiglu(gate_mF, up_mF) * weight_m[:, None].astype(x_mD.dtype)
    return _product(h_mF, *down, count_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(
    x_mK: jax.Array,
    part: jax.Array,
    over: tuple[tuple[str, ...], ...],
    sizes_E: jax.Array,
) -> jax.Array:
    """The grouped product with a weight gathered for it, and gathered again for its
    gradient: whole weights never wait. The weight's gradient is scattered."""
    return grouped_matmul(x_mK, _gather(part, over), sizes_E)


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _product_forward(
    x_mK: jax.Array,
    part: jax.Array,
    over: tuple[tuple[str, ...], ...],
    sizes_E: jax.Array,
) -> tuple[jax.Array, _Saved]:
    return _product(x_mK, part, over, sizes_E), (x_mK, part, sizes_E)


def _product_backward(
    over: tuple[tuple[str, ...], ...], saved: _Saved, dy_mN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_mK, part, sizes_E = saved
    _, backward = jax.vjp(
        lambda x, w: grouped_matmul(x, w, sizes_E), x_mK, _gather(part, over)
    )
    dx_mK, dw = backward(dy_mN)
    for dimension, axes in enumerate(over):
        if axes:
            dw = jax.lax.psum_scatter(dw, axes, scatter_dimension=dimension, tiled=True)
    return dx_mK, dw, None


_product.defvjp(_product_forward, _product_backward)


def _gather(part: jax.Array, over: tuple[tuple[str, ...], ...]) -> jax.Array:
    for dimension, axes in enumerate(over):
        if axes:
            part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return part


def _sum_first(parts_BTD: jax.Array) -> jax.Array:
    """Sum over the first dimension in the dtype of the parts, as a product would be."""
    total: jax.Array = jax.lax.reduce_sum(parts_BTD, (0,))
    return total
