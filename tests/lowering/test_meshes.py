"""Every legal mesh of eight devices computes what one device computes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, training
from llmos_jax.config import load_config
from llmos_jax.data import TokenFile, TrainBatches
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import NoFeasiblePlan
from llmos_jax.ir import Way
from llmos_jax.lowering import fetch

B, T, STEPS = 16, 32, 10
SETTINGS = [
    "model=tiny",
    f"batch.seq_len={T}",
    f"batch.global={B}",
    "train.steps=10",
    "train.compute_dtype=float32",
    "train.learning_rate=3e-3",
    "train.warmup_steps=3",
]
ALL = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 8 % (data * fsdp) == 0
]
LEGAL = [mesh for mesh in ALL if mesh[2] != 8]
"""tensor=8 does not divide the four KV heads of `tiny`."""
CASES = [
    *((mesh, 1) for mesh in LEGAL),
    *((mesh, 2) for mesh in LEGAL if mesh in {(8, 1, 1), (2, 2, 2)}),
]


def session_of(mesh, microbatches=1):
    """Pins -> plan -> session, as a run does it."""
    pins = [
        f"plan.mesh.{axis}={size}"
        for axis, size in zip(("data", "fsdp", "tensor"), mesh)
    ]
    pins.append(f"plan.microbatches={microbatches}")
    config = load_config(None, [*SETTINGS, *pins]).config
    chosen = plan_of(config)
    assert (chosen.mesh.data, chosen.mesh.fsdp, chosen.mesh.tensor) == mesh
    assert chosen.microbatches == microbatches
    spec = chosen.params.spec
    return training.open_session(models.skeleton(spec), chosen, config)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    ids = np.random.default_rng(0).integers(0, 16, 6000).astype("uint16")
    ids.tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=ids.size,
        num_bytes=ids.size,
        num_documents=1,
        fingerprint="random",
    )


def source_of(tokens, rows=None):
    return TrainBatches(
        tokens, seq_len=T, global_batch=B, seed=0, rows=rows, prefetch=False
    )


@pytest.fixture(scope="module")
def one_device_losses(tiny, tokens):
    """The oracle: the plain step, jitted on one device, without plan or mesh."""
    skeleton = models.skeleton(tiny)
    config = load_config(None, SETTINGS).config
    optimizer = training.make_optimizer(config.train, skeleton.table)
    step = jax.jit(
        training.train_step(skeleton, optimizer, compute_dtype="float32", way=Way())
    )
    state = training.init_state(skeleton, optimizer, config.run.seed)
    found = []
    for _, batch in zip(range(STEPS), source_of(tokens)):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[0] - found[-1] > 1e-3, "the steps must change the model"
    return found


@pytest.mark.parametrize(("mesh", "microbatches"), CASES, ids=str)
def test_every_legal_mesh_gives_the_losses_of_one_device(
    mesh, microbatches, tokens, one_device_losses
):
    session = session_of(mesh, microbatches)
    state = session.fresh()
    found = []
    for _, batch in zip(range(STEPS), session.batches(source_of(tokens, session.rows))):
        state, metrics = session.program(state, batch)
        found.append(float(fetch(metrics["loss"])))
    np.testing.assert_allclose(found, one_device_losses, rtol=FLOAT32_RELATIVE)
    assert int(fetch(state.step)) == STEPS


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
