"""Progress: a bar on a terminal, plain lines elsewhere, one process speaks."""

import io
import time

import pytest

from llmos_jax.telemetry import TrainProgress, log, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def run(stream, clock, seconds_a_step, steps, **options):
    with TrainProgress(steps[-1], stream=stream, **options) as shown:
        for step in steps:
            shown.update(step, 2.5, 1234.4, 0.412)
            clock[0] += seconds_a_step
    return stream.getvalue().splitlines()


def test_plain_lines_at_most_every_ten_seconds(clock):
    lines = run(io.StringIO(), clock, 3.0, range(1, 12))
    assert [line.split()[1] for line in lines] == ["1/11", "5/11", "9/11", "11/11"]


def test_a_plain_line_says_it_all(clock):
    lines = run(io.StringIO(), clock, 10.0, range(1, 4))
    assert lines[1] == (
        "step 2/3  loss 2.500  1,234 tokens/s  MFU 41.2%  (10.0 s, ETA 10.0 s)"
    )


def test_the_last_line_is_shown_when_a_run_is_cut(clock):
    stream = io.StringIO()
    with TrainProgress(100, stream=stream) as shown:
        shown.update(1, 3.0, 10.0, None)
        shown.update(2, 2.0, 10.0, None)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "1/100",
        "2/100",
    ]
    assert "MFU" not in stream.getvalue()


def test_eta_counts_from_the_step_resumed_at(clock):
    lines = run(io.StringIO(), clock, 10.0, range(91, 101), start_step=90)
    assert "ETA 1m20s" in lines[1]


def test_eta_knows_the_time_limit(clock):
    lines = run(io.StringIO(), clock, 10.0, range(1, 101), max_seconds=60)
    assert "ETA 50.0 s" in lines[1]


def test_only_the_first_process_shows(clock, capsys):
    assert run(io.StringIO(), clock, 10.0, range(1, 4), enabled=False) == []
    log("hello", enabled=False)
    assert capsys.readouterr().err == ""


def test_log_goes_to_stderr(capsys):
    log("resumed at step [40]")
    assert capsys.readouterr() == ("", "resumed at step [40]\n")


def test_log_writes_above_a_live_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with TrainProgress(10, stream=stream) as shown:
        shown.update(4, 2.5, 1234.4, 0.412)
        log("saved [step 4]")
    text = stream.getvalue()
    assert "saved [step 4]" in text
    assert "loss 2.500 1,234 tokens/s MFU 41.2%" in text
    assert progress._live == []


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with TrainProgress(10, stream=stream) as shown:
        shown.update(4, 2.5, 1234.4, 0.412)
    assert "\x1b[3" not in stream.getvalue()
