"""Optimizers against their formulas, step by step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import driver, models, training
from llmos_jax.config import load_config

SGD = ("train.optimizer=sgd", "train.warmup_steps=0", "train.learning_rate=0.5")
GRADIENT = 0.01


@pytest.fixture(scope="module")
def skeleton(tiny):
    return models.skeleton(tiny)


def stepped(skeleton, *texts):
    """(parameters before, after, gradients, state) of one step along GRADIENT."""
    config = load_config(None, ["model=tiny", *texts]).config.train
    optimizer = training.make_optimizer(config, skeleton.table)
    params = skeleton.init(jax.random.key(0))
    gradients = jax.tree.map(lambda x: jnp.full_like(x, GRADIENT), params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    return params, jax.tree.map(jnp.add, params, updates), state


def test_plain_descent_is_the_rate_times_the_gradient(skeleton):
    """No decay, no momentum; and `inf` clips nothing."""
    params, after, _ = stepped(skeleton, *SGD, "train.clip_norm=inf")
    for path, value in params.items():
        wanted = np.asarray(value) - 0.5 * GRADIENT
        np.testing.assert_allclose(after[path], wanted, atol=1e-6, err_msg=path)


def test_plain_descent_is_clipped_by_the_norm_of_all_gradients(skeleton):
    params, after, _ = stepped(skeleton, *SGD, "train.clip_norm=0.1")
    moved = sum(float(jnp.sum((after[path] - params[path]) ** 2)) for path in params)
    # 100 k differences of float32 numbers near 1.
    assert np.sqrt(moved) == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_plain_descent_keeps_no_moments_and_is_planned_without(skeleton):
    _, _, state = stepped(skeleton, *SGD)
    assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(state))
    asked = ["model=tiny", "topology=cpu:1", "batch.seq_len=32"]
    moments = [
        driver.plan(load_config(None, [*asked, *texts]).config).predicted.memory
        for texts in ((), SGD)
    ]
    assert moments[0]["optimizer"] > moments[1]["optimizer"] == 0


def test_plain_descent_warms_up_and_cools_as_adam_does(skeleton):
    params, after, _ = stepped(skeleton, *SGD, "train.warmup_steps=10")
    assert all((after[path] == params[path]).all() for path in params)
