"""The optimizer of a config, from Optax: AdamW, or plain gradient descent; each with
linear warm-up, cosine decay of its rate, and clipping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from llmos_jax.config.schema import TrainSection
from llmos_jax.ir import ParamTable


def learning_rate(config: TrainSection) -> optax.Schedule:
    """Warm up linearly to `learning_rate`, then fall along a cosine to its floor."""
    warmup = min(config.warmup_steps, max(config.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.learning_rate * config.min_learning_rate_ratio,
    )


def make_optimizer(
    config: TrainSection, table: ParamTable, state_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Return clip -> Adam -> decoupled weight decay -> learning rate.

    `train.optimizer = "sgd"` leaves Adam and the decay out, and keeps no moments.
    Moments are computed in float32 and kept in `state_dtype` between steps. Decay
    touches matrices only: a norm's scale or a bias has nothing to be regularised
    towards 0. What is frozen has no moments; `init` takes all parameters, `update`
    those that are trained.
    """
    decayed = {
        row.path: _is_matrix(row.path, row.axes)
        for row in table.rows
        if not row.is_frozen
    }
    adam = (
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        *(adam if config.optimizer == "adamw" else ()),
        optax.scale_by_learning_rate(learning_rate(config)),
    )

    def kept(state: optax.OptState, dtype: str) -> optax.OptState:
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def init(params: optax.Params) -> optax.OptState:
        trained = {path: params[path] for path in table.trained}
        return kept(inner.init(trained), state_dtype)

    def update(
        gradients: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        # Optax mixes its int32 step count with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = inner.update(gradients, kept(state, "float32"), params)
        return updates, kept(state, state_dtype)

    return optax.GradientTransformation(init, update)


def _is_matrix(path: str, axes: tuple[str | None, ...]) -> bool:
    return "norm" not in axes and not path.endswith(("_bias", "_norm.scale"))
