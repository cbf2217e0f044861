"""One training step as a pure function: loss, gradients, accumulation, update.

B sequences, T tokens, M microbatches. Nothing here knows a mesh: lowering shards it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmos_jax.models import Params, Skeleton
from llmos_jax.training.loss import token_losses

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a step changes: step counter, float32 master weights, moments."""

    step: jax.Array
    params: Params
    optimizer: Any


def init_state(
    skeleton: Skeleton, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Draw a fresh state; jit it with shardings so that no device holds it whole."""
    params = skeleton.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def mean_loss(
    skeleton: Skeleton,
    params: Params,
    batch: Batch,
    *,
    compute_dtype: str,
    remat: str,
    unroll: bool = False,
) -> jax.Array:
    """Mean next-token loss of a batch, in nats, with weights cast to compute_dtype."""
    cast = {path: value.astype(compute_dtype) for path, value in params.items()}
    model = skeleton.bind(cast)
    features_BTD, _ = model.features(batch["inputs"], remat=remat, unroll=unroll)
    return jnp.mean(token_losses(model.logits(features_BTD), batch["targets"]))


def train_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: str,
    remat: str,
    microbatches: int,
    unroll: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function (state, batch) -> (state, metrics)."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        return mean_loss(
            skeleton,
            params,
            batch,
            compute_dtype=compute_dtype,
            remat=remat,
            unroll=unroll,
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        value, gradients = accumulated(
            jax.value_and_grad(loss), state.params, batch, microbatches
        )
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, moments), metrics

    return step


def accumulated(
    value_and_grad: Callable[[Params, Batch], tuple[jax.Array, Params]],
    params: Params,
    batch: Batch,
    microbatches: int,
) -> tuple[jax.Array, Params]:
    """Mean value and gradient over M equal parts of the batch, one after another.

    Row b goes to part b mod M, so each part keeps an equal share of every device's rows
    and no row moves.
    """
    if microbatches == 1:
        return value_and_grad(params, batch)

    def parts(x_BT: jax.Array) -> jax.Array:
        B, T = x_BT.shape
        return x_BT.reshape(B // microbatches, microbatches, T).swapaxes(0, 1)

    def add(
        total: tuple[jax.Array, Params], part: Batch
    ) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, jax.tree.map(parts, batch))
    return jax.tree.map(lambda x: x / microbatches, total)
