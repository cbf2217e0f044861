"""One training step as a pure function: loss, gradients, accumulation, update.

B sequences, T tokens, M microbatches. Nothing here knows a mesh: lowering shards it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmos_jax.ir import Quantization, Way
from llmos_jax.models import Params, Pass, Routing, Skeleton, token_order
from llmos_jax.models.matrices import MATRIX_PATHS, as_stored
from llmos_jax.training.lesson import LESSON_LOSSES, Guide, Lesson
from llmos_jax.training.loss import Tiling, tiled_loss, token_losses
from llmos_jax.training.pipeline import Job, pipelined
from llmos_jax.training.router import (
    NO_ROUTER_LOSS,
    ROUTER_METRICS,
    RouterWeights,
    router_losses,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Values = tuple[jax.Array, Metrics]
"""The loss, and what else a step is measured by."""


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
    way: Way,
) -> jax.Array:
    """Mean next-token loss of a batch, in nats, with weights cast to compute_dtype."""
    return _mean_loss(skeleton, params, batch, compute_dtype, way)[0]


def train_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: str,
    way: Way,
    router_weights: RouterWeights = NO_ROUTER_LOSS,
    lesson: Lesson | None = None,
    stored_as: Quantization | None = None,
    keep_zeros: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the function (state, batch) -> (state, metrics) that runs `way`.

    The metrics of a model with experts have its routers' beside `loss`, which is that
    of the next token alone. Where a batch has "weights", it is the weighted mean. What
    is frozen (beside LoRA's factors) has no gradient and stays as it is.

    Args:
        skeleton: the model.
        optimizer: of what is trained.
        compute_dtype: in which weights are multiplied.
        way: how.
        router_weights: of the losses of routers.
        lesson: what is learnt beside the text: `loss` is then all of it, and the
            metrics have its parts; a teacher in the step is a third argument.
        stored_as: compute with matrices as they will be stored; gradients go straight
            through the rounding (arXiv 1308.3432): they are those of the rounded model,
            for what it is rounded from.
        keep_zeros: weights of the layers' matrices that are 0 stay 0.
    """

    def objective(
        trained: Params, frozen: Params, batch: Batch, guide: Guide | None
    ) -> tuple[jax.Array, Values]:
        params = {**frozen, **trained}
        model, features_BTD, routing = _seen(
            skeleton, params, batch, compute_dtype, way
        )
        found: Metrics = {}
        if guide is None:
            loss = _head_loss(model, features_BTD, batch, way)
        else:
            loss, found = guide(model, features_BTD, batch)
        if routing is None:
            return loss, (loss, found)
        extra, figures = router_losses(routing, router_weights)
        return loss + extra, (loss, figures | found)

    def value_and_grad(
        params: Params, batch: Batch, guide: Guide | None
    ) -> tuple[Values, Params]:
        both = jax.value_and_grad(objective, has_aux=True)
        trained = trained_of(skeleton, params)
        (_, values), gradients = both(trained, params, batch, guide)
        return values, gradients

    figures = (*(ROUTER_METRICS if skeleton.spec.num_experts else ()),
               *(LESSON_LOSSES if lesson else ()))  # fmt: skip

    job = Job(
        *(skeleton, way, how_of(way), compute_dtype),
        loss=functools.partial(_head_loss, way=way),
        router_weights=router_weights,
    )

    def whole(
        params: Params, batch: Batch, guide: Guide | None
    ) -> tuple[Values, Params]:
        if way.mesh.stage > 1:
            return pipelined(job, params, batch)
        zero = jnp.zeros((), jnp.float32)
        nothing = (zero, dict.fromkeys(figures, zero))
        trained = trained_of(skeleton, params)
        guided = functools.partial(value_and_grad, guide=guide)
        return accumulated(guided, params, batch, way, nothing, trained)

    def step(
        state: TrainState, batch: Batch, teacher: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        batch = in_token_order(evened(batch))
        guide = None if lesson is None else lesson.guide(state.step, way, teacher)
        used = state.params if stored_as is None else as_stored(state.params, stored_as)
        (loss, others), gradients = whole(used, batch, guide)
        trained = trained_of(skeleton, state.params)
        if keep_zeros:
            gradients = where_not_lost(gradients, trained)
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        if keep_zeros:
            updates = where_not_lost(updates, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **others}
        if lesson is not None:
            names = ("kd_weight", "kd_temperature")
            metrics |= dict(zip(names, lesson.settings(state.step)))
        return TrainState(state.step + 1, params, moments), metrics

    return step


def _mean_loss(
    skeleton: Skeleton, params: Params, batch: Batch, compute_dtype: str, way: Way
) -> tuple[jax.Array, Routing | None]:
    """`mean_loss`, and what each layer's router did."""
    model, features_BTD, routing = _seen(skeleton, params, batch, compute_dtype, way)
    return _head_loss(model, features_BTD, batch, way), routing


def _seen(
    skeleton: Skeleton, params: Params, batch: Batch, compute_dtype: str, way: Way
) -> tuple[Any, jax.Array, Routing | None]:
    """The model, what its head takes, and what each layer's router did."""
    model = skeleton.bind(skeleton.cast(params, compute_dtype))
    features_BTD, routing = model.routed_features(
        batch["inputs"], batch.get("segments"), how_of(way)
    )
    return model, features_BTD, routing


def where_not_lost(changes: Params, params: Params) -> Params:
    """Changes of parameters, none where a matrix of the layers has a 0."""
    return {
        path: jnp.where(params[path] == 0, jnp.zeros((), x.dtype), x)
        if path in MATRIX_PATHS
        else x
        for path, x in changes.items()
    }


def _head_loss(
    model: Any, features_BTD: jax.Array, batch: Batch, way: Way
) -> jax.Array:
    targets_BT, weights_BT = batch["targets"], batch.get("weights")
    if way.loss_tiles == 1:
        losses_BT = token_losses(model.logits(features_BTD), targets_BT)
        return jnp.mean(losses_BT if weights_BT is None else losses_BT * weights_BT)
    kernel, axes = model.head_kernel()
    tiling = Tiling(axes, way.loss_tiles, way.loss_over, model.spec.logit_softcap)
    return tiled_loss(features_BTD, kernel, targets_BT, weights_BT, tiling)


def trained_of(skeleton: Skeleton, params: Params) -> Params:
    """The parameters that training changes."""
    return {path: params[path] for path in skeleton.table.trained}


def evened(batch: Batch) -> Batch:
    """Make the mean weight 1: plain means over parts of a batch then add up to the
    weighted mean over all of it."""
    if "weights" not in batch:
        return batch
    weights_BT = batch["weights"]
    mean = jnp.maximum(jnp.mean(weights_BT), jnp.float32(1e-9))
    return {**batch, "weights": weights_BT / mean}


def in_token_order(batch: Batch) -> Batch:
    """Put tokens in the order in which a mesh that splits sequences wants them."""
    order = token_order(batch["inputs"].shape[1])
    if order is None:
        return batch
    # In slices, which any partitioner can split; a lookup it may not (XLA aborts on one
    # beside mesh axes that are manual).
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(order, breaks)]
    return {
        name: jnp.concatenate([x_BT[:, start:end] for start, end in runs], axis=1)
        for name, x_BT in batch.items()
    }


def how_of(way: Way) -> Pass:
    """How a way runs the layers."""
    return Pass(way.remat, way.offload, way.unrolled, way.context_exchange)


def accumulated(
    value_and_grad: Callable[[Params, Batch], tuple[Any, Params]],
    params: Params,
    batch: Batch,
    way: Way,
    nothing: Any = None,
    trained: Params | None = None,
) -> tuple[Any, Params]:
    """Mean value and gradient over M equal parts of the batch, one after another.

    Row b goes to part b mod M, so each part keeps an equal share of every device's rows
    and no row moves. A value is a float32 scalar, or a tree of them with zeros like
    `nothing`; gradients are like `trained`, or like all parameters.
    """
    microbatches = way.microbatches
    if microbatches == 1:
        return value_and_grad(params, batch)

    def parts(x_BT: jax.Array) -> jax.Array:
        B, *rest = x_BT.shape
        return x_BT.reshape(B // microbatches, microbatches, *rest).swapaxes(0, 1)

    def add(total: tuple[Any, Params], part: Batch) -> tuple[tuple[Any, Params], None]:
        value = jax.tree.map(
            lambda sum_, x: sum_ + x.astype(sum_.dtype),
            total,
            value_and_grad(params, part),
        )
        return value, None

    dtype = jnp.dtype(way.gradient_dtype)
    like = params if trained is None else trained
    zero = (
        jnp.zeros((), jnp.float32) if nothing is None else nothing,
        jax.tree.map(lambda x: jnp.zeros_like(x, dtype), like),
    )
    total, _ = jax.lax.scan(add, zero, jax.tree.map(parts, batch))
    mean = jax.tree.map(lambda x: x / microbatches, total)
    return mean[0], jax.tree.map(lambda x, p: x.astype(p.dtype), mean[1], like)
