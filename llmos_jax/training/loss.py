"""Next-token cross-entropy, whole or in tiles of tokens or of the vocabulary.

B sequences, T tokens, D model, V vocabulary; on one device n tokens, v vocabulary,
d model (as a weight is stored). The logits of a step are often its largest array: 8 x
8192 tokens of Llama 3 make 34 GB of them. Tiled, only those of one tile exist, and
since the loss is where the backward pass begins, its gradients are made with it.

| tiles of | whole meanwhile | logits are made |
|---|---|---|
| tokens | the head, gathered, and its gradient in float32: 6 D v bytes | once |
| vocab | nothing of the head; the features' gradient in float32 | twice |
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.models import Axes, Stored, capped, mesh_axes_of, per_shard

Carry = tuple[jax.Array, jax.Array, jax.Array]


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return float32 -log p(target) [B, T], in nats."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    V = logits_BTV.shape[-1]
    if mesh_axes_of("vocab", V):  # a sum is split by any partitioner, a lookup is not
        is_target_BTV = targets_BT[:, :, None] == jnp.arange(V)[None, None, :]
        return log_sum_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    chosen_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)
    return log_sum_BT - chosen_BT1[:, :, 0]


class Tiling(NamedTuple):
    """How logits are made, and in which parts."""

    axes: Axes
    """Of the head's weight: ("embed", "vocab") or the other way round."""
    tiles: int
    """Parts the tokens or the vocabulary of a device are cut into; the next larger
    number that divides them is taken."""
    over: str = "tokens"
    """`tokens` or `vocab`."""
    softcap: float | None = None
    """Logits z become c tanh(z / c)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def tiled_loss(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    tiling: Tiling,
) -> jax.Array:
    """Return the mean of weighted `token_losses` without ever making all logits.

    Args:
        x_BTD: features before the head.
        kernel: the head's weight, [D, V] or [V, D].
        targets_BT: int32 token ids.
        weights_BT: float32, what each token's loss is multiplied with; None: 1.
        tiling: how.
    """
    return _with_gradients(x_BTD, kernel, targets_BT, weights_BT, tiling)[0]


def _forward(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    tiling: Tiling,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    loss, *gradients = _with_gradients(x_BTD, kernel, targets_BT, weights_BT, tiling)
    return loss, (gradients[0], gradients[1])


def _backward(
    tiling: Tiling, saved: tuple[jax.Array, jax.Array], dloss: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dkernel = (part * dloss.astype(part.dtype) for part in saved)
    return dx_BTD, dkernel, None, None


tiled_loss.defvjp(_forward, _backward)


def _with_gradients(
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, and its gradients by features and by kernel."""
    if tiling.axes[0] == "vocab":
        flipped = tiling._replace(axes=(tiling.axes[1], tiling.axes[0]))
        loss, dx_BTD, dkernel = _with_gradients(
            x_BTD, kernel.T, targets_BT, weights_BT, flipped
        )
        return loss, dx_BTD, dkernel.T
    body = functools.partial(
        _OF_ONE_DEVICE[tiling.over],
        where=_where(x_BTD, kernel),
        tiling=tiling,
        scale=1.0 / targets_BT.size,
    )
    per_token = (targets_BT,) if weights_BT is None else (targets_BT, weights_BT)
    stored = Stored(("embed", "vocab"))
    losses, dx_BTD, dkernel_DV = per_shard(
        body,
        *(x_BTD, kernel, *per_token),
        in_axes=(
            *(("batch", "seq", None), stored),
            *(("batch", "seq") for _ in per_token),
        ),
        out_axes=(("batch",), ("batch", "seq", None), stored),
    )
    return jnp.sum(losses), dx_BTD, dkernel_DV


class _Where(NamedTuple):
    """Mesh axes that split the vocabulary and the sequences, that the stored head is
    gathered over, and that its gradient is summed over beside."""

    vocab: tuple[str, ...]
    seq: tuple[str, ...]
    gathered: tuple[str, ...]
    summed: tuple[str, ...]


def _where(x_BTD: jax.Array, kernel_DV: jax.Array) -> _Where:
    (B, T, D), V = x_BTD.shape, kernel_DV.shape[1]
    seq = mesh_axes_of("seq", T)
    tokens = (*mesh_axes_of("batch", B), *seq)
    gathered = mesh_axes_of("embed", D, stored=True)
    return _Where(
        vocab=mesh_axes_of("vocab", V),
        seq=seq,
        gathered=gathered,
        summed=tuple(axis for axis in tokens if axis not in gathered),
    )


def _gathered(kernel_dv: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    if not mesh_axes:
        return kernel_dv
    return jax.lax.all_gather(kernel_dv, mesh_axes, axis=0, tiled=True)


def _scattered(dkernel_Dv: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    if not mesh_axes:
        return dkernel_Dv
    return jax.lax.psum_scatter(dkernel_Dv, mesh_axes, scatter_dimension=0, tiled=True)


# --- tiles of tokens ---


def _tokens_of_one_device(
    x_btD: jax.Array,
    kernel_dv: jax.Array,
    targets_bt: jax.Array,
    *weights: jax.Array,
    where: _Where,
    tiling: Tiling,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss [1], feature gradients [b, t, D], stored kernel gradients [d, v]."""
    kernel_Dv = _gathered(kernel_dv, where.gathered)
    D, v, n = x_btD.shape[-1], kernel_Dv.shape[1], targets_bt.size
    tiles = _next_divisor(n, tiling.tiles)
    first = jax.lax.axis_index(where.vocab) * v if where.vocab else 0

    def tile(
        sums: tuple[jax.Array, jax.Array],
        part: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x_mD, targets_m, scale_m = part
        logits_mv = _logits("mD,Dv->mv", x_mD, kernel_Dv, tiling)
        seen = _seen(logits_mv, targets_m, first)
        loss_m, log_sum_m = _total(seen, where.vocab)
        dlogits_mv = _dlogits(logits_mv, log_sum_m, targets_m, first, scale_m, tiling)
        dlogits_mv = dlogits_mv.astype(kernel_Dv.dtype)
        dx_mD = _product("mv,Dv->mD", dlogits_mv, kernel_Dv).astype(x_mD.dtype)
        dkernel_Dv = _product("mD,mv->Dv", x_mD, dlogits_mv)
        summed = (sums[0] + jnp.sum(loss_m * scale_m), sums[1] + dkernel_Dv)
        return summed, _over(jax.lax.psum, dx_mD, where.vocab)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros(kernel_Dv.shape, jnp.float32))
    parts = (
        x_btD.reshape(tiles, n // tiles, D),
        targets_bt.reshape(tiles, n // tiles),
        _scales(targets_bt, weights, scale).reshape(tiles, n // tiles),
    )
    (loss, dkernel_Dv), dx_kmD = jax.lax.scan(tile, zero, parts)
    dkernel_dv = _scattered(dkernel_Dv.astype(kernel_Dv.dtype), where.gathered)
    dkernel_dv = _over(jax.lax.psum, dkernel_dv, where.summed)
    loss = _over(jax.lax.psum, loss, where.seq)
    return loss[None], dx_kmD.reshape(x_btD.shape), dkernel_dv


# --- tiles of the vocabulary ---


def _vocab_of_one_device(
    x_btD: jax.Array,
    kernel_dv: jax.Array,
    targets_bt: jax.Array,
    *weights: jax.Array,
    where: _Where,
    tiling: Tiling,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss [1], feature gradients [b, t, D], stored kernel gradients [d, v].

    Pass 1 finds each token's log-sum; pass 2 makes the logits again, and from them the
    gradients. The head is gathered, and its gradient scattered, tile by tile.
    """
    D, (d, v), n = x_btD.shape[-1], kernel_dv.shape, targets_bt.size
    tiles = _next_divisor(v, tiling.tiles)
    width = v // tiles
    scale_n = _scales(targets_bt, weights, scale)
    first = jax.lax.axis_index(where.vocab) * v if where.vocab else 0
    x_nD, targets_n = x_btD.reshape(n, D), targets_bt.reshape(n)
    kernel_kdw = jnp.moveaxis(kernel_dv.reshape(d, tiles, width), 1, 0)
    starts_k = first + jnp.arange(tiles) * width

    def look(seen: Carry, part: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
        kernel_dw, start = part
        kernel_Dw = _gathered(kernel_dw, where.gathered)
        logits_nw = _logits("nD,Dw->nw", x_nD, kernel_Dw, tiling)
        return _joined(seen, _seen(logits_nw, targets_n, start)), None

    def derive(
        dx_nD: jax.Array, part: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        kernel_dw, start = part
        kernel_Dw = _gathered(kernel_dw, where.gathered)
        logits_nw = _logits("nD,Dw->nw", x_nD, kernel_Dw, tiling)
        dlogits_nw = _dlogits(logits_nw, log_sum_n, targets_n, start, scale_n, tiling)
        dlogits_nw = dlogits_nw.astype(kernel_Dw.dtype)
        dx_nD += _product("nw,Dw->nD", dlogits_nw, kernel_Dw)
        dkernel_Dw = jnp.einsum("nD,nw->Dw", x_nD, dlogits_nw)
        return dx_nD, _scattered(dkernel_Dw, where.gathered)

    nothing = (
        jnp.full((n,), -jnp.inf, jnp.float32),
        jnp.zeros((n,), jnp.float32),
        jnp.zeros((n,), jnp.float32),
    )
    seen, _ = jax.lax.scan(look, nothing, (kernel_kdw, starts_k))
    loss_n, log_sum_n = _total(seen, where.vocab)
    # Without the barrier the second pass could find the logits of the first, and keep.
    zero, kernel_kdw = jax.lax.optimization_barrier(
        (jnp.zeros((n, D), jnp.float32), kernel_kdw)
    )
    dx_nD, dkernel_kdw = jax.lax.scan(derive, zero, (kernel_kdw, starts_k))
    dx_nD = _over(jax.lax.psum, dx_nD.astype(x_btD.dtype), where.vocab)
    dkernel_dv = jnp.moveaxis(dkernel_kdw, 0, 1).reshape(d, v)
    dkernel_dv = _over(jax.lax.psum, dkernel_dv, where.summed)
    loss = _over(jax.lax.psum, jnp.sum(loss_n * scale_n), where.seq)
    return loss[None], dx_nD.reshape(x_btD.shape), dkernel_dv


_OF_ONE_DEVICE = {"tokens": _tokens_of_one_device, "vocab": _vocab_of_one_device}


# --- one tile ---


def _scales(
    targets_bt: jax.Array, weights: tuple[jax.Array, ...], scale: float
) -> jax.Array:
    """What each token's loss is multiplied with, float32 [n]."""
    if not weights:
        return jnp.full((targets_bt.size,), scale, jnp.float32)
    return weights[0].reshape(-1) * jnp.float32(scale)


def _logits(formula: str, x: jax.Array, kernel: jax.Array, tiling: Tiling) -> jax.Array:
    return capped(_product(formula, x, kernel), tiling.softcap)


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _seen(logits_mv: jax.Array, targets_m: jax.Array, start: Any) -> Carry:
    """Largest logit, sum of exp(logit - largest), and the target's logit or 0: [m]."""
    top_m = jnp.max(logits_mv, axis=-1)
    sum_m = jnp.sum(jnp.exp(logits_mv - top_m[:, None]), axis=-1)
    chosen_m = jnp.sum(
        jnp.where(_is_target(targets_m, logits_mv.shape[1], start), logits_mv, 0.0),
        axis=-1,
    )
    return top_m, sum_m, chosen_m


def _joined(a: Carry, b: Carry) -> Carry:
    """What was seen of two parts of the vocabulary."""
    top = jnp.maximum(a[0], b[0])
    total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
    return top, total, a[2] + b[2]


def _total(seen: Carry, vocab_over: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Loss and log-sum [m] of what was seen, over all parts of the vocabulary."""
    top_m, sum_m, chosen_m = seen
    highest_m = _over(jax.lax.pmax, top_m, vocab_over)
    sum_m = _over(jax.lax.psum, sum_m * jnp.exp(top_m - highest_m), vocab_over)
    log_sum_m = jnp.log(sum_m) + highest_m
    return log_sum_m - _over(jax.lax.psum, chosen_m, vocab_over), log_sum_m


def _dlogits(
    logits_mv: jax.Array,
    log_sum_m: jax.Array,
    targets_m: jax.Array,
    start: Any,
    scale_m: jax.Array,
    tiling: Tiling,
) -> jax.Array:
    """The gradient by logits as the head gives them; `logits_mv` are capped."""
    is_target_mv = _is_target(targets_m, logits_mv.shape[1], start)
    p_mv = jnp.exp(logits_mv - log_sum_m[:, None])
    dlogits_mv = (p_mv - is_target_mv.astype(jnp.float32)) * scale_m[:, None]
    if tiling.softcap is None:
        return dlogits_mv
    return dlogits_mv * (1 - jnp.square(logits_mv / tiling.softcap))


def _is_target(targets_m: jax.Array, v: int, start: Any) -> jax.Array:
    return (targets_m[:, None] - start) == jnp.arange(v)[None, :]


def _over(sum_over: Any, value: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    result: jax.Array = sum_over(value, mesh_axes) if mesh_axes else value
    return result


def _next_divisor(number: int, wanted: int) -> int:
    """The smallest divisor of `number` that is at least `wanted`."""
    wanted = min(wanted, number)
    return next(d for d in range(wanted, number + 1) if number % d == 0)
