"""The loss in tiles is the loss in one piece, and so are its gradients."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, rules, training
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Pins, Way, Workload
from llmos_jax.lowering import MeshSharder, device_mesh
from llmos_jax.models import annotated_by
from llmos_jax.planner import plan
from llmos_jax.rules import resolve_weight
from llmos_jax.training.loss import Tiling, tiled_loss

B, T, D, V = 4, 6, 16, 32
TIED = ("vocab", "embed")
UNTIED = ("embed", "vocab")
HEADS = pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
OVER = pytest.mark.parametrize("over", ["tokens", "vocab"])
BFLOAT16_RELATIVE = 2.0**-7
"""One unit in the last of bfloat16's eight bits."""
GRADIENT_ABSOLUTE = 1e-7
"""Float32 rounding of gradients that are means over 24 tokens of values below 1."""


def inputs(axes, dtype="float32"):
    generator = np.random.default_rng(3)
    shape = (V, D) if axes == TIED else (D, V)
    x_BTD = generator.normal(size=(B, T, D))
    kernel = generator.normal(size=shape)
    targets_BT = generator.integers(0, V, (B, T))
    return (
        jnp.asarray(x_BTD, dtype),
        jnp.asarray(kernel, dtype),
        jnp.asarray(targets_BT, jnp.int32),
    )


def whole(x_BTD, kernel, targets_BT, axes):
    """The oracle: all logits at once."""
    formula = "BTD,VD->BTV" if axes == TIED else "BTD,DV->BTV"
    logits_BTV = jnp.einsum(formula, x_BTD, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(training.token_losses(logits_BTV, targets_BT))


def both(axes, tiles, over, dtype="float32", weight=1.0):
    """(value, gradients) of the loss in one piece, and in tiles."""
    x_BTD, kernel, targets_BT = inputs(axes, dtype)

    def found(loss):
        def weighted(x, w):
            return jnp.float32(weight) * loss(x, w)

        return jax.jit(jax.value_and_grad(weighted, (0, 1)))(x_BTD, kernel)

    return (
        found(lambda x, w: whole(x, w, targets_BT, axes)),
        found(
            lambda x, w: tiled_loss(x, w, targets_BT, None, Tiling(axes, tiles, over))
        ),
    )


@pytest.mark.parametrize("tiles", [1, 2, 7, 1000])
@OVER
@HEADS
def test_tiles_change_neither_the_loss_nor_its_gradients(axes, over, tiles):
    """24 tokens and 32 in the vocabulary: 7 tiles become 8, 1000 are one for each."""
    (value, gradients), (tiled, parts) = both(axes, tiles, over)
    assert float(tiled) == pytest.approx(float(value), rel=FLOAT32_RELATIVE)
    for one, other in zip(parts, gradients):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=GRADIENT_ABSOLUTE)


@OVER
def test_the_gradients_of_tiles_scale_with_what_is_done_to_the_loss(over):
    """A loss in a sum hands its own gradient on."""
    (_, gradients), (_, parts) = both(TIED, 4, over, weight=-3.0)
    for one, other in zip(parts, gradients):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=3 * GRADIENT_ABSOLUTE)


@OVER
@HEADS
def test_in_bfloat16_tiles_err_no_more_than_bfloat16_does(axes, over):
    """Against float32 on the same numbers: both round, neither the other's way."""
    x_BTD, kernel, targets_BT = inputs(axes, "bfloat16")
    exact, wanted = jax.value_and_grad(whole, (0, 1))(
        x_BTD.astype("float32"), kernel.astype("float32"), targets_BT, axes
    )
    (_, plain), (tiled, parts) = both(axes, 4, over, "bfloat16")
    assert tiled.dtype == jnp.float32
    assert float(tiled) == pytest.approx(float(exact), rel=FLOAT32_RELATIVE)
    for one, other, truth in zip(parts, plain, wanted):
        assert one.dtype == other.dtype == jnp.bfloat16
        size = float(jnp.max(jnp.abs(truth)))
        error = jnp.max(jnp.abs(one.astype("float32") - truth))
        assert float(error) <= BFLOAT16_RELATIVE * size


@OVER
@HEADS
def test_capped_logits_and_weighted_tokens_are_the_same_in_tiles(axes, over):
    x_BTD, kernel, targets_BT = inputs(axes)
    weights_BT = jnp.arange(B * T, dtype=jnp.float32).reshape(B, T) % 3
    formula = "BTD,VD->BTV" if axes == TIED else "BTD,DV->BTV"

    def plainly(x, w):
        logits_BTV = 5.0 * jnp.tanh(jnp.einsum(formula, x, w) / 5.0)
        return jnp.mean(training.token_losses(logits_BTV, targets_BT) * weights_BT)

    def tiled(x, w):
        return tiled_loss(x, w, targets_BT, weights_BT, Tiling(axes, 4, over, 5.0))

    one, other = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(x_BTD, kernel)
        for loss in (plainly, tiled)
    )
    assert float(other[0]) == pytest.approx(float(one[0]), rel=FLOAT32_RELATIVE)
    for made, wanted in zip(other[1], one[1]):
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=GRADIENT_ABSOLUTE)


@OVER
def test_a_loss_of_huge_logits_is_finite_in_tiles(over):
    x_BTD = jnp.full((1, 2, D), 1e3)
    kernel = jnp.asarray([[1.0] * D, [-1.0] * D])
    targets_BT = jnp.asarray([[1, 0]], jnp.int32)
    value, (dx_BTD, _) = jax.value_and_grad(tiled_loss, (0, 1))(
        x_BTD, kernel, targets_BT, None, Tiling(TIED, 2, over)
    )
    assert float(value) == pytest.approx(2e3 * D / 2, rel=FLOAT32_RELATIVE)
    assert np.isfinite(dx_BTD).all()


@OVER
def test_tiles_never_hold_all_logits(over):
    """What the compiler says: the logits of a tile instead of those of the batch."""
    x = jax.ShapeDtypeStruct((8, 128, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1024, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def temp_bytes(loss):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return step.lower(x, kernel, targets).compile().memory_analysis()

    logits = 4 * 8 * 128 * 1024
    plain = temp_bytes(lambda x, w, y: whole(x, w, y, TIED))
    tiled = temp_bytes(
        lambda x, w, y: tiled_loss(x, w, y, None, Tiling(TIED, 16, over))
    )
    assert plain.temp_size_in_bytes >= logits
    assert tiled.temp_size_in_bytes < logits / 3


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


def check_equal(found, wanted):
    (value, gradients), (other, others) = found, wanted
    assert float(value) == pytest.approx(float(other), rel=FLOAT32_RELATIVE)
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(others)):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def plan_for(skeleton, mesh, rows, length):
    return plan(
        skeleton.table,
        parse_topology("cpu:8"),
        Workload(phase="train", global_batch=rows, seq_len=length),
        rules.load_rules("llama", "train"),
        Pins(mesh=mesh),
    )


def under(found, function, in_specs, out_specs):
    """`function` jitted as `lower` does it, over the eight devices of a plan."""
    placed = device_mesh(found)

    def traced(*values):
        with annotated_by(MeshSharder(found, placed)):
            return function(*values)

    def shardings(specs):
        return jax.tree.map(
            lambda spec: jax.NamedSharding(placed, spec),
            specs,
            is_leaf=lambda leaf: isinstance(leaf, jax.P),
        )

    return jax.jit(
        traced, in_shardings=shardings(in_specs), out_shardings=shardings(out_specs)
    )


@OVER
@HEADS
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_tiles_on_a_mesh_give_what_one_device_gives(tiny, mesh, axes, over):
    x_BTD, kernel, targets_BT = inputs(axes)
    x_BTD, targets_BT = jnp.tile(x_BTD, (2, 1, 1)), jnp.tile(targets_BT, (2, 1))
    found = plan_for(models.skeleton(tiny), mesh, 2 * B, 8)
    spec = resolve_weight(found.rules, axes, kernel.shape, found.mesh)
    rows, stored = jax.P(("data", "fsdp")), jax.P(*spec)

    def loss(x, w, y):
        return tiled_loss(x, w, y, None, Tiling(axes, 3, over))

    step = under(
        found,
        jax.value_and_grad(loss, (0, 1)),
        (rows, stored, rows),
        (jax.P(), (rows, stored)),
    )
    wanted = jax.jit(
        jax.value_and_grad(lambda x, w: whole(x, w, targets_BT, axes), (0, 1))
    )(x_BTD, kernel)
    check_equal(step(x_BTD, kernel, targets_BT), wanted)


@pytest.fixture(scope="module")
def model(tiny):
    """(skeleton of one layer, params, batch, loss and gradients in one piece)."""
    spec = replace(tiny, num_layers=1)
    skeleton = models.skeleton(spec)
    tokens = np.random.default_rng(5).integers(0, spec.vocab_size, (8, 17))
    tokens = jnp.asarray(tokens, jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    params = skeleton.init(jax.random.key(0))
    wanted = jax.jit(jax.value_and_grad(loss_of(skeleton, Way())))(params, batch)
    return skeleton, params, batch, wanted


def loss_of(skeleton, way):
    def loss(params, batch):
        return training.mean_loss(
            skeleton, params, batch, compute_dtype="float32", way=way
        )

    return loss


@OVER
def test_a_model_on_a_mesh_trains_on_tiles_as_on_the_whole(model, over):
    """Its weights and their gradients split two ways."""
    skeleton, params, batch, wanted = model
    step = jax.value_and_grad(loss_of(skeleton, Way(loss_tiles=3, loss_over=over)))
    found = plan_for(skeleton, {"fsdp": 4, "tensor": 2}, 8, 16)
    split = {path: jax.P(*spec) for path, spec in found.specs.items()}
    rows = {"inputs": jax.P(("data", "fsdp")), "targets": jax.P(("data", "fsdp"))}
    sharded = under(found, step, (split, rows), (jax.P(), split))
    check_equal(sharded(params, batch), wanted)
