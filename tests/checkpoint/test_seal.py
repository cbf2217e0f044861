"""Whatever happens to a file of a checkpoint is told, with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small

from llmos_jax import doctor
from llmos_jax.checkpoint import CheckpointStore, find_checkpoint, inspect, seal
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.training import open_folder

KINDS = {
    "the index of the arrays": "params/manifest.ocdbt",
    "a tree of the arrays": "params/d/*",
    "the arrays": "params/ocdbt.process_0/d/*",
    "a process's index": "params/ocdbt.process_0/manifest.ocdbt",
    "names and shapes": "params/_METADATA",
    "where arrays lay": "params/_sharding",
    "the optimizer": "optimizer/ocdbt.process_0/d/*",
    "the optimizer's names": "optimizer/_METADATA",
    "the manifest": "manifest/metadata",
    "the tokenizer": "tokenizer/metadata",
    "Orbax's page": "_CHECKPOINT_METADATA",
}


@pytest.fixture
def run(small_run, tmp_path):
    """A finished run that may be spoilt."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def spoil(run, pattern, how, step=20):
    """Damage the largest file of a kind; return its name."""
    folder = run / "checkpoints" / str(step)
    path = max(folder.glob(pattern), key=lambda file: file.stat().st_size)
    raw = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    return path.relative_to(folder).as_posix()


@pytest.mark.parametrize("how", ["altered", "cut short", "missing"])
@pytest.mark.parametrize("pattern", KINDS.values(), ids=KINDS)
def test_a_spoilt_file_is_named(run, pattern, how):
    name = spoil(run, pattern, how)
    report = inspect(str(run))
    assert report["damaged"] == [20]
    (fault,) = report["steps"][-1]["faults"]
    assert fault.startswith(name) and how in fault


def test_spoilt_checksums_are_named_as_such(run):
    folder = run / "checkpoints" / "20"
    page = json.loads((folder / "checksums.json").read_text())
    page["files"]["manifest/metadata"]["sha256"] = "0" * 64
    (folder / "checksums.json").write_text(json.dumps(page))
    assert inspect(str(folder))["steps"][0]["faults"] == ["checksums.json was altered"]


def test_a_whole_run_is_verified_step_by_step(run):
    report = inspect(str(run))
    assert report["steps_kept"] == [10, 20] and report["damaged"] == []
    assert [one["step"] for one in report["steps"]] == [10, 20]
    assert all(one["sealed"] and one["bytes"] > 1000 for one in report["steps"])
    assert report["arrays"]["layers.attention.q"] == ["float32", [2, 64, 8, 16]]
    assert report["step"] == 20 and "loss" in report["metrics"]


def test_one_step_alone_may_be_asked_for(run):
    spoil(run, "manifest/metadata", "altered")
    assert inspect(str(run / "checkpoints" / "10"))["damaged"] == []


@pytest.mark.parametrize("how", ["cut short", "missing"])
def test_who_opens_a_checkpoint_sees_that_a_file_is_not_whole(run, how):
    name = spoil(run, "optimizer/ocdbt.process_0/d/*", how)
    with pytest.raises(CheckpointError, match=rf"20 cannot be read: {name} (is|was)"):
        find_checkpoint(str(run))


def test_a_checkpoint_without_checksums_is_read_instead(run):
    folder = run / "checkpoints" / "20"
    (folder / "checksums.json").unlink()
    (one,) = inspect(str(folder))["steps"]
    assert one["sealed"] is False and one["faults"] == []
    for path in folder.glob("params/ocdbt.process_0/d/*"):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 3])
    (one,) = inspect(str(folder))["steps"]
    assert len(one["faults"]) == 1


def test_sealing_again_changes_nothing(run):
    folder = run / "checkpoints" / "20"
    before = (folder / "checksums.json").read_bytes()
    seal(folder)
    assert (folder / "checksums.json").read_bytes() == before


def test_doctor_exits_1_and_names_the_file(run, capsys):
    assert doctor.main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["damaged"] == []
    name = spoil(run, "params/ocdbt.process_0/d/*", "altered")
    assert doctor.main([str(run)]) == 1
    out, err = capsys.readouterr()
    assert f"fail  step 20            {name} was altered" in out
    assert "ok    step 10" in out
    assert "error: step 20 is damaged (1 fault); go on from step 10" in err


def opened(run, small_model, text_file, **more):
    config = small.config_of(small.overrides(run, small_model, text_file, **more))
    with open_folder(config) as folder:
        return folder.resume_step


def test_a_damaged_checkpoint_is_not_gone_on_from(run, small_model, text_file):
    name = spoil(run, "params/d/*", "altered")
    with pytest.raises(CheckpointError, match="20 is damaged") as error:
        opened(run, small_model, text_file)
    assert name in str(error.value)
    assert "checkpoint.on_damage=previous" in str(error.value)
    assert (run / "checkpoints" / "20").is_dir(), "it is left as it is"


def test_the_one_before_is_used_where_the_user_allows_it(
    run, small_model, text_file, capsys
):
    name = spoil(run, "params/d/*", "altered")
    more = {"checkpoint__on_damage": "previous"}
    assert opened(run, small_model, text_file, **more) == 10
    said = capsys.readouterr().err
    assert f"checkpoint 20 is damaged ({name} was altered)" in said
    assert "goes on from step 10" in said
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["10", "20.damaged"]
    assert inspect(str(run))["set_aside"] == ["20.damaged"]


def test_no_whole_checkpoint_is_no_fresh_start(run, small_model, text_file):
    spoil(run, "params/d/*", "altered", step=10)
    spoil(run, "params/d/*", "missing", step=20)
    with pytest.raises(CheckpointError, match="20 is damaged.*No other is whole"):
        opened(run, small_model, text_file, checkpoint__on_damage="previous")
    assert (run / "checkpoints" / "20").is_dir()


def test_two_damaged_steps_of_one_number_are_both_kept(run):
    store = CheckpointStore(run / "checkpoints")
    shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "20.damaged")
    assert store.set_aside(20).name == "20.damaged2"
    assert store.steps() == [10]
    store.close()


def test_checkpoints_may_lie_elsewhere(run, tmp_path, small_model, text_file):
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    more = {"checkpoint__dir": elsewhere}
    assert opened(run, small_model, text_file, **more) == 20
    config = run / "config.toml"
    config.write_text(
        config.read_text().replace("[checkpoint]", f'[checkpoint]\ndir = "{elsewhere}"')
    )
    assert find_checkpoint(str(run)).step == 20


def test_two_runs_may_not_share_a_folder(run, tmp_path, small_model, text_file):
    config = small.config_of(small.overrides(run, small_model, text_file))
    with open_folder(config):
        with pytest.raises(ConfigError, match=r"is in use: process \d+ on "):
            open_folder(config)
    with open_folder(config):
        assert (run / "lock").is_file()
    assert not (run / "lock").exists()
