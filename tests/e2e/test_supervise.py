"""`train --supervise`: whatever happens to the run, it ends as one that nothing befell.

Quick tests supervise small programs that behave as a run does; the others, real runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import small

from llmos_jax.config import load_config
from llmos_jax.errors import TrainingError
from llmos_jax.supervise import Supervisor
from llmos_jax.telemetry.goodput import read_rows

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240
STEPS = 400

BEATING = """
import os, signal, sys, time
from pathlib import Path
from llmos_jax.telemetry import open_heartbeat
heartbeat = open_heartbeat()
tries = Path(sys.argv[1]) / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
count = len(tries.read_text())
"""
"""What a run does first; `count` is the number of this start, from 1."""


def supervised(folder, code, lines=None, **more):
    """A Supervisor of Python code; `lines` collects what it says."""
    values = {
        "run.dir": folder,
        "supervise.backoff_s": 0.01,
        "supervise.restarts": 3,
        "supervise.hang_s": 1,
        "checkpoint.grace_s": 0.5,
    } | {key.replace("__", "."): value for key, value in more.items()}
    config = load_config(None, ["model=tiny", *(f"{k}={v}" for k, v in values.items())])
    command = [sys.executable, "-c", BEATING + textwrap.dedent(code), str(folder)]
    os.environ["PYTHONPATH"] = str(ROOT)
    return Supervisor(
        command, config.config, [].append if lines is None else lines.append
    )


@pytest.fixture(autouse=True)
def path_to_the_house(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("code", [0, 2, 3])
def test_an_answer_is_passed_on(tmp_path, code):
    ended = supervised(tmp_path, f"print('told'); sys.exit({code})").keep()
    assert (ended.code, ended.stdout) == (code, "told")
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("sys.exit(1)", "ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        (
            "heartbeat.failed(RuntimeError('no such chip')); sys.exit(1)",
            "failed: no such chip",
        ),
    ],
)
def test_a_run_that_always_fails_is_given_up(tmp_path, end, told):
    with pytest.raises(TrainingError, match=told) as found:
        supervised(tmp_path, end).keep()
    assert "4 failures in a row without a new checkpoint" in str(found.value)
    assert (tmp_path / "tries").read_text() == "xxxx"


def test_a_new_checkpoint_is_a_new_hope(tmp_path):
    lines = []
    code = """
    heartbeat.resumed_from = 10 * count
    heartbeat.beat("stepping")
    sys.exit(1 if count < 8 else print("done"))
    """
    assert supervised(tmp_path, code, lines).keep().stdout == "done"
    assert all("1 of 3" in line for line in lines if "again" in line)


def test_a_loss_that_is_no_number_is_tried_once_more_only(tmp_path):
    code = """
    from llmos_jax.errors import TrainingError
    heartbeat.failed(TrainingError("at step 7 the loss became nan."))
    sys.exit(1)
    """
    lines = []
    with pytest.raises(TrainingError, match="step 7 the loss became nan. It would"):
        supervised(tmp_path, code, lines).keep()
    assert (tmp_path / "tries").read_text() == "xx"
    assert "it may well fail again" in lines[1]


def test_a_hang_is_ended_and_says_where_it_stood(tmp_path):
    code = """
    def wait_for_ever():
        time.sleep(1000)
    if count == 1:
        for step in range(1, 20):
            heartbeat.stepped(step, 0.1)
            time.sleep(0.1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_ever()
    print("done")
    """
    lines = []
    began = time.monotonic()
    assert supervised(tmp_path, code, lines).keep().stdout == "done"
    assert time.monotonic() - began < 15
    assert "in wait_for_ever" in (tmp_path / "hang-1.txt").read_text()
    assert "hung after step" in lines[1] and "hang-1.txt" in lines[1]


def test_slow_steps_are_no_hang(tmp_path):
    code = """
    for step in range(1, 6):
        time.sleep(0.4)
        heartbeat.stepped(step, 0.4)
    time.sleep(2.5)
    print("done")
    """
    assert supervised(tmp_path, code).keep().stdout == "done"
    assert (tmp_path / "tries").read_text() == "x"


def test_a_signal_goes_to_the_run_whose_answer_is_passed_on(tmp_path):
    code = """
    signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
    Path(sys.argv[1], "ready").touch()
    time.sleep(60)
    """

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert supervised(tmp_path, code).keep().stdout == "saved"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_between_two_starts_is_obeyed(tmp_path):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(TrainingError, match="stopped by SIGINT"):
        supervised(tmp_path, "sys.exit(1)", supervise__backoff_s=60).keep()


def test_a_run_whose_supervisor_is_gone_asks_itself_to_stop(tmp_path):
    code = """
    def note(*_):
        Path(sys.argv[1], "stopped").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, note)
    while True:
        heartbeat.beat("stepping")
        Path(sys.argv[1], "ready").touch()
        time.sleep(0.05)
    """
    keeper = small.start(
        f"import sys; sys.path.insert(0, 'tests/e2e')\n"
        f"from test_supervise import supervised\n"
        f"supervised(__import__('pathlib').Path({str(tmp_path)!r}), {code!r}).keep()"
    )
    wait_until((tmp_path / "ready").exists)
    keeper.kill()
    wait_until((tmp_path / "stopped").exists)
    keeper.communicate()


def wait_until(true, patience_s=PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Real runs.


def start_train(texts, *flags, devices=1, **environment):
    words = ["-m", "llmos_jax.train", *small.flags(texts), *flags]
    return small.start(words, devices=devices, **environment)


def steps_done(folder):
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def child_of(process):
    (child,) = psutil.Process(process.pid).children()
    return child


@pytest.fixture
def texts(tmp_path, small_model, text_file):
    """A run of a few hundred steps on one device: some seconds."""
    return small.overrides(
        tmp_path / "run",
        small_model,
        text_file,
        train__steps=STEPS,
        checkpoint__every=100,
        supervise__backoff_s=0.1,
        supervise__hang_s=3,
        checkpoint__grace_s=1,
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_by_itself(tmp_path, texts):
    folder = tmp_path / "run"
    process = start_train(texts, "--supervise", "--json")
    try:
        wait_until(lambda: steps_done(folder) >= 130)
        child_of(process).kill()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, stderr[-3000:]
    report = json.loads(stdout)
    assert report["steps"] == STEPS == len(small.losses(folder))
    assert report["resumed_from"] >= 100 and report["goodput_s"]["down"] > 0
    assert "was killed by SIGKILL" in stderr


@pytest.mark.slow
def test_a_kill_and_a_hang_change_nothing(tmp_path, texts):
    straight = start_train([*texts, f"run.dir={tmp_path / 'straight'}"])
    straight.communicate(timeout=PATIENCE_S)
    folder = tmp_path / "run"
    process = start_train(texts, "--supervise", "--json")
    try:
        kill_at, hang_at = random.randint(110, 190), random.randint(210, 350)
        wait_until(lambda: steps_done(folder) >= kill_at)
        killed = child_of(process)
        killed.kill()
        wait_until(lambda: not killed.is_running())
        wait_until(lambda: steps_done(folder) < kill_at)
        wait_until(lambda: steps_done(folder) >= hang_at)
        child_of(process).suspend()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, stderr[-3000:]
    report = json.loads(stdout)
    assert report["steps"] == STEPS and report["resumed_from"] >= 100
    assert "was killed by SIGKILL" in stderr and "hung after step" in stderr
    assert small.losses(folder) == small.losses(tmp_path / "straight")
    seconds = report["goodput_s"]
    assert seconds["down"] > 3
    rows = read_rows(folder / "goodput.jsonl")
    assert [row["sitting"] for row in rows if "ended" in row] == [3]
    wall_s = rows[-1]["at"] - rows[0]["began"]
    assert sum(seconds.values()) == pytest.approx(wall_s, abs=5), "less the report"


def test_a_wrong_config_is_told_once(tmp_path, texts):
    process = start_train([*texts, "data.train=/nowhere"], "--supervise", "--json")
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "/nowhere does not exist" in json.loads(stdout)["error"]
    assert stderr.count("started process") == stderr.count("error:") == 1


@pytest.mark.slow
def test_sigterm_saves_and_a_new_start_goes_on(tmp_path, texts):
    folder = tmp_path / "run"
    endless = [*texts, "train.steps=4000", "checkpoint.grace_s=60"]
    process = start_train(endless, "--supervise", "--json")
    try:
        wait_until(lambda: steps_done(folder) >= 20)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    report = json.loads(stdout)
    assert (process.returncode, report.get("stopped_by")) == (0, "SIGTERM"), stderr[
        -2000:
    ]
    again = start_train([*texts, f"train.steps={report['steps'] + 5}"], "--json")
    stdout, _ = again.communicate(timeout=PATIENCE_S)
    assert json.loads(stdout)["resumed_from"] == report["steps"]


@pytest.mark.slow
def test_of_two_processes_each_has_its_supervisor(tmp_path, texts):
    from processes import free_port

    folder, address = tmp_path / "run", f"127.0.0.1:{free_port()}"
    processes = [
        start_train(
            [*texts, "supervise.hang_s=30"],
            *("--supervise", "--json"),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
            LLMOS_SILENCE_S="5",
        )
        for index in range(2)
    ]
    try:
        wait_until(lambda: steps_done(folder) >= 130)
        child_of(processes[1]).kill()
        outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "\n".join(stderr[-2000:] for _, stderr in outputs)
    assert [process.returncode for process in processes] == [0, 0], errors
    report = json.loads(outputs[0][0])
    assert report["steps"] == STEPS and report["resumed_from"] >= 100
    assert json.loads(outputs[1][0]) == {}
    assert small.losses(folder)


def test_the_supervisor_is_free_of_jax():
    code = (
        "import sys, llmos_jax.train, llmos_jax.supervise; print('jax' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr
