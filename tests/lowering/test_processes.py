"""Several processes train as one process does, and hand over to any other number."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE
from processes import PATIENCE_S, copy_until, finish, start_many

MESHES = [
    pytest.param(2, {"fsdp": 4}, id="2-fsdp4"),
    pytest.param(2, {"data": 2, "fsdp": 2}, id="2-data2-fsdp2"),
    pytest.param(2, {"tensor": 4}, id="2-tensor4"),
    pytest.param(4, {"fsdp": 4, "tensor": 2}, id="4-fsdp4-tensor2"),
    pytest.param(4, {"data": 8}, id="4-data8"),
    pytest.param(2, {"stage": 2, "fsdp": 2}, id="2-stage2-fsdp2"),
    pytest.param(4, {"context": 4, "tensor": 2}, id="4-context4-tensor2"),
]
"""(processes of two devices each, pinned mesh): every axis that crosses processes."""

NOTE_ROWS = """
import json, os, sys
from pathlib import Path
from llmos_jax import train
from llmos_jax.data import batches
read, plain = set(), batches.RowSource.__getitem__
def noted(self, row):
    read.add(row)
    return plain(self, row)
batches.RowSource.__getitem__ = noted
code = train.main(sys.argv[1:])
Path(os.environ["ROWS"], os.environ["JAX_PROCESS_ID"]).write_text(json.dumps([*read]))
sys.exit(code)
"""
"""`train`, and a file that says which rows of the text this process read."""


@pytest.fixture(scope="module")
def two(tmp_path_factory, small_model, text_file):
    """A finished run of two processes: its folder and its first process's report."""
    folder = tmp_path_factory.mktemp("two") / "run"
    texts = small.overrides(folder, small_model, text_file)
    report, silent = finish(start_many(texts))
    assert silent == {}, "only the first process speaks"
    return folder, report


@pytest.fixture(scope="module")
def four(tmp_path_factory, small_model, text_file):
    """A finished run of four processes of one device: its folder, and whose rows."""
    folder = tmp_path_factory.mktemp("four")
    texts = small.overrides(
        folder / "run", small_model, text_file, plan__mesh__fsdp=4, plan__mesh__data=1
    )
    codes = dict.fromkeys(range(4), NOTE_ROWS)
    finish(start_many(texts, 4, devices=1, codes=codes, ROWS=str(folder)))
    rows = [json.loads((folder / str(index)).read_text()) for index in range(4)]
    return folder / "run", rows


@pytest.mark.parametrize(
    "folder", [pytest.param("two", marks=pytest.mark.slow), "four"]
)
def test_processes_give_the_losses_of_one(folder, request, small_run):
    run = request.getfixturevalue(folder)[0]
    found, wanted = small.losses(run), small.losses(small_run)
    assert len(found) == 20
    np.testing.assert_allclose(found, wanted, rtol=FLOAT32_RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), MESHES)
def test_every_mesh_across_processes_gives_the_losses_of_one(
    count, mesh, tmp_path, small_model, text_file, small_run
):
    pins = {f"plan__mesh__{axis}": size for axis, size in mesh.items()}
    folder = tmp_path / "run"
    texts = small.overrides(
        folder, small_model, text_file, train__eval_batches=1, **pins
    )
    finish(start_many(texts, count))
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


def test_each_process_reads_its_own_rows_alone(four):
    rows = [set(read) for read in four[1]]
    assert all(20 * 2 <= len(read) <= 24 * 2 for read in rows), "2 a step, some ahead"
    assert len(set.union(*rows)) == sum(len(read) for read in rows)


@pytest.mark.slow
def test_two_processes_score_the_text_as_one(two, small_run):
    alone = json.loads((small_run / "report.json").read_text())
    assert two[1]["val_loss"] == pytest.approx(alone["val_loss"], rel=FLOAT32_RELATIVE)


@pytest.mark.parametrize(
    "folder", [pytest.param("two", marks=pytest.mark.slow), "four"]
)
def test_one_process_reads_what_several_saved(folder, request, small_run):
    run = request.getfixturevalue(folder)[0]
    found, wanted = small.arrays(run, 20), small.arrays(small_run, 20)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    "before", [pytest.param("two", marks=pytest.mark.slow), "four"]
)
def test_one_process_goes_on_where_several_stopped(
    before, request, small_run, tmp_path, small_model, text_file
):
    run = request.getfixturevalue(before)[0]
    folder = copy_until(run, tmp_path / "run", 10)
    report = small.train(small.overrides(folder, small_model, text_file))
    assert report["resumed_from"] == 10
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


@pytest.mark.slow
def test_two_processes_go_on_where_four_stopped(
    four, small_run, tmp_path, small_model, text_file
):
    folder = copy_until(four[0], tmp_path / "run", 10)
    report, _ = finish(start_many(small.overrides(folder, small_model, text_file)))
    assert report["resumed_from"] == 10
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(
    small_run, tmp_path, small_model, text_file
):
    folder = copy_until(small_run, tmp_path / "run", 10)
    report, _ = finish(start_many(small.overrides(folder, small_model, text_file)))
    assert report["resumed_from"] == 10
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_saved_step(
    tmp_path, small_model, text_file
):
    folder = tmp_path / "run"
    many = {"train__steps": 100_000, "checkpoint__every": 100_000}
    processes = start_many(small.overrides(folder, small_model, text_file, **many))
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        if processes[0].poll() is not None or time.monotonic() > deadline:
            finish(processes)  # says what went wrong
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    report, _ = finish(processes)
    assert report["stopped_by"] == "SIGTERM"
    assert (folder / "checkpoints" / str(report["steps"]) / "manifest").is_dir()
    assert len(small.losses(folder)) == report["steps"] < 100_000
