"""gpipe and circular: everything forward, and JAX derives the way back.

B sequences, T tokens, D model; M microbatches of b sequences; P stages, R rounds of l
layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.models import Params
from llmos_jax.training.pipeline.deal import dealt
from llmos_jax.training.pipeline.stage import (
    AXIS,
    Batch,
    Job,
    Model,
    by_part,
    layers_of,
    parts_of,
    passed_on,
    picked,
    scattered,
    shares_of,
    through,
    zeros,
)


class Weights(NamedTuple):
    """One stage's weights: in compute dtype, and where their gradients are summed."""

    job: Job
    cast: Params
    """Layers as [R, l, ...] where there are several rounds."""
    sums: Params | None
    """Like `cast`, never read: gradients are taken with respect to these, in their own
    dtype; as those of weights they would be summed over ticks in bfloat16."""

    def at(self, round_: jax.Array | int = 0) -> Model:
        """The model whose layers are those of a round."""
        return self.job.bind(
            {
                path: self._one(path, x, round_, self.job.way.rounds)
                for path, x in self.cast.items()
            }
        )

    def _one(self, path: str, x: jax.Array, round_: Any, rounds: int) -> jax.Array:
        sums = None if self.sums is None else self.sums.get(path)
        if rounds > 1 and path in layers_of(self.job.skeleton.table):
            x = jax.lax.dynamic_index_in_dim(x, round_, keepdims=False)
            if sums is not None:
                sums = jax.lax.dynamic_index_in_dim(sums, round_, keepdims=False)
        return x if sums is None else _lent(sums, x)


@jax.custom_vjp
def _lent(sums: jax.Array, x: jax.Array) -> jax.Array:
    """x, whose gradient goes to `sums`."""
    del sums
    return x


def _lent_forward(sums: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, jnp.zeros((0,), sums.dtype)


def _lent_backward(like: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dx.astype(like.dtype), jnp.zeros_like(dx)


_lent.defvjp(_lent_forward, _lent_backward)


def all_forward(
    job: Job, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array, Params]:
    """This stage's share of the loss, its figures [M, 3], its gradients."""
    assert job.loss is not None
    learnt_by, P, M = job.loss, jax.lax.axis_size(AXIS), job.way.microbatches
    cast = _dealt(job, job.cast(params))

    def objective(sums: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weights = Weights(job, cast, _dealt(job, sums))
        features, added, figures = features_of(job, weights, batch)
        model = weights.at()
        loss = learnt_by(model, model.final_norm(features), shares_of(batch)) / P
        return loss + added / M, (loss, figures)

    sums = zeros(job, params)
    (_, (loss, figures)), gradients = jax.value_and_grad(objective, has_aux=True)(sums)
    return loss, figures, gradients


def _dealt(job: Job, params: Params) -> Params:
    """Layers as [R, l, ...], those of round r being the (r P + stage)-th chunk."""
    R, layers = job.way.rounds, layers_of(job.skeleton.table)
    if R == 1:
        return params
    return {path: dealt(x, R) if path in layers else x for path, x in params.items()}


def features_of(
    job: Job, weights: Weights, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features [B, T/P, D] of this stage's share of the tokens, what its routers add to
    the loss (a sum over microbatches), and their figures [M, 3]."""
    P, at = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    M, R = job.way.microbatches, job.way.rounds
    tokens = parts_of(batch, M)
    _, b, T = tokens["inputs"].shape
    D = job.skeleton.spec.embed_dim

    def tick(
        carry: tuple[jax.Array, jax.Array], t: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        arrived_bTD, kept_bMtD = carry
        here, out = _place(t - at, P, M, R), _place(t - (P - 1), P, M, R)
        model = weights.at(here.round)
        is_new = (at == 0) & (here.round == 0)
        made = through(job, model, arrived_bTD, is_new, picked(tokens, here.part))
        is_done = out.is_real & (out.round == R - 1)
        share_btD = scattered(made.y_bTD, at == P - 1)
        slot = jnp.where(is_done, out.part, M)  # the last slot is for nothing
        kept_bMtD = jax.lax.dynamic_update_index_in_dim(
            kept_bMtD, share_btD, slot, axis=1
        )
        return (passed_on(made.y_bTD), kept_bMtD), (
            made.masked(here.is_real),
            here.part,
        )

    dtype = jnp.dtype(job.compute_dtype)
    start = (jnp.zeros((b, T, D), dtype), jnp.zeros((b, M + 1, T // P, D), dtype))
    (_, kept_bMtD), (routed, part) = jax.lax.scan(
        tick, start, jnp.arange(R * M + P - 1)
    )
    features = kept_bMtD[:, :M].reshape(b * M, T // P, D)
    return features, jnp.sum(routed.added), by_part(routed.figures, part, M)


class _Place(NamedTuple):
    """What a stage does at a tick."""

    part: jax.Array
    """The microbatch."""
    round: jax.Array
    is_real: jax.Array


def _place(turn: jax.Array, P: int, M: int, R: int) -> _Place:
    """What is done at a stage's `turn`-th tick since the first microbatch came.

    P microbatches at a time go round R times: when the last stage passes one on, it
    comes to the first stage at the very tick that takes it.
    """
    is_real = (turn >= 0) & (turn < R * M)
    turn = jnp.clip(turn, 0, R * M - 1)
    if R == 1:
        return _Place(turn, jnp.zeros_like(turn), is_real)
    group, inside = turn // (P * R), turn % (P * R)
    return _Place(group * P + inside % P, inside // P, is_real)
