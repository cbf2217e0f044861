"""One process gone: all others stop in time with one line, and a new start goes on."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE
from processes import PATIENCE_S, start_many

SILENCE_S = 5
BOUND_S = 1.4 * SILENCE_S + 3
"""As peers.py says."""

VICTIM = """
import os, signal, sys, time
from pathlib import Path
from llmos_jax import train
from llmos_jax.training import loop
run, plain = Path(os.environ["RUN"]), loop._stop_reason
def fatal(step, *others):
    if step == 13:
        while not (run / "checkpoints/10/manifest").is_dir():
            time.sleep(0.02)
        os.kill(os.getpid(), getattr(signal, os.environ["FATE"]))
    return plain(step, *others)
loop._stop_reason = fatal
sys.exit(train.main(sys.argv[1:]))
"""
"""`train`, which sends itself the signal FATE at step 13, when step 10 is saved."""

FAILING = """
import sys
from llmos_jax import train
from llmos_jax.errors import CheckpointError
from llmos_jax.training import loop
def failing(step, *others):
    raise CheckpointError("the disk of this host is full.")
loop._stop_reason = failing
sys.exit(train.main(sys.argv[1:]))
"""

JOIN = """
import jax
from llmos_jax.errors import LowerError
from llmos_jax.lowering import join_processes
try:
    join_processes(patience_s=1)
except LowerError as problem:
    print(problem, flush=True)
"""


def errors_of(process):
    """Wait; return the exit code and the `error:` lines, which no traceback joins."""
    _, text = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in text, text[-3000:]
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    return process.returncode, lines


def stop(processes):
    for process in processes:
        process.kill()


@pytest.mark.parametrize(
    ("victim", "fate"),
    [
        pytest.param(1, "SIGKILL", id="worker-killed"),
        pytest.param(0, "SIGKILL", id="coordinator-killed", marks=pytest.mark.slow),
        pytest.param(1, "SIGSTOP", id="worker-silent", marks=pytest.mark.slow),
    ],
)
def test_one_process_gone_stops_the_other_and_a_new_start_goes_on(
    victim, fate, tmp_path, small_model, text_file, small_run
):
    folder = tmp_path / "run"
    texts = small.overrides(folder, small_model, text_file)
    fated = {"RUN": str(folder), "FATE": fate, "LLMOS_SILENCE_S": str(SILENCE_S)}
    processes = start_many(texts, codes={victim: VICTIM}, **fated)
    try:
        died_at = wait_for_death(processes[victim])
        code, lines = errors_of(processes[1 - victim])
        assert time.monotonic() - died_at < BOUND_S
    finally:
        stop(processes)
    assert code == 1
    (line,) = lines
    assert f"process {victim} (of 2, counted from 0) stopped answering" in line
    assert f"the run goes on from step 10 in {folder}." in line

    report = small.train(texts)
    assert report["resumed_from"] == 10
    np.testing.assert_allclose(
        small.losses(folder), small.losses(small_run), rtol=FLOAT32_RELATIVE
    )


def wait_for_death(process):
    """Return when the process was dead or stopped."""
    import psutil

    seen = psutil.Process(process.pid)
    deadline = time.monotonic() + PATIENCE_S
    while seen.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
        assert time.monotonic() < deadline, "the victim lives"
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.slow
def test_an_error_of_one_process_is_named_by_all(tmp_path, small_model, text_file):
    texts = small.overrides(tmp_path / "run", small_model, text_file)
    processes = start_many(texts, codes={1: FAILING}, LLMOS_SILENCE_S=str(SILENCE_S))
    try:
        one, other = errors_of(processes[1]), errors_of(processes[0])
    finally:
        stop(processes)
    assert one == (1, ["error: the disk of this host is full."])
    code, (line,) = other
    assert code == 1
    assert "process 1 (of 2, counted from 0) failed: the disk of this host is" in line


def test_a_process_that_never_comes_is_missed_by_number():
    processes = start_many([], 3, codes=dict.fromkeys(range(3), JOIN))
    processes[2].send_signal(signal.SIGKILL)
    try:
        found = [process.communicate(timeout=60) for process in processes[:2]]
    finally:
        stop(processes)
    assert [process.returncode for process in processes[:2]] == [1, 1], found
    assert "only 2 of 3 processes joined" in found[0][0]
    assert "3 processes" in found[1][0] or "no process 0 at" in found[1][0]
    assert not any("Traceback" in stderr for _, stderr in found)


@pytest.mark.parametrize("text", ["soon", "0"])
def test_a_silence_that_is_no_number_is_one_error(monkeypatch, text):
    from llmos_jax.errors import ConfigError
    from llmos_jax.lowering import join_processes

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("LLMOS_SILENCE_S", text)
    with pytest.raises(ConfigError, match=f"LLMOS_SILENCE_S = '{text}'"):
        join_processes()
