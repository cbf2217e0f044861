"""What one stage of a pipeline does with one microbatch, and how it hands it on.

All of it runs inside `along(("stage",), ...)`: arrays are one stage's, collectives go
over the stages. B sequences, T tokens, D model; M microbatches of b sequences; P
stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmos_jax.ir import ParamTable, Way
from llmos_jax.models import Params, Pass, Skeleton, annotate, per_shard
from llmos_jax.training.router import (
    NO_ROUTER_LOSS,
    ROUTER_METRICS,
    RouterWeights,
    router_losses,
)

AXIS = "stage"
Batch = dict[str, jax.Array]
Model = Any
Loss = Callable[[Model, jax.Array, Batch], jax.Array]
"""(model, features [B, T, D], batch of as many tokens) -> mean loss."""


class Job(NamedTuple):
    """What a pipeline computes, beside its arrays."""

    skeleton: Skeleton
    way: Way
    how: Pass
    compute_dtype: str
    loss: Loss | None = None
    """None where nothing is learnt."""
    router_weights: RouterWeights = NO_ROUTER_LOSS

    def bind(self, params: Params) -> Model:
        """The module that computes with `params`."""
        return self.skeleton.bind(params)

    def cast(self, params: Params) -> Params:
        """Parameters as they are computed with."""
        return self.skeleton.cast(params, self.compute_dtype)


# --- its layers ---


class Routed(NamedTuple):
    """What the routers of a chunk of layers did with a microbatch."""

    added: jax.Array
    """To the loss."""
    figures: jax.Array
    """[3]: this chunk's share of two means over layers, and its busiest expert."""


class Made(NamedTuple):
    """What a chunk of layers made of a microbatch."""

    y_bTD: jax.Array
    added: jax.Array
    figures: jax.Array

    def masked(self, is_real: jax.Array) -> Routed:
        """What its routers did, or nothing where it was no microbatch."""
        nothing = jnp.float32(0)
        return Routed(
            jnp.where(is_real, self.added, nothing),
            jnp.where(is_real, self.figures, nothing),
        )


def through(
    job: Job, model: Model, arrived_bTD: jax.Array, is_new: jax.Array, some: Batch
) -> Made:
    """Send what arrived, or tokens that are new to the pipeline, through the layers."""
    tokens_bT = some["inputs"]
    arrived_bTD = annotate(arrived_bTD, "batch", "residual", "embed")
    x_bTD = jnp.where(is_new, model.embedded(tokens_bT), arrived_bTD)
    sight = model.sight(tokens_bT.shape, None, some.get("segments"), job.how.exchange)
    y_bTD, _, routing = model.through(model.stack, x_bTD, sight, how=job.how)
    if routing is None:
        return Made(y_bTD, jnp.zeros((), jnp.float32), jnp.zeros((3,), jnp.float32))
    added, named = router_losses(routing, job.router_weights)
    balance, z, load = (named[name] for name in ROUTER_METRICS)
    share = jnp.float32(routing.square.size / job.skeleton.spec.num_layers)
    return Made(y_bTD, added, jnp.stack([balance * share, z * share, load]))


def by_part(figures_t3: jax.Array, part_t: jax.Array, M: int) -> jax.Array:
    """[M, 3]: sums, and in the last column maxima, over a microbatch's ticks."""
    nothing = jnp.zeros((M, 2), jnp.float32)
    sums = nothing.at[part_t].add(figures_t3[:, :2])
    load = nothing[:, :1].at[part_t].max(figures_t3[:, 2:])
    return jnp.concatenate([sums, load], axis=1)


def joined(job: Job, figures_M3: jax.Array) -> dict[str, jax.Array]:
    """Means over microbatches of what all stages' routers did."""
    if not job.skeleton.spec.num_experts:
        return {}
    means = jnp.mean(jax.lax.psum(figures_M3[:, :2], AXIS), axis=0)
    load = jnp.mean(jax.lax.pmax(figures_M3[:, 2], AXIS))
    return dict(zip(ROUTER_METRICS, (means[0], means[1], load), strict=True))


# --- who has what ---


@functools.cache
def layers_of(table: ParamTable) -> frozenset[str]:
    """Parameters that are stacked layers."""
    return frozenset(row.path for row in table.rows if row.axes[0] == "layers")


def split_of(table: ParamTable) -> dict[str, PartitionSpec]:
    """A stage has its layers, and all of everything else."""
    layers = layers_of(table)
    return {
        row.path: PartitionSpec(AXIS) if row.path in layers else PartitionSpec()
        for row in table.rows
    }


def zeros(job: Job, params: Params) -> Params:
    """Where gradients are summed: of what is trained."""
    dtype, trained = jnp.dtype(job.way.gradient_dtype), job.skeleton.table.trained
    return {path: jnp.zeros_like(params[path], dtype) for path in trained}


def passed_on(x: jax.Array, back: bool = False) -> jax.Array:
    """What the stage before has; going back, what the stage behind has."""
    P, step = jax.lax.axis_size(AXIS), -1 if back else 1
    pairs = [(source, (source + step) % P) for source in range(P)]
    arrived: jax.Array = jax.lax.ppermute(x, AXIS, pairs)
    return arrived


def parts_of(batch: Batch, M: int) -> Batch:
    """Arrays [M, b, T]: row r goes to part r mod M, so that none leaves its device."""
    return {
        name: x.reshape(x.shape[0] // M, M, x.shape[1]).swapaxes(0, 1)
        for name, x in batch.items()
    }


def picked(parts: Batch, index: jax.Array) -> Batch:
    """One microbatch, [b, T]."""
    return {
        name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        for name, x in parts.items()
    }


def share_of(x_BT: jax.Array) -> jax.Array:
    """[B, T/P]: this stage's tokens, every P-th."""
    P, at = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    x_BtP = x_BT.reshape(x_BT.shape[0], -1, P)
    return jax.lax.dynamic_index_in_dim(x_BtP, at, axis=2, keepdims=False)


def shares_of(batch: Batch) -> Batch:
    """`share_of` each array."""
    return {name: share_of(x_BT) for name, x_BT in batch.items()}


_SPLIT = ("batch", "residual", None)


def scattered(y_bTD: jax.Array, is_mine: jax.Array) -> jax.Array:
    """[b, T/P, D]: what the one stage where `is_mine` has, shared out."""

    def part(y_btD: jax.Array) -> jax.Array:
        P, (b, t, D) = jax.lax.axis_size(AXIS), y_btD.shape
        y_btPD = y_btD.reshape(b, t // P, P, D)
        return jax.lax.psum_scatter(y_btPD, AXIS, scatter_dimension=2)

    y_bTD = jnp.where(is_mine, y_bTD, jnp.zeros((), y_bTD.dtype))
    share: jax.Array = per_shard(part, y_bTD, in_axes=(_SPLIT,), out_axes=_SPLIT)
    return share


def gathered(y_btD: jax.Array) -> jax.Array:
    """[b, T, D] of every stage's [b, T/P, D]."""

    def part(y_btD: jax.Array) -> jax.Array:
        P, (b, t, D) = jax.lax.axis_size(AXIS), y_btD.shape
        return jax.lax.all_gather(y_btD, AXIS, axis=2).reshape(b, t * P, D)

    whole: jax.Array = per_shard(part, y_btD, in_axes=(_SPLIT,), out_axes=_SPLIT)
    return whole
