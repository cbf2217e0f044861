"""The account of a run's time is whole: no second is lost, none is counted twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmos_jax.telemetry import PHASES, Ledger
from llmos_jax.telemetry.goodput import account, read_rows

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def step(ledger, clock, number, step_s=1.0, wait_s=0.0, *, is_idle=False):
    clock.wait(wait_s)
    ledger.got_batch(is_idle=is_idle)
    clock.wait(step_s)
    ledger.stepped(number)


def shown(goodput):
    return {name: round(s, 6) for name, s in goodput.seconds.items() if s > 1e-3}


def test_every_second_of_a_sitting_is_some_phase(tmp_path, clock):
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, began=time.time() - 3)
    clock.wait(2)
    ledger.enter("restoring")
    clock.wait(1)
    ledger.enter("compiling")
    clock.wait(4)
    ledger.enter("stepping")
    for number in range(1, 11):
        step(ledger, clock, number)
    with ledger.during("saving"):
        clock.wait(0.5)
    with ledger.during("evaluating"):
        clock.wait(1.5)
    ledger.enter("stopping")
    clock.wait(1)
    found = ledger.goodput()
    assert shown(found) == pytest.approx(
        {"starting": 5, "restoring": 1, "compiling": 4, "stepping": 10}
        | {"saving": 0.5, "evaluating": 1.5, "stopping": 1},
        abs=0.1,
    )
    assert found.share == pytest.approx(10 / 23, abs=0.01)
    ledger.close("finished")
    assert account(read_rows(tmp_path / "goodput.jsonl")).seconds == pytest.approx(
        found.seconds, abs=1e-3
    )


def sitting(path, clock, steps, *, resumed, began, ended=None):
    ledger = Ledger(path, clock=clock, began=began)
    ledger.enter("stepping")
    ledger.resumed(resumed)
    for number in steps:
        step(ledger, clock, number, step_s=2.0)
    if ended:
        ledger.close(ended)
    return ledger


def put_back(path, seconds):
    """As if all that is in the file had been so much earlier."""
    rows = [
        {**row, "began": row["began"] - seconds, "at": row["at"] - seconds}
        for row in read_rows(path)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_done_again_after_a_crash_are_no_goodput(tmp_path, clock):
    path, now = tmp_path / "goodput.jsonl", time.time()
    sitting(path, clock, range(1, 14), resumed=0, began=now)
    put_back(path, 1000)
    second = sitting(path, clock, range(11, 21), resumed=10, began=now)
    found = second.goodput()
    assert found.seconds["repeated"] == pytest.approx(6)
    assert found.seconds["stepping"] == pytest.approx(26 + 14)
    assert found.seconds["down"] == pytest.approx(1000 - 26, abs=0.1)
    assert found.wall_s == pytest.approx(1000 + 20, abs=0.1)


@pytest.mark.parametrize(
    ("ended", "is_down"),
    [("finished", False), ("time", False), ("signal", True), (None, True)],
)
def test_only_an_interrupted_run_is_down(tmp_path, clock, ended, is_down):
    path, now = tmp_path / "goodput.jsonl", time.time()
    sitting(path, clock, [1], resumed=0, began=now - 1000, ended=ended)
    rows = read_rows(path)
    later = [{**rows[-1], "sitting": 2, "began": rows[-1]["at"] + 50, "s": {}}]
    assert account([*rows, *later]).seconds["down"] == pytest.approx(
        50 if is_down else 0
    )


@pytest.mark.parametrize("torn", ['{"sitting": 1, "beg', "\x00\x00\x00", "[1]\n3\n"])
def test_a_torn_line_harms_no_other(tmp_path, clock, torn):
    path = tmp_path / "goodput.jsonl"
    sitting(path, clock, range(1, 9), resumed=0, began=time.time())
    before = read_rows(path)
    with path.open("a") as file:
        file.write(torn)
    Ledger(path, clock=clock)
    assert read_rows(path)[: len(before)] == before
    assert [row["sitting"] for row in read_rows(path)[len(before) :]] == [2]


def test_a_wait_counts_where_it_outlasts_the_step_under_way(clock):
    ledger = Ledger(clock=clock)
    ledger.enter("stepping")
    ledger.got_batch(is_idle=True)
    clock.wait(1.0)  # the first step is waited for: alone it takes 1 s
    ledger.waited()
    ledger.stepped(1)
    step(ledger, clock, 2, step_s=0.01, wait_s=0.5, is_idle=True)
    assert ledger.goodput().seconds["data_stall"] == pytest.approx(0.0)
    step(ledger, clock, 3, step_s=0.01, wait_s=4.0, is_idle=False)
    assert ledger.goodput().seconds["data_stall"] == 0.0, "the device was at work"
    step(ledger, clock, 4, step_s=0.01, wait_s=4.0, is_idle=True)
    assert ledger.goodput().seconds["data_stall"] == pytest.approx(3.0)
    ledger.waited()
    step(ledger, clock, 5, step_s=0.01, wait_s=4.0, is_idle=True)
    found = ledger.goodput()
    assert found.seconds["data_stall"] == pytest.approx(7.0)
    assert found.wall_s == pytest.approx(clock.now - 100, abs=0.1)


def test_rows_are_few_however_many_steps(tmp_path, clock):
    path = tmp_path / "goodput.jsonl"
    ledger = Ledger(path, clock=clock)
    ledger.enter("stepping")
    for number in range(1, 10_001):
        step(ledger, clock, number, step_s=1.0)
    assert 1000 < len(read_rows(path)) < 4500
    assert read_rows(path)[-1]["reached"] > 9985


def test_a_step_costs_microseconds(tmp_path):
    ledger = Ledger(tmp_path / "goodput.jsonl")
    ledger.enter("stepping")
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for number in range(200):
            ledger.got_batch(is_idle=False)
            ledger.stepped(number)
        best = min(best, (time.perf_counter() - began) / 200)
    assert best < 100e-6


def test_a_full_disk_is_not_the_ledgers_to_complain_of(tmp_path, clock):
    path = tmp_path / "goodput.jsonl"
    path.mkdir()
    ledger = sitting(path, clock, [1, 2], resumed=0, began=time.time())
    assert ledger.goodput().seconds["stepping"] == pytest.approx(4)


KILLED = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from llmos_jax.telemetry import Ledger
    ledger = Ledger(Path(sys.argv[1]))
    ledger.enter("stepping")
    for step in range(1, 10_000):
        time.sleep(0.01)
        ledger.got_batch(is_idle=False)
        ledger.stepped(step)
        print(step, flush=True)
    """
)


def test_a_kill_loses_no_more_than_the_last_interval(tmp_path):
    path = tmp_path / "goodput.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        reached = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    row = read_rows(path)[-1]
    assert row["reached"] > 0
    assert row["at"] == pytest.approx(time.time(), abs=2.0)
    assert reached - row["reached"] <= 1.3 / 0.01
    assert row["at"] - row["began"] == pytest.approx(sum(row["s"].values()), abs=0.01)


def test_a_run_tells_where_its_time_went(small_run):
    report = json.loads((small_run / "report.json").read_text())
    seconds = report["goodput_s"]
    assert list(seconds) == list(PHASES)
    assert report["goodput"] == pytest.approx(
        seconds["stepping"] / sum(seconds.values()), abs=1e-3
    )
    assert min(seconds["stepping"], seconds["compiling"], seconds["evaluating"]) > 0
    assert seconds["repeated"] == seconds["down"] == 0
    page = (small_run / "report.html").read_text()
    assert "Where the time went" in page and 'class="stepping"' in page
    last = read_rows(small_run / "goodput.jsonl")[-1]
    assert (last["ended"], last["reached"]) == ("finished", 20)


def test_a_process_knows_when_it_began():
    code = "import time; from llmos_jax.telemetry import process_began as p; "
    before = time.time()
    found = subprocess.run(
        [sys.executable, "-c", code + "time.sleep(1); print(p())"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert float(found.stdout) == pytest.approx(before, abs=0.3)
