"""What a Way changes is memory and time; of the numbers only what it says."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from llmos_jax import models, training
from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.config import load_config
from llmos_jax.config.schema import TrainSection
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import ConfigError, LowerError, PlanError
from llmos_jax.ir import Way
from llmos_jax.lowering import device_mesh
from llmos_jax.training.step import accumulated

HEADS = ("query", "key", "value", "context")


@pytest.fixture(scope="module")
def skeleton(tiny):
    return models.skeleton(tiny)


@pytest.fixture(scope="module")
def batch(tiny):
    tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, tiny.vocab_size)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def loss_of(skeleton, way):
    def loss(params, batch):
        return training.mean_loss(
            skeleton, params, batch, compute_dtype="float32", way=way
        )

    return loss


def gradients_of(skeleton, way, batch):
    params = skeleton.init(jax.random.key(0))
    return jax.jit(jax.grad(loss_of(skeleton, way)))(params, batch)


@pytest.fixture(scope="module")
def plain(skeleton, batch):
    return gradients_of(skeleton, Way(), batch)


@pytest.mark.parametrize(
    "way",
    [
        Way(remat="query, key,value"),
        Way(remat="context,out", loss_tiles=4, unrolled=True),
        Way(remat="full", offload=("layer_input",)),
        Way(remat="attention", offload=HEADS),
        Way(remat="query,key,value", offload=("layer_input", "query"), unrolled=True),
    ],
    ids=str,
)
def test_what_is_saved_or_offloaded_changes_no_gradient(way, skeleton, batch, plain):
    """On the CPU, too, whose host memory is its own."""
    found = gradients_of(skeleton, way, batch)
    for path in plain:
        np.testing.assert_allclose(
            found[path], plain[path], rtol=1e-4, atol=1e-6, err_msg=path
        )


def saved_by(way, skeleton, batch):
    """Elements that a backward pass finds."""
    params = jax.eval_shape(skeleton.init, jax.random.key(0))
    _, backward = jax.eval_shape(
        lambda p: jax.vjp(lambda p: loss_of(skeleton, way)(p, batch), p), params
    )
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_the_more_a_list_names_the_more_is_kept(skeleton, batch, tiny):
    """By exactly the sizes of what is named, over both layers."""
    none, some, more = (
        saved_by(Way(remat=remat), skeleton, batch)
        for remat in ("full", "key", "key,query")
    )
    tokens = batch["inputs"].size * tiny.num_layers
    assert some - none == tokens * tiny.num_kv_heads * tiny.head_dim
    assert more - some == tokens * tiny.num_heads * tiny.head_dim


def test_a_tensor_that_no_layer_has_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="'querry'.*Did you mean 'query'"):
        pinned("plan.remat=querry,key")


def test_what_is_not_saved_cannot_be_offloaded():
    with pytest.raises(PlanError, match="'query', which remat = full does not save"):
        pinned("plan.remat=full", 'plan.offload=["query"]')


def pinned(*texts):
    asked = ["model=tiny", "topology=cpu:8", "batch.global=8", "batch.seq_len=64"]
    return plan_of(small.config_of([*asked, *texts]))


def test_pins_of_a_way_are_the_way():
    found = pinned(
        "plan.remat=query,key,value",
        'plan.offload=["key"]',
        "plan.loss_tiles=3",
        "plan.state_dtype=bfloat16",
        "plan.gradient_dtype=bfloat16",
    ).way
    assert (found.remat, found.offload) == ("query,key,value", ("key",))
    assert found.loss_tiles == 3
    assert (found.state_dtype, found.gradient_dtype) == ("bfloat16", "bfloat16")


CLOSE = 0.01
"""Relative: bfloat16 moments differ by 2**-9 in a step of Adam, and losses by less."""


def trained(skeleton, batch, state_dtype, steps=8):
    config = TrainSection(steps=steps, warmup_steps=0, learning_rate=3e-3)
    optimizer = training.make_optimizer(config, skeleton.table, state_dtype)
    step = jax.jit(
        training.train_step(skeleton, optimizer, compute_dtype="float32", way=Way())
    )
    state, losses = training.init_state(skeleton, optimizer, 0), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
def test_moments_in_bfloat16_take_half_and_learn_as_well(skeleton, batch):
    (state, losses), (half, others) = (
        trained(skeleton, batch, dtype) for dtype in ("float32", "bfloat16")
    )
    assert losses[0] - losses[-1] > 0.1
    np.testing.assert_allclose(others, losses, rtol=CLOSE)
    assert others != losses
    moments, fewer = (
        [leaf for leaf in jax.tree.leaves(tree.optimizer) if leaf.ndim]
        for tree in (state, half)
    )
    assert 2 * sum(x.nbytes for x in fewer) == sum(x.nbytes for x in moments)
    assert {leaf.dtype for leaf in half.params.values()} == {jnp.dtype("float32")}


def test_gradients_summed_in_bfloat16_are_close_and_come_back_in_float32(
    skeleton, batch, plain
):
    params = skeleton.init(jax.random.key(0))
    value_and_grad = jax.value_and_grad(loss_of(skeleton, Way()))

    def found(dtype):
        way = Way(microbatches=4, gradient_dtype=dtype)
        return jax.jit(lambda p, b: accumulated(value_and_grad, p, b, way)[1])(
            params, batch
        )

    summed = found("bfloat16")
    for path in plain:
        size = float(jnp.max(jnp.abs(plain[path])))
        assert summed[path].dtype == jnp.float32
        # Four roundings of 2**-9 each.
        np.testing.assert_allclose(summed[path], plain[path], atol=2**-6 * size)
    assert any(bool(jnp.any(summed[path] != plain[path])) for path in plain)


@pytest.fixture(scope="module")
def texts(small_model, text_file):
    def of(folder):
        more = {
            "plan__remat": "attention",
            "plan__loss_tiles": 4,
            "plan__state_dtype": "bfloat16",
            "plan__microbatches": 2,
            "train__steps": 12,
            "checkpoint__every": 6,
            "batch__global": 16,
        }
        return small.overrides(folder, small_model, text_file, **more)

    return of


@pytest.mark.slow
def test_a_run_on_a_pinned_way_trains_checkpoints_and_resumes(tmp_path, texts):
    """Halved and resumed it is the run that was not, bit for bit."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    small.train(texts(straight))
    way = json.loads((straight / "plan.json").read_text())["way"]
    assert (way["loss_tiles"], way["state_dtype"]) == (4, "bfloat16")
    losses = small.losses(straight)
    assert losses[-1] < losses[0] - 0.3
    small.train([*texts(halves), "train.max_minutes=0.0001"])
    stopped = find_checkpoint(str(halves)).step
    assert stopped < 12
    assert small.train(texts(halves))["resumed_from"] == stopped
    assert small.losses(halves) == losses


def test_what_no_program_runs_is_planned_and_not_trained(skeleton):
    texts = ["model=tiny", "topology=cpu:8", "batch.global=8", "batch.seq_len=8"]
    config = load_config(None, [*texts, "plan.phase=decode"]).config
    chosen = plan_of(config)
    with pytest.raises(LowerError, match="the plan is for a decode step"):
        training.lower_train_step(
            skeleton, chosen, config, device_mesh(chosen, jax.devices())
        )
