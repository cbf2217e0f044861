"""A run goes on with other devices: the same global batch, rows and losses."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE
from test_resume import KILLED_AT, PATIENCE_S

from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.training import refit


@pytest.fixture
def begun(tmp_path, small_model, text_file):
    """The pages of a run that began on so many devices with so much for each."""

    def make(**more):
        texts = small.overrides(tmp_path / "run", small_model, text_file, **more)
        texts = [text for text in texts if not text.startswith("batch.global")]
        folder = tmp_path / "run"
        folder.mkdir()
        from llmos_jax.config import to_toml

        (folder / "config.toml").write_text(to_toml(small.config_of(texts)))
        (folder / "plan.json").write_text('{"batch": {"global": 64}}')
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        return texts

    return make


def refitted(texts, *, may_drop=False):
    lines = []
    return refit(small.config_of(texts), may_drop=may_drop, say=lines.append), lines


def test_a_batch_per_device_stays_the_run_s_global_batch(begun):
    config, (line,) = refitted(begun(batch__per_device=16))
    assert (config.batch.global_, config.batch.per_device) == (64, None)
    assert line == (
        "batch.per_device = 16 made a global batch of 64 when this run began: it stays "
        "64 on 8 devices"
    )


def test_the_same_devices_are_not_worth_a_line(begun):
    config, lines = refitted(begun(batch__per_device=8))
    assert (config.batch.global_, lines) == (64, [])


def test_another_batch_is_not_hidden(begun):
    texts = begun(batch__per_device=16)
    config, lines = refitted([*texts, "batch.per_device=4"])
    assert (config.batch.global_, config.batch.per_device, lines) == (None, 4, [])


@pytest.mark.parametrize("gone", ["metrics.jsonl", "plan.json", "config.toml"])
def test_a_run_without_a_step_is_as_it_is_asked(begun, tmp_path, gone):
    texts = begun(batch__per_device=16)
    (tmp_path / "run" / gone).unlink()
    assert refitted(texts, may_drop=True) == (small.config_of(texts), [])


def test_pins_of_devices_that_are_gone_are_dropped_for_a_supervisor(begun):
    texts = begun(
        batch__per_device=4,
        plan__mesh__data=16,
        plan__microbatches=1,
        plan__remat="dots",
    )
    config, lines = refitted(texts, may_drop=True)
    assert (config.plan.mesh, config.plan.microbatches) == ({}, None)
    assert config.plan.remat == "dots"
    assert lines[-1] == (
        "plan.mesh.data=16 asks for 16 devices, 8 are here: planning anew with the "
        "same global batch of 64"
    )


def test_pins_stay_where_a_person_can_change_them(begun):
    texts = begun(batch__per_device=4, plan__mesh__data=16)
    assert refitted(texts)[0].plan.mesh == {"data": 16}


def test_pins_that_hold_here_stay(begun):
    texts = begun(batch__per_device=8, plan__mesh__data=4, plan__microbatches=2)
    config, _ = refitted(texts, may_drop=True)
    assert (config.plan.mesh, config.plan.microbatches) == ({"data": 4}, 2)


def test_a_topology_that_is_gone_is_dropped(begun):
    config, lines = refitted(
        begun(batch__per_device=4, topology="cpu:16"), may_drop=True
    )
    assert config.topology is None
    assert "topology=cpu:16 asks for 16 devices, 8 are here" in lines[-1]


def run_on(devices, texts, step=None, saved=None, **environment):
    """Train in a process with so many devices, killed at `step` when `saved` is."""
    code = "import sys; from llmos_jax import train; sys.exit(train.main({!r}))"
    words = [*small.flags(texts), "--json"]
    if step is None:
        code = code.format(words)
    else:
        code = KILLED_AT.format(step=step, saved=str(saved), arguments=words)
    process = small.start(code, devices=devices, **environment)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    wanted = 0 if step is None else -signal.SIGKILL
    assert process.returncode == wanted, stderr[-2000:]
    return stdout, stderr


@pytest.mark.slow
@pytest.mark.parametrize("pins", [{}, {"plan__mesh__data": 8}], ids=["free", "pinned"])
def test_eight_devices_then_four_then_two_are_one_run(
    pins, tmp_path, small_model, text_file, small_run
):
    folder = tmp_path / "run"
    texts = small.overrides(
        folder, small_model, text_file, batch__per_device=1, checkpoint__every=5, **pins
    )
    texts = [text for text in texts if not text.startswith("batch.global")]
    supervisor = {"LLMOS_HEARTBEAT": str(tmp_path / "beats.json")}
    saved = folder / "checkpoints"
    run_on(8, texts, 8, saved / "5" / "manifest", **supervisor)
    _, stderr = run_on(4, texts, 13, saved / "10" / "manifest", **supervisor)
    assert "it stays 8 on 4 devices" in stderr
    assert ("plan.mesh.data=8 asks for 8 devices, 4 are here" in stderr) == bool(pins)
    stdout, stderr = run_on(2, texts, **supervisor)
    report = json.loads(stdout)
    assert "it stays 8 on 2 devices" in stderr
    assert (report["resumed_from"], report["steps"]) == (10, 20)
    assert report["tokens_seen"] == 20 * 8 * 32
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )
    data = [
        store.manifest(step).data
        for store, step in (find_checkpoint(str(f)) for f in (folder, small_run))
    ]
    assert data[0] == data[1], "the place in the data"
