"""The step by its definitions: loss, schedule, decay, accumulation, scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, training
from llmos_jax.config.schema import TrainSection
from llmos_jax.data import TokenFile
from llmos_jax.ir import Way
from llmos_jax.training.step import accumulated

B, T = 8, 16


@pytest.fixture(scope="module")
def skeleton(tiny):
    return models.skeleton(tiny)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(0, 256, (B, T + 1)).astype("int32")
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
    }


def test_loss_is_the_log_softmax_written_by_hand():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 3, 7)).astype("float32") * 4
    targets = generator.integers(0, 7, (2, 3)).astype("int32")
    exact = logits.astype("float64")
    wanted = [
        [
            math.log(sum(math.exp(x) for x in row)) - row[target]
            for row, target in zip(rows, chosen)
        ]
        for rows, chosen in zip(exact, targets)
    ]
    found = training.token_losses(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_loss_of_huge_logits_is_finite():
    logits = jnp.asarray([[[1e4, -1e4]]], jnp.bfloat16)
    found = training.token_losses(logits, jnp.asarray([[1]], jnp.int32))
    assert found.dtype == jnp.float32
    assert float(found[0, 0]) == pytest.approx(2e4, rel=0.01)


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)],
)
def test_learning_rate_warms_up_and_falls_along_a_cosine(step, share):
    """Halfway down, cos is 0: the mean of 1 and the floor 0.1."""
    config = TrainSection(steps=110, warmup_steps=10, learning_rate=2e-3)
    found = float(training.learning_rate(config)(step))
    assert found == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-12)


def test_learning_rate_of_a_run_shorter_than_its_warm_up_is_finite():
    schedule = training.learning_rate(TrainSection(steps=3, warmup_steps=100))
    assert all(0 <= float(schedule(step)) <= 3.01e-4 for step in range(4))


def test_weight_decay_touches_matrices_and_leaves_norms(skeleton):
    config = TrainSection(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    optimizer = training.make_optimizer(config, skeleton.table)
    params = {row.path: jnp.ones(row.shape) for row in skeleton.table.rows}
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(params), params)
    norms = {row.path for row in skeleton.table.rows if "norm" in row.axes}
    assert len(norms) == 3
    for path, change in updates.items():
        wanted = 0.0 if path in norms else -0.1 * 0.5
        np.testing.assert_allclose(change, wanted, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    microbatches, skeleton, batch
):
    way = Way(microbatches=microbatches)

    def loss(params, part):
        return training.mean_loss(
            skeleton, params, part, compute_dtype="float32", way=Way()
        )

    params = skeleton.init(jax.random.key(0))
    value, whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    summed, parts = jax.jit(
        lambda p, b: accumulated(jax.value_and_grad(loss), p, b, way)
    )(params, batch)
    assert float(summed) == pytest.approx(float(value), rel=FLOAT32_RELATIVE)
    for path in whole:
        np.testing.assert_allclose(
            parts[path], whole[path], rtol=1e-4, atol=1e-6, err_msg=path
        )


def test_microbatch_m_takes_the_rows_m_modulo_the_count():
    """Each part keeps an equal share of every device's rows."""
    rows = jnp.arange(8, dtype=jnp.float32)[:, None]
    powers = jnp.asarray([0.0, 0.0])

    def value_and_grad(params, part):
        return jnp.sum(part["inputs"]), {"w": part["inputs"][:2, 0] * 1.0}

    value, gradient = accumulated(
        value_and_grad, {"w": powers}, {"inputs": rows}, Way(microbatches=4)
    )
    assert float(value) == 28 / 4
    # parts are rows (0, 4), (1, 5), (2, 6), (3, 7): their means by place
    np.testing.assert_allclose(gradient["w"], [6 / 4, 22 / 4])


def test_a_step_lowers_the_loss_of_its_own_batch(skeleton, batch):
    config = TrainSection(steps=10, warmup_steps=0, learning_rate=1e-3)
    optimizer = training.make_optimizer(config, skeleton.table)
    step = jax.jit(
        training.train_step(skeleton, optimizer, compute_dtype="float32", way=Way())
    )
    state = training.init_state(skeleton, optimizer, 0)
    found = []
    for _ in range(4):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found == sorted(found, reverse=True) and found[0] - found[-1] > 0.01
    assert int(state.step) == 4


def test_an_untrained_model_is_as_good_as_guessing(skeleton, batch):
    """And its weighted score counts the tokens of weight 1 alone."""
    params = skeleton.init(jax.random.key(0))
    weights = jnp.zeros((B, T)).at[:, :10].set(1.0)
    score = jax.jit(training.score_step(skeleton, compute_dtype="float32"))
    total = training.total_score([score(params, {**batch, "weights": weights})] * 2)
    assert total.tokens == 2 * 80
    assert total.loss == pytest.approx(math.log(256), abs=0.2)
    assert total.perplexity == pytest.approx(math.exp(total.loss))
    assert total.accuracy == total.correct / 160


def test_bits_per_byte_counts_bytes_not_tokens():
    score = training.Score(nats=100 * math.log(2), tokens=10, correct=5)
    assert score.bits_per_byte(50) == pytest.approx(2.0)
    assert score.accuracy == 0.5


def test_bits_per_byte_of_a_part_takes_its_share_of_the_bytes(tmp_path):
    """10 of the 40 predicted tokens stand for 50 of the 200 bytes."""
    score = training.Score(nats=100 * math.log(2), tokens=10, correct=5)
    text = TokenFile(
        path=tmp_path / "none", dtype="uint16", num_tokens=41, num_bytes=200,
        num_documents=1, fingerprint="",
    )  # fmt: skip
    assert training.bits_per_byte(score, text) == pytest.approx(2.0)


def test_a_perplexity_beyond_floats_is_infinite():
    assert training.Score(nats=1e6, tokens=1, correct=0).perplexity == math.inf
