"""Checkpoints in an object store: whole or not there, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from object_store import TROUBLE

from llmos_jax import stores
from llmos_jax.checkpoint import CheckpointStore, Manifest, Retention
from llmos_jax.checkpoint.remote import Mirror, bring
from llmos_jax.config import load_model
from llmos_jax.errors import CheckpointError, StoreError

PATIENCE_S = 60

PUSH = """
import sys
from pathlib import Path
from llmos_jax.checkpoint.remote import Mirror

pytest_plugins = ["object_store"]
mirror = Mirror(sys.argv[1], Path(sys.argv[2]))
mirror.push(int(sys.argv[3]))
mirror.wait()
"""


def weights(step):
    return {
        "a": np.random.default_rng(step).standard_normal((64, 32)).astype(np.float32),
        "b": np.full((8,), step, np.int32),
    }


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Real checkpoints of steps 1, 2 and 3. Do not write to it."""
    folder = tmp_path_factory.mktemp("local") / "checkpoints"
    store = CheckpointStore(folder)
    for step in (1, 2, 3):
        manifest = Manifest(
            step=step,
            model=load_model("tiny"),
            plan_fingerprint="0123456789abcdef",
            mesh={"data": 1},
            data={"step": step},
            metrics={"val_loss": {1: 2.0, 2: 3.0, 3: 2.5}[step]},
            made_by={"jax": "1"},
        )
        params = jax.tree.map(jax.numpy.asarray, weights(step))
        store.save(manifest, params, None, '{"a": 1}')
    store.close()
    return folder


@pytest.fixture
def folder(local, tmp_path):
    """A copy of those."""
    return Path(shutil.copytree(local, tmp_path / "checkpoints"))


def restored(folder, step):
    store = CheckpointStore(folder, read_only=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for name, x in weights(step).items()
    }
    return store.restore(step, params=shapes)["params"]


def assert_same(folder, step):
    for name, value in restored(folder, step).items():
        assert np.asarray(value).tobytes() == weights(step)[name].tobytes(), name


def url_of(object_store):
    return f"{object_store.url}/runs/one"


def test_what_is_pushed_under_errors_comes_back_bit_for_bit(
    object_store, folder, tmp_path
):
    object_store.faults = TROUBLE
    mirror = Mirror(url_of(object_store), folder)
    for step in (1, 2, 3):
        mirror.push(step)
    mirror.wait()
    assert mirror.steps() == [1, 2, 3]
    assert mirror.latest == 3
    elsewhere = tmp_path / "elsewhere"
    again = Mirror(url_of(object_store), elsewhere, read_only=True)
    for step in (1, 3):
        assert again.fetch(step) == elsewhere / str(step)
        assert_same(elsewhere, step)
        assert CheckpointStore(elsewhere, read_only=True).faults(step) == []
    assert sum(object_store.injected.values()) > 20


def test_retention_holds_in_the_store_too(object_store, folder):
    mirror = Mirror(
        url_of(object_store), folder, retention=Retention(keep=1, best="val_loss")
    )
    for step in (1, 2, 3):
        mirror.push(step)
        mirror.wait()
    assert mirror.steps() == [1, 3]
    assert not any("/2/" in key for key in object_store.keys())
    mirror.prune({3})
    assert mirror.steps() == [3]
    assert not any("/1/" in key for key in object_store.keys())


def test_multiples_stay_in_the_store(object_store, folder):
    asked = Retention(keep=1, keep_every=2)
    mirror = Mirror(url_of(object_store), folder, retention=asked)
    for step in (1, 2, 3):
        mirror.push(step)
        mirror.wait()
    assert mirror.steps() == [2, 3]


def test_killed_during_an_upload_shows_no_half_step(object_store, folder):
    url = url_of(object_store)
    first = Mirror(url, folder)
    first.push(1)
    first.wait()
    object_store.faults, object_store.delay_s = {"delay": 1.0}, 0.3
    process = subprocess.Popen(
        [sys.executable, "-c", PUSH, url, str(folder), "3"], env=dict(os.environ)
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any("/one/3/" in key for key in object_store.keys()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what it had sent may still arrive
    object_store.faults = {}
    seen = Mirror(url, folder, read_only=True)
    assert seen.steps() == [1]
    with pytest.raises(CheckpointError, match=r"no checkpoint 3 in .* there: 1\."):
        seen.fetch_checked(3)
    after = Mirror(url, folder)
    assert not any("/one/3/" in key for key in object_store.keys())
    after.push(3)
    after.wait()
    assert after.steps() == [1, 3]


def test_a_killed_fetch_is_finished_by_the_next(object_store, folder, tmp_path):
    mirror = Mirror(url_of(object_store), folder)
    mirror.push(2)
    mirror.wait()
    elsewhere = tmp_path / "elsewhere"
    half = elsewhere / ".fetch-2"
    shutil.copytree(folder / "2", half)
    (half / "checksums.json").write_text("cut sh")
    object_store.requests.clear()
    again = Mirror(url_of(object_store), elsewhere, read_only=True)
    again.fetch(2)
    assert_same(elsewhere, 2)
    assert sum("/one/2/" in one for one in object_store.requests) == 1


def test_a_store_that_is_down_costs_a_warning_and_the_last_save_the_run(
    object_store, folder, monkeypatch
):
    monkeypatch.setenv("LLMOS_STORE_PATIENCE_S", "0.5")
    said = []
    mirror = Mirror(url_of(object_store), folder, say=said.append)
    object_store.faults = {"slow_down": 1.0}
    mirror.push(1)
    mirror._join()
    assert len(said) == 1
    assert "checkpoint 1 is not in s3://" in said[0]
    object_store.faults = {}
    mirror.push(2)
    mirror.wait()
    assert mirror.steps() == [1, 2]
    object_store.faults = {"slow_down": 1.0}
    mirror.push(3)
    with pytest.raises(StoreError, match=r"checkpoint 3 is not in .*/3; run again"):
        mirror.wait()


def test_a_second_run_on_one_url_ends_the_first(object_store, folder):
    first = Mirror(url_of(object_store), folder)
    second = Mirror(url_of(object_store), folder)
    second.push(1)
    second.wait()
    first.push(2)
    with pytest.raises(StoreError, match="another run writes its checkpoints to"):
        first.wait()
    with pytest.raises(StoreError, match="another run"):
        first.push(3)
    assert second.steps() == [1]


@pytest.mark.parametrize("how", ["altered", "missing", "page"])
def test_a_checkpoint_damaged_in_the_store_is_named(
    object_store, folder, tmp_path, how
):
    url = url_of(object_store)
    mirror = Mirror(url, folder)
    mirror.push(1)
    mirror.wait()
    name = f"{url}/1/checksums.json"
    if how == "altered":
        text = stores.read_bytes(name)
        stores.write_bytes(name, text[:-2] + b" }")
    elif how == "missing":
        stores.delete(name)
    else:
        stores.write_bytes(f"{url}/committed/1.json", b"{}")
    wanted = (
        "committed/1.json is damaged" if how == "page" else f"checksums.json .*{how}"
    )
    with pytest.raises(CheckpointError, match=wanted):
        Mirror(url, tmp_path / "elsewhere", read_only=True).fetch(1)
    assert not (tmp_path / "elsewhere" / "1").exists()


def test_a_step_that_is_written_anew_is_not_committed_meanwhile(object_store, folder):
    mirror = Mirror(url_of(object_store), folder)
    mirror.push(1)
    mirror.wait()
    object_store.faults, object_store.only = {"denied": 1.0}, "PUT"
    mirror.push(1)
    mirror._join()
    assert mirror.steps() == []


def test_bring_fetches_the_latest_and_mends_its_copy(object_store, folder):
    url = url_of(object_store)
    mirror = Mirror(url, folder)
    for step in (1, 3):
        mirror.push(step)
    mirror.wait()
    path = bring(url)
    assert path.name == "3"
    assert_same(path.parent, 3)
    assert bring(f"{url}/1").name == "1"
    (path / "checksums.json").write_text("{}")
    assert (bring(url) / "checksums.json").read_bytes() != b"{}"
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        bring(f"{object_store.url}/runs/two")


def test_a_new_machine_catches_up_with_the_store(object_store, folder, tmp_path):
    mirror = Mirror(url_of(object_store), folder)
    mirror.push(1)
    mirror.push(2)
    mirror.wait()
    fresh = Mirror(url_of(object_store), tmp_path / "fresh")
    fresh.catch_up()
    assert CheckpointStore(tmp_path / "fresh", read_only=True).steps() == [2]
    assert_same(tmp_path / "fresh", 2)


def test_the_store_catches_up_with_a_run_that_was_killed(object_store, folder):
    mirror = Mirror(url_of(object_store), folder)
    mirror.push(1)
    mirror.wait()
    again = Mirror(url_of(object_store), folder)
    again.catch_up()
    again.wait()
    assert again.steps() == [1, 3]
