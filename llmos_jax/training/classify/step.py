"""One training step of a classifier, and one that scores: pure functions.

B sequences, T tokens, C classes. Batches are {"inputs" [B, T], "lengths", "labels",
"weights" [B, 1]}; a row that only fills the batch has weight 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from llmos_jax.ir import Way
from llmos_jax.models import Noise, Params, Skeleton
from llmos_jax.training.step import (
    Batch,
    Metrics,
    TrainState,
    accumulated,
    evened,
    how_of,
    trained_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLesson:
    """What is asked of a classifier in training."""

    dropout: float
    word_dropout: float
    label_smoothing: float
    class_weights: tuple[float, ...]
    """What a text of each class counts, 1 on average."""
    seed: int


def class_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: str,
    way: Way,
    lesson: ClassLesson,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function (state, batch) -> (state, metrics); metrics have `loss`,
    `accuracy` and `grad_norm`. The noise of a step depends on its number alone."""

    def objective(
        trained: Params, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        noise = Noise(key, lesson.dropout, lesson.word_dropout)
        logits_BC = class_logits(
            *(skeleton, {**frozen, **trained}, batch, compute_dtype, way), noise
        )
        loss_B, right_B = _judged(logits_BC, batch, lesson)
        weight_B = batch["weights"][:, 0]
        loss = jnp.mean(loss_B * weight_B)
        return loss, (loss, {"accuracy": jnp.mean(right_B * batch["rows"][:, 0])})

    def value_and_grad(
        key: jax.Array, params: Params, batch: Batch
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        both = jax.value_and_grad(objective, has_aux=True)
        (_, values), gradients = both(trained_of(skeleton, params), params, batch, key)
        return values, gradients

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = _weighed(batch, lesson)
        key = jax.random.fold_in(jax.random.key(lesson.seed), state.step)
        trained = trained_of(skeleton, state.params)
        zero = jnp.zeros((), jnp.float32)
        (loss, others), gradients = accumulated(
            functools.partial(value_and_grad, key),
            *(state.params, batch, way, (zero, {"accuracy": zero}), trained),
        )
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **others}
        return TrainState(state.step + 1, params, moments), metrics

    return step


def class_sums(
    skeleton: Skeleton, *, compute_dtype: str, way: Way
) -> Callable[[Params, Batch], jax.Array]:
    """Return (params, batch) -> float32 [B, C]: log-probabilities of the classes."""

    def scored(params: Params, batch: Batch) -> jax.Array:
        logits_BC = class_logits(skeleton, params, batch, compute_dtype, way)
        return jax.nn.log_softmax(logits_BC, axis=-1)

    return scored


def class_logits(
    skeleton: Skeleton,
    params: Params,
    batch: Batch,
    compute_dtype: str,
    way: Way,
    noise: Noise | None = None,
) -> jax.Array:
    """float32 [B, C] of a batch."""
    model = skeleton.bind(skeleton.cast(params, compute_dtype))
    taken = (batch["inputs"], batch["lengths"][:, 0], noise)
    how = (how_of(way),) if skeleton.has_decoder else ()
    logits_BC: jax.Array = model.class_logits(*taken, *how)
    return logits_BC


def _judged(
    logits_BC: jax.Array, batch: Batch, lesson: ClassLesson
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy with smoothed labels, and whether the best guess is right: [B]."""
    label_B, smoothing = batch["labels"][:, 0], lesson.label_smoothing
    C = logits_BC.shape[1]
    is_label_BC = (label_B[:, None] == jnp.arange(C)[None]).astype(jnp.float32)
    target_BC = is_label_BC * (1 - smoothing) + smoothing / C
    loss_B = -jnp.sum(target_BC * jax.nn.log_softmax(logits_BC, axis=-1), axis=-1)
    return loss_B, (jnp.argmax(logits_BC, axis=-1) == label_B).astype(jnp.float32)


def _weighed(batch: Batch, lesson: ClassLesson) -> Batch:
    """Rows counted by themselves, and by their class; each 1 on average."""
    weights_C = jnp.asarray(lesson.class_weights, jnp.float32)
    label_B1 = batch["labels"]
    is_label_BC = label_B1 == jnp.arange(weights_C.size)[None]
    by_class_B1 = jnp.sum(
        jnp.where(is_label_BC, weights_C[None], jnp.float32(0)), axis=1, keepdims=True
    )
    rows = evened(batch)["weights"]
    weights = evened({**batch, "weights": batch["weights"] * by_class_B1})["weights"]
    return {**batch, "weights": weights, "rows": rows}
