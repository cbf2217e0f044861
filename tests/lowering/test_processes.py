"""Two processes of two devices train as one process does, and hand over to it."""

from __future__ import annotations

import json
import signal
import socket
import time

import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE

PATIENCE_S = 180


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_two(texts):
    words = ["-m", "llmos_jax.train", *small.flags(texts), "--json"]
    address = f"127.0.0.1:{free_port()}"
    return [
        small.start(
            words,
            devices=2,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]


def finish(processes):
    """Wait for all; return what each printed."""
    try:
        outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    return [json.loads(stdout) for stdout, _ in outputs]


@pytest.fixture(scope="module")
def two(tmp_path_factory, small_model, text_file):
    """A finished run of two processes: its folder and its first process's report."""
    folder = tmp_path_factory.mktemp("two") / "run"
    texts = small.overrides(folder, small_model, text_file)
    report, silent = finish(start_two(texts))
    assert silent == {}, "only the first process speaks"
    return folder, report


def test_two_processes_give_the_losses_of_one(two, small_run):
    found, wanted = small.losses(two[0]), small.losses(small_run)
    assert len(found) == 20
    np.testing.assert_allclose(found, wanted, rtol=FLOAT32_RELATIVE)


def test_two_processes_score_the_text_as_one(two, small_run):
    alone = json.loads((small_run / "report.json").read_text())
    assert two[1]["val_loss"] == pytest.approx(alone["val_loss"], rel=FLOAT32_RELATIVE)


def test_one_process_reads_what_two_saved(two, small_run):
    found, wanted = small.arrays(two[0], 20), small.arrays(small_run, 20)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-2, atol=1e-5)


def test_one_process_goes_on_where_two_stopped(
    two, small_run, tmp_path, small_model, text_file
):
    folder = copy_until(two[0], tmp_path / "run", 10)
    report = small.train(small.overrides(folder, small_model, text_file))
    assert report["resumed_from"] == 10
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(
    small_run, tmp_path, small_model, text_file
):
    folder = copy_until(small_run, tmp_path / "run", 10)
    report, _ = finish(start_two(small.overrides(folder, small_model, text_file)))
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
    processes = start_two(small.overrides(folder, small_model, text_file, **many))
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


def copy_until(source, target, step):
    """A run folder as it was when checkpoint `step` was its latest."""
    import shutil

    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    (target / "report.json").unlink()
    return target
