"""A state is drawn and kept in shards, on every mesh."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from llmos_jax import models, training
from llmos_jax.config import load_config
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import NoFeasiblePlan

B, T = 16, 32
SETTINGS = [
    "model=tiny",
    f"batch.seq_len={T}",
    f"batch.global={B}",
    "train.steps=10",
    "train.compute_dtype=float32",
    "train.learning_rate=3e-3",
    "train.warmup_steps=3",
]


def session_of(mesh):
    """Pins -> plan -> session, as a run does it."""
    pins = [
        f"plan.mesh.{axis}={size}"
        for axis, size in zip(("data", "fsdp", "tensor"), mesh)
    ]
    config = load_config(None, [*SETTINGS, *pins]).config
    chosen = plan_of(config)
    assert (chosen.mesh.data, chosen.mesh.fsdp, chosen.mesh.tensor) == mesh
    spec = chosen.params.spec
    return training.open_session(models.skeleton(spec), chosen, config)


def test_the_mesh_that_does_not_divide_is_refused_with_its_reason():
    with pytest.raises(NoFeasiblePlan, match="kv_heads") as problem:
        session_of((1, 1, 8))
    assert "tensor=8" in problem.value.rejected[0][0]


@pytest.fixture(scope="module", params=[(1, 8, 1), (2, 2, 2), (2, 1, 4)], ids=str)
def placed(request):
    session = session_of(request.param)
    return session, session.fresh()


def test_a_state_drawn_in_shards_is_the_state_drawn_whole(placed, tiny):
    session, state = placed
    whole = training.init_state(models.skeleton(tiny), session.optimizer, 0)
    for path, value in whole.params.items():
        np.testing.assert_allclose(
            np.asarray(state.params[path]), value, rtol=1e-6, atol=1e-7, err_msg=path
        )


def shard_shape(shape, spec, sizes):
    """What a device should hold: the oracle for PartitionSpecs."""
    names = [*spec, *[None] * (len(shape) - len(spec))]
    ways = [
        np.prod([sizes[axis] for axis in ((n,) if isinstance(n, str) else n or ())])
        for n in names
    ]
    return tuple(int(size // way) for size, way in zip(shape, ways))


def test_every_device_holds_the_shard_its_spec_says(placed):
    session, state = placed
    sizes = session.plan.mesh.sizes
    moments = state.optimizer[1]
    for path, value in state.params.items():
        wanted = shard_shape(value.shape, session.plan.partition_spec(path), sizes)
        for tree in (state.params, moments.mu, moments.nu):
            shards = tree[path].addressable_shards
            assert len(shards) == 8
            assert {shard.data.shape for shard in shards} == {wanted}, path


def test_no_device_ever_holds_a_sharded_parameter_whole(placed):
    """Every matrix is split by the meshes above, and init's outputs are born so."""
    session, state = placed
    matrices = [row for row in session.plan.params.rows if "norm" not in row.axes]
    assert len(matrices) >= 8
    for row in matrices:
        held = [shard.data.size for shard in state.params[row.path].addressable_shards]
        assert max(held) < row.size, row.path


def test_init_needs_less_memory_a_device_than_the_model():
    """The compiler's own account: no temporary of init holds the state whole."""
    session = session_of((1, 8, 1))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, session.state_shape)
    draw = functools.partial(
        training.init_state, session.skeleton, session.optimizer, 0
    )
    compiled = jax.jit(draw, out_shardings=shardings).lower().compile()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(session.state_shape))
    analysis = compiled.memory_analysis()
    assert analysis.output_size_in_bytes < 0.6 * whole
    assert analysis.output_size_in_bytes + analysis.temp_size_in_bytes < whole
