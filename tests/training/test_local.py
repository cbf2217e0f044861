"""Replicas that learn alone: what they compute, when they agree, how they resume."""

from __future__ import annotations

import functools
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE
from test_resume import SignalAt

from llmos_jax import driver, models, resolve, training
from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.config import load_config
from llmos_jax.errors import ConfigError, PlanMismatch
from llmos_jax.lowering import collectives_of, compile_devices, device_mesh, fetch

B, T, STEPS = 16, 32, 10
LOCAL = ("sync.strategy=local",)
SGD = ("train.optimizer=sgd", "train.clip_norm=inf", "train.learning_rate=0.3")


def config_of(mesh, *more):
    """`mesh` as in "data=2 fsdp=4"."""
    texts = [
        "model=tiny",
        "topology=cpu:8",
        f"batch.seq_len={T}",
        f"batch.global={B}",
        f"train.steps={STEPS}",
        "train.compute_dtype=float32",
        "train.learning_rate=3e-3",
        "train.warmup_steps=0",
        *(f"plan.mesh.{pin}" for pin in mesh.split()),
        *more,
    ]
    return load_config(None, texts).config


@functools.cache
def session_of(mesh, *more):
    config = config_of(mesh, *more)
    plan = driver.plan(config)
    return training.open_session(models.skeleton(plan.params.spec), plan, config)


def trained(session, steps=STEPS, state=None):
    """Each step's (state, loss), from the same random tokens; states on the host."""
    session.program.compile()
    rng = np.random.default_rng(0)
    state, found = session.fresh() if state is None else state, []
    for _ in range(steps):
        tokens = rng.integers(0, 16, (B, T + 1), np.int32)
        batch = {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
        [batch] = session.batches(iter([batch]))
        state, metrics = session.program(state, batch)
        found.append((jax.tree.map(np.array, state), float(fetch(metrics["loss"]))))
    return found


def losses_of(session):
    return [loss for _, loss in trained(session)]


@pytest.fixture(scope="module")
def together():
    """Losses of plain descent along everyone's mean gradient, every step."""
    return losses_of(session_of("data=8", *SGD))


AVERAGED = (*LOCAL, "sync.steps=1", "sync.learning_rate=1", "sync.momentum=0")


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2 fsdp=2 tensor=2",
        pytest.param("data=2 fsdp=4", marks=pytest.mark.slow),
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("data=2 stage=2 fsdp=2", marks=pytest.mark.slow),
        pytest.param("data=2 context=2 fsdp=2", marks=pytest.mark.slow),
    ],
)
def test_plain_descent_that_agrees_every_step_is_every_step_training(mesh, together):
    """A mean of steps along gradients is a step along their mean."""
    alone = losses_of(session_of(mesh, *SGD, *AVERAGED))
    assert together[0] - together[-1] > 0.1, "the steps must change the model"
    np.testing.assert_allclose(alone, together, rtol=FLOAT32_RELATIVE)


EVERY = 5
SETTINGS = (*LOCAL, f"sync.steps={EVERY}")


@pytest.fixture(scope="module")
def adamw():
    """Ten steps of two replicas that agree after five."""
    return trained(session_of("data=2 fsdp=4", *SETTINGS))


def apart(state):
    """The largest difference between two replicas' parameters."""
    replicas = state.optimizer.replicas.values()
    return max(float(np.abs(x[0] - x[1]).max()) for x in replicas)


def test_replicas_differ_between_agreements_and_are_one_after(adamw):
    by_step = [apart(state) for state, _ in adamw]
    agreed = [step for step, way in enumerate(by_step, 1) if way == 0]
    assert agreed == [EVERY, 2 * EVERY]
    assert min(way for way in by_step if way) > 1e-4


def test_moments_stay_each_replicas_own(adamw):
    moments = adamw[EVERY - 1][0].optimizer.inner[1].mu
    assert any((x[0] != x[1]).any() for x in moments.values())


def test_the_anchor_moves_at_agreements_only_and_replicas_go_on_from_it(adamw):
    anchors = [state.params for state, _ in adamw]
    for path, value in anchors[EVERY - 1].items():
        assert (anchors[0][path] == anchors[EVERY - 2][path]).all(), path
        assert (value == anchors[2 * EVERY - 2][path]).all(), path
        assert (adamw[EVERY - 1][0].optimizer.replicas[path] == value).all(), path
        assert (anchors[0][path] != value).any(), path


RATE, MOMENTUM = 0.7, 0.9
"""Defaults of `sync.learning_rate` and `sync.momentum`."""


def test_an_agreement_is_nesterovs_step_along_the_mean_way_back():
    """Two by hand: the second has the momentum of the first."""
    session = session_of("data=2 fsdp=4", *SETTINGS)
    state = session.fresh()
    anchor = jax.tree.map(np.array, state.params)
    velocity = {path: np.zeros_like(value) for path, value in anchor.items()}
    for _ in range(2):
        learnt = trained(session, 3, state)[-1][0]
        state = session.concluded(jax.device_put(learnt, shardings(session)), 3)
        state = state._replace(step=jnp.zeros_like(state.step))
        for path, value in learnt.optimizer.replicas.items():
            back = anchor[path] - value.mean(axis=0)
            velocity[path] = MOMENTUM * velocity[path] + back
            moved = RATE * (back + MOMENTUM * velocity[path])
            anchor[path] = anchor[path] - moved
            found = np.array(state.params[path])
            np.testing.assert_allclose(found, anchor[path], rtol=1e-5, atol=1e-6)
            assert (found != np.array(learnt.params[path])).any()


def bytes_over_replicas(text, mesh):
    """What one run of a program sends along `data`: in conditionals, and outside."""
    branches = r"(branch_computations=\{[^}]*\}|(true|false)_computation=%[\w.\-]+)"
    everywhere, outside = (
        sum(
            item.total_bytes
            for item in collectives_of(part, mesh)
            if "data" in item.axes
        )
        for part in (text, re.sub(branches, "", text))
    )
    return everywhere - outside, outside


def test_only_an_agreement_sends_parameters_to_other_replicas():
    """And it lies in a conditional; what else crosses `data` are two metrics."""
    session = session_of("data=2 fsdp=4", *SETTINGS)
    session.program.compile()
    inside, outside = bytes_over_replicas(session.program.as_text(), session.mesh)
    assert outside == 2 * 4
    assert inside / EVERY == training.replica_bytes_per_step(session.plan)


def test_between_tpu_slices_too():
    """Compiled for chips that are not here; small arrays are padded to whole tiles."""
    pytest.importorskip("libtpu")
    config = config_of("data=2 fsdp=4", "topology=2*v5e:2x2", *SETTINGS)
    plan = driver.plan(config)
    mesh = device_mesh(plan, compile_devices(plan.topology))
    program = training.lower_train_step(
        models.skeleton(plan.params.spec), plan, config, mesh
    )
    inside, outside = bytes_over_replicas(program.as_text(), mesh)
    assert 0 < outside <= 1024
    sent = training.replica_bytes_per_step(plan)
    assert inside / EVERY == pytest.approx(sent, rel=0.05)


def shardings(session):
    return jax.tree.map(lambda leaf: leaf.sharding, session.state_shape)


def test_each_device_holds_its_replicas_part_only():
    session = session_of("data=2 fsdp=2 tensor=2", *SGD, *AVERAGED)
    state = session.fresh()
    for path, value in state.params.items():
        part = value.addressable_shards[0].data.shape
        own = state.optimizer.replicas[path].addressable_shards
        assert {shard.data.shape for shard in own} == {(1, *part)}, path


def test_every_step_sends_as_many_times_more_as_rounds_are_long():
    every, local = (
        training.replica_bytes_per_step(session_of("data=8", *more).plan)
        for more in (SGD, (*LOCAL, "sync.steps=50"))
    )
    params = session_of("data=8", *SGD).skeleton.table.num_params
    assert every == pytest.approx(2 * 7 / 8 * 4 * params)
    assert every / local == pytest.approx(50)


def texts_of(folder, small_model, text_file, **more):
    """Rounds of 8 steps: checkpoints at 10 and 20 fall in the middle of one."""
    local = {"sync__strategy": "local", "sync__steps": 8, "plan__mesh__data": 4}
    return small.overrides(folder, small_model, text_file, **{**local, **more})


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_model, text_file):
    folder = tmp_path_factory.mktemp("local") / "run"
    report = small.train(texts_of(folder, small_model, text_file))
    return folder, report


@pytest.fixture
def texts(tmp_path, small_model, text_file):
    return texts_of(tmp_path / "run", small_model, text_file)


def state_at(folder, texts, step):
    """A checkpoint's whole state: the anchor, the replicas and all moments."""
    config = small.config_of(texts)
    plan = driver.plan(config)
    skeleton = models.skeleton(resolve.spec_of(config))
    session = training.open_session(skeleton, plan, config)
    return session.restore(find_checkpoint(str(folder)).store, step)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array(x).tobytes() == np.array(y).tobytes() for x, y in leaves)


def unfinished(straight, tmp_path):
    """The straight run as a kill after step 13 left it."""
    shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    (tmp_path / "run" / "report.json").unlink()
    return tmp_path / "run"


def test_a_run_cut_in_a_round_resumes_bit_for_bit(straight, tmp_path, texts):
    folder = unfinished(straight, tmp_path)
    assert apart(state_at(folder, texts, 10)) > 0, "the cut must be inside a round"
    assert small.train(texts)["resumed_from"] == 10
    assert small.losses(folder) == small.losses(straight[0])
    assert same(state_at(folder, texts, 20), state_at(straight[0], texts, 20))


@pytest.mark.slow
def test_a_run_that_a_signal_stops_goes_on_as_if_nothing_had_been(
    straight, tmp_path, texts, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        SignalAt(5, signal.SIGTERM).install(patch)
        stopped = small.train(texts)["steps"]
    assert stopped < 8 and apart(state_at(folder, texts, stopped)) > 0
    small.train(texts)
    assert small.losses(folder) == small.losses(straight[0])


@pytest.mark.slow
def test_a_run_that_ends_agrees_first(straight, texts):
    assert apart(state_at(straight[0], texts, 20)) == 0
    clock = small.train([*texts, "train.max_minutes=1e-6", "train.warmup_steps=0"])
    folder = Path(clock["run_dir"])
    assert clock["stopped_by"] == "time"
    state = state_at(folder, texts, clock["steps"])
    assert clock["steps"] < 8 and apart(state) == 0
    assert any((np.array(x) != 0).any() for x in jax.tree.leaves(state.optimizer.outer))


def test_readers_of_a_checkpoint_see_the_anchor(straight):
    folder, report = straight
    found = driver.evaluate(str(folder), [])
    assert found["loss"] == pytest.approx(report["val_loss"], rel=FLOAT32_RELATIVE)


def test_the_report_says_what_replicas_send(straight):
    _, report = straight
    assert report["sync"] == {"strategy": "local", "steps": 8, "replicas": 4}
    held = 4 * report["params"] / 2  # fsdp or tensor takes the other two devices
    assert report["replica_bytes_per_step"] == pytest.approx(
        2 * 3 / 4 * held / 8, rel=0.05
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sync.strategy=every_step", "was trained with sync.strategy = local over 4 "
         "replicas.*asks for sync.strategy = every_step.*Set sync.strategy=local"),
        ("plan.mesh.data=2", "local over 4 .* local over 2 .*plan.mesh.data=4"),
    ],
)  # fmt: skip
def test_other_replicas_cannot_go_on(change, said, straight, tmp_path, texts):
    folder = unfinished(straight, tmp_path)
    before = (folder / "config.toml").read_text()
    with pytest.raises(PlanMismatch, match=said):
        small.train([*texts, change])
    assert (folder / "config.toml").read_text() == before


def test_a_run_that_agreed_every_step_cannot_go_on_alone(small_run, texts):
    with pytest.raises(PlanMismatch, match="Set sync.strategy=every_step to go on"):
        small.train([*texts, f"run.dir={small_run}", "train.steps=30"])


def test_rounds_of_no_steps_are_refused():
    with pytest.raises(ConfigError, match=r"sync.steps = 0: .*Set sync.steps to 1"):
        session_of("data=2 fsdp=4", *LOCAL, "sync.steps=0")


def test_one_replica_has_nobody_to_agree_with():
    said = "sync.strategy = local on mesh fsdp=8: .*plan.mesh.data to 2 or more"
    with pytest.raises(ConfigError, match=said):
        session_of("data=1 fsdp=8", *LOCAL)
