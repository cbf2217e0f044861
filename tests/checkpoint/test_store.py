"""Checkpoints come back bit for bit on any mesh, and say plainly when they cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small

from llmos_jax import models, training
from llmos_jax.checkpoint import (
    CheckpointStore,
    Manifest,
    Retention,
    check_same_model,
    find_checkpoint,
    inspect,
    open_checkpoint,
    require_space,
)
from llmos_jax.config import load_model
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import CheckpointError, PlanMismatch


def session_on(small_model, text_file, folder, **mesh):
    pins = {f"plan__mesh__{axis}": size for axis, size in mesh.items()}
    config = small.config_of(small.overrides(folder, small_model, text_file, **pins))
    skeleton = models.skeleton(load_model(str(small_model)))
    return training.open_session(skeleton, plan_of(config), config)


def manifest_of(spec, step=3):
    return Manifest(
        step=step,
        model=spec,
        plan_fingerprint="0123456789abcdef",
        mesh={"data": 1, "fsdp": 8},
        data={"step": step, "tokens": "abc", "seed": 0},
        metrics={"loss": 2.5},
        made_by={"jax": "1"},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_model, text_file):
    """A state saved from fsdp=8, whole on the host, and where it lies."""
    folder = tmp_path_factory.mktemp("saved")
    session = session_on(small_model, text_file, folder, fsdp=8)
    state = session.fresh()
    store = CheckpointStore(folder / "checkpoints")
    manifest = manifest_of(session.skeleton.spec)
    store.save(manifest, state.params, state.optimizer, '{"a": 1}')
    store.close()
    return folder, {path: np.asarray(x) for path, x in state.params.items()}


def test_a_checkpoint_of_one_mesh_comes_back_on_another(saved, small_model, text_file):
    folder, whole = saved
    session = session_on(small_model, text_file, folder, data=4, tensor=2)
    store = CheckpointStore(folder / "checkpoints", read_only=True)
    state = session.restore(store, 3)
    assert int(state.step) == 3
    for path, value in whole.items():
        placed = state.params[path]
        assert placed.sharding == session.param_shardings[path]
        assert np.asarray(placed).tobytes() == value.tobytes(), path
    heads = state.params["layers.attention.q"]
    assert {shard.data.shape for shard in heads.addressable_shards} == {(2, 64, 4, 16)}


def test_one_device_reads_what_eight_saved(saved):
    folder, whole = saved
    found = small.arrays(folder, 3)
    for path, value in whole.items():
        assert found[f"['params']['{path}']"].tobytes() == value.tobytes()


def test_a_manifest_comes_back_as_it_was(saved, small_model):
    found = find_checkpoint(str(saved[0]))
    assert found.store.manifest(3) == manifest_of(load_model(str(small_model)))
    assert json.loads(found.store.tokenizer_json(3)) == {"a": 1}


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/3"])
def test_a_run_its_checkpoints_or_one_step_may_be_named(saved, inside):
    assert find_checkpoint(str(saved[0] / inside)).step == 3


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("ffn_dim", 256, "ffn_dim 256 against 128"),
        ("rope_theta", 5e5, "rope_theta 500000.0 against 10000.0"),
    ],
)
def test_a_foreign_model_is_refused_by_the_names_of_its_fields(
    tiny, field, value, told
):
    from dataclasses import replace

    foreign = manifest_of(replace(tiny, **{field: value}, name="other"))
    with pytest.raises(PlanMismatch, match=told) as problem:
        check_same_model(foreign, tiny, "runs/x")
    assert "runs/x holds model other" in str(problem.value)


def test_a_name_and_a_longer_context_make_no_foreign_model(tiny):
    from dataclasses import replace

    same = replace(tiny, name="renamed", source="elsewhere", max_seq_len=4096)
    check_same_model(manifest_of(same), tiny, "runs/x")


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist. Give a run folder"):
        find_checkpoint(str(tmp_path / "nothing"))


def test_an_empty_folder_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        find_checkpoint(str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "looking leaves no trace"


def test_a_file_is_no_checkpoint(text_file):
    with pytest.raises(CheckpointError, match="is a file, not a run folder"):
        find_checkpoint(str(text_file))


def test_a_half_written_checkpoint_is_not_seen(saved, tmp_path):
    """Orbax writes under a temporary name; what a kill leaves is passed over."""
    run = Path(shutil.copytree(saved[0], tmp_path / "run"))
    left = run / "checkpoints" / "5.orbax-checkpoint-tmp-1700000000"
    left.mkdir()
    (left / "params").mkdir()
    assert find_checkpoint(str(run)).step == 3
    store = CheckpointStore(run / "checkpoints")
    assert store.steps() == [3]


@pytest.fixture
def damaged(small_run, tmp_path):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    files = [path for path in (run / "checkpoints" / "20").rglob("*") if path.is_file()]
    return run, files


def test_arrays_cut_short_are_one_clear_error(damaged):
    run, files = damaged
    for path in files:
        if path.parts[-2] == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(
        CheckpointError, match=r"checkpoints/20 cannot be read"
    ) as error:
        open_checkpoint(str(run)).params()
    assert "\n" not in str(error.value)


def test_arrays_that_were_altered_are_one_clear_error(damaged):
    run, files = damaged
    for path in files:
        if path.parts[-2] == "d":
            raw = bytearray(path.read_bytes())
            middle = len(raw) // 2
            raw[middle : middle + 64] = bytes(byte ^ 0xFF for byte in raw[middle:][:64])
            path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=r"checkpoints/20 cannot be read"):
        small.arrays(run, 20)


@pytest.mark.parametrize("item", ["manifest", "tokenizer"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"a": 1}'])
def test_a_damaged_page_of_json_is_one_clear_error(damaged, item, content):
    run, files = damaged
    (page,) = [
        path for path in files if path.parts[-2] == item and path.name == "metadata"
    ]
    page.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoints/20 cannot be read"):
        open_checkpoint(str(run))


def test_an_earlier_step_is_read_when_it_is_named(damaged):
    run, _ = damaged
    shutil.rmtree(run / "checkpoints" / "20")
    assert open_checkpoint(str(run)).step == 10
    assert inspect(str(run))["steps_kept"] == [10]


def test_space_is_asked_for_before_anything_is_trained(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 3000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    state = {"w": np.zeros(250, np.float32)}
    require_space(tmp_path, state, Retention(keep=2))
    with pytest.raises(CheckpointError, match=r"no disk space.*3\.91 KiB wanted"):
        require_space(tmp_path, state, Retention(keep=3))
    (tmp_path / "held").write_bytes(bytes(1000))
    require_space(tmp_path, state, Retention(keep=3))
