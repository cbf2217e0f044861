"""1f1b: each microbatch goes back as soon as it can.

T tokens, D model; M microbatches of b sequences; P stages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.models import Params
from llmos_jax.training.pipeline.stage import (
    AXIS,
    Batch,
    Job,
    Made,
    by_part,
    gathered,
    parts_of,
    passed_on,
    picked,
    scattered,
    shares_of,
    through,
    zeros,
)


class _Carry(NamedTuple):
    """What a stage has between two ticks."""

    arrived_bTD: jax.Array
    """From the stage before."""
    back_bTD: jax.Array
    """A gradient, from the stage behind."""
    stash: jax.Array
    """Inputs [2 P - 1, b, T, D] that wait for their way back."""
    loss: jax.Array
    gradients: Params


def one_forward_one_back(
    job: Job, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array, Params]:
    """This stage's share of the loss, its figures [M, 3], its gradients.

    At tick t stage s sends microbatch t - s forward and t - 2 (P - 1) + s back: at the
    last stage, the same one.
    """
    assert job.loss is not None
    learnt_by = job.loss
    P, at = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    M, slots = job.way.microbatches, 2 * P - 1
    cast, parts = job.cast(params), parts_of(batch, M)
    _, b, T = parts["inputs"].shape
    is_first, is_last = at == 0, at == P - 1

    def forward(carry: _Carry, t: jax.Array) -> tuple[_Carry, Made, Any]:
        part = jnp.clip(t - at, 0, M - 1)
        stash = jax.lax.dynamic_update_index_in_dim(
            carry.stash, carry.arrived_bTD, (t - at) % slots, axis=0
        )
        model = job.bind(cast)
        made = through(job, model, carry.arrived_bTD, is_first, picked(parts, part))
        is_real = (t >= at) & (t - at < M)
        carry = carry._replace(arrived_bTD=passed_on(made.y_bTD), stash=stash)
        return carry, made, (made.masked(is_real), part)

    def turn(carry: _Carry, t: jax.Array, made: Made) -> tuple[_Carry, jax.Array]:
        """The loss of what the last stage has just made, and its gradient."""
        share = shares_of(picked(parts, t - (P - 1)))

        def head(cast: Params, share_btD: jax.Array) -> jax.Array:
            model = job.bind(cast)
            return learnt_by(model, model.final_norm(share_btD), share)

        loss, way_back = jax.vjp(head, cast, scattered(made.y_bTD, is_last))
        dcast, dshare_btD = way_back(jnp.float32(1 / (M * P)))
        carry = carry._replace(
            loss=carry.loss + loss / (M * P), gradients=_sum(carry.gradients, dcast)
        )
        return carry, jnp.where(is_last, gathered(dshare_btD), carry.back_bTD)

    def backward(carry: _Carry, t: jax.Array, dy_bTD: jax.Array) -> _Carry:
        index = t - 2 * (P - 1) + at
        is_real = (index >= 0) & (index < M)
        some = picked(parts, jnp.clip(index, 0, M - 1))

        def again(cast: Params, x_bTD: jax.Array) -> tuple[jax.Array, jax.Array]:
            made = through(job, job.bind(cast), x_bTD, is_first, some)
            return made.y_bTD, made.added

        x_bTD = jax.lax.dynamic_index_in_dim(
            carry.stash, index % slots, axis=0, keepdims=False
        )
        _, way_back = jax.vjp(again, cast, x_bTD)
        dcast, dx_bTD = way_back(
            (
                jnp.where(is_real, dy_bTD, jnp.zeros((), dy_bTD.dtype)),
                jnp.where(is_real, jnp.float32(1 / M), jnp.float32(0)),
            )
        )
        return carry._replace(
            back_bTD=passed_on(dx_bTD, back=True),
            gradients=_sum(carry.gradients, dcast),
        )

    def warm_up(carry: _Carry, t: jax.Array) -> tuple[_Carry, Any]:
        carry, _, routed = forward(carry, t)
        return carry, routed

    def steady(carry: _Carry, t: jax.Array) -> tuple[_Carry, Any]:
        carry, made, routed = forward(carry, t)
        carry, dy_bTD = turn(carry, t, made)
        return backward(carry, t, dy_bTD), routed

    def drain(carry: _Carry, t: jax.Array) -> tuple[_Carry, None]:
        return backward(carry, t, carry.back_bTD), None

    size = (b, T, job.skeleton.spec.embed_dim)
    nothing = jnp.zeros(size, job.compute_dtype)
    carry = _Carry(
        arrived_bTD=nothing,
        back_bTD=nothing,
        stash=jnp.zeros((slots, *size), job.compute_dtype),
        loss=jnp.zeros((), jnp.float32),
        gradients=zeros(job, params),
    )
    carry, early = jax.lax.scan(warm_up, carry, jnp.arange(P - 1))
    carry, late = jax.lax.scan(steady, carry, P - 1 + jnp.arange(M))
    carry, _ = jax.lax.scan(drain, carry, P - 1 + M + jnp.arange(P - 1))
    routed, part = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)
    return carry.loss, by_part(routed.figures, part, M), carry.gradients


def _sum(total: Params, more: Params) -> Params:
    return {path: x + more[path].astype(x.dtype) for path, x in total.items()}
