"""Run a training step as a pipeline: each position of mesh axis `stage` has its layers.

Every stage runs this same program, tick by tick: take a microbatch, send it through the
layers that are here, pass it on to the next stage (a collective permute). Ticks at
which a stage has nothing to do yet, or no more, compute on what is no microbatch and
are masked: with P stages, M microbatches and R rounds,

| schedule | ticks | of them idle | waiting for the backward pass |
|---|---|---|---|
| gpipe | M + P - 1, there and back | (P - 1) / (M + P - 1) | what M microbatches save |
| circular | R M + P - 1, of 1/R as many layers | (P - 1) / (R M + P - 1) | the same |
| 1f1b | P - 1 forward, M both, P - 1 back | (P - 1) / (M + P - 1) | inputs of 2 P - 1 |

In 1f1b a stage's backward pass runs its forward pass again from the input. The first
stage looks tokens up. The last one's output is scattered along the tokens, so that all
stages share the head and the loss: token t goes to stage t mod P.

B sequences, T tokens, D model; M microbatches of b sequences; l layers of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from llmos_jax.models import Params, along
from llmos_jax.training.pipeline.back import one_forward_one_back
from llmos_jax.training.pipeline.forward import Weights, all_forward, features_of
from llmos_jax.training.pipeline.stage import (
    AXIS,
    Batch,
    Job,
    Model,
    joined,
    layers_of,
    shares_of,
    split_of,
)


def pipelined(
    job: Job, params: Params, batch: Batch
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    """Return (loss, router figures) and gradients: means over the whole batch.

    Args:
        job: its way's mesh has stages, and a multiple of as many microbatches.
        params: float32, layers in their own order.
        batch: "inputs" and "targets" [B, T], and perhaps "segments".
    """
    run = one_forward_one_back if job.way.schedule == "1f1b" else all_forward
    layers, split = layers_of(job.skeleton.table), split_of(job.skeleton.table)

    def stage(params: Params, batch: Batch) -> Any:
        mean, figures, gradients = run(job, params, batch)
        gradients = {
            path: (x if path in layers else jax.lax.psum(x, AXIS)).astype(
                params[path].dtype
            )
            for path, x in gradients.items()
        }
        return (jax.lax.psum(mean, AXIS), joined(job, figures)), gradients

    whole = PartitionSpec()
    result: tuple[tuple[jax.Array, dict[str, jax.Array]], Params] = along(
        (AXIS,),
        stage,
        *(params, batch),
        in_split=(split, whole),
        out_split=(whole, {path: split[path] for path in job.skeleton.table.trained}),
    )
    return result


def pipelined_sums(
    job: Job,
    params: Params,
    batch: Batch,
    finish: Callable[[Model, jax.Array, Batch], jax.Array],
) -> jax.Array:
    """Send a batch forward only; return the sum over stages of what `finish` makes of
    each one's share.

    Args:
        job: its schedule does not matter.
        params: float32.
        batch: arrays [B, T].
        finish: takes (model, features [B, T/P, D] for the head, that share of the
            batch).
    """
    forward = job._replace(way=replace(job.way, schedule="gpipe", rounds=1))

    def stage(params: Params, batch: Batch) -> jax.Array:
        weights = Weights(forward, forward.cast(params), None)
        model, (features, _, _) = weights.at(), features_of(forward, weights, batch)
        features = model.final_norm(features)
        sums: jax.Array = finish(model, features, shares_of(batch))
        return jax.lax.psum(sums, AXIS)

    sums: jax.Array = along(
        (AXIS,),
        stage,
        *(params, batch),
        in_split=(split_of(job.skeleton.table), PartitionSpec()),
        out_split=PartitionSpec(),
    )
    return sums
